"""What is special to dual output: where the ratio comes from, what teaches it, and what it is at best."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.parameterizations import CleanImage, Dual, Epsilon, Flow, Karras, Parameterization, Velocity
from dualout.parameterizations.base import SingleOutput, subtract
from dualout.parameterizations.dual import StepRatio, blend, optimal_ratio
from dualout.schedules import Cosine, Linear, RectifiedFlow, Schedule

T = 50
SHORT = Cosine(T)


def read(dual: Dual, raw: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule = SHORT):
    return Denoiser(lambda x, time: raw, dual, schedule)(x_t, t)


def some(channels: int, size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    double = torch.float64
    raw = torch.randn(size, channels, 4, 4, dtype=double)
    return raw, torch.randn(size, 2, 4, 4, dtype=double), torch.tensor([0, 20, T - 1])[:size]


@pytest.mark.parametrize(
    ("ratio", "channels"),
    [("pixel", 7), ("image", 7), ("channel", 9), ("step", 6), ("velocity", 6), ("flow", 6), (0.5, 6), (0, 6)],
)
def test_channels(ratio: str | float, channels: int) -> None:
    assert Dual(ratio=ratio).channels(3) == channels
    assert Dual(ratio=ratio, gate="balanced").channels(3) == channels


def test_pixel_is_the_papers_formula() -> None:
    raw, x_t, t = some(5)
    p = read(Dual(), raw, x_t, t)
    alpha, sigma = SHORT.level(t).like(x_t)[:2]
    r = 1 / (1 + torch.exp(-raw[:, 4:]))
    expected = r * raw[:, 2:4] + (1 - r) * (x_t - sigma * raw[:, :2]) / alpha
    torch.testing.assert_close(p.x0, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(p.parts["ratio"], r)
    assert p.parts["ratio"].shape == (3, 1, 4, 4)
    assert torch.equal(p.parts["eps"], raw[:, :2])
    assert torch.equal(p.parts["x0"], raw[:, 2:4])


def test_channel_has_a_ratio_for_each() -> None:
    raw, x_t, t = some(6)
    p = read(Dual(ratio="channel"), raw, x_t, t)
    assert p.parts["ratio"].shape == (3, 2, 4, 4)
    for c in range(2):
        one = torch.cat([raw[:, c : c + 1], raw[:, c + 2 : c + 3], raw[:, c + 4 : c + 5]], 1)
        torch.testing.assert_close(read(Dual(), one, x_t[:, c : c + 1], t).x0, p.x0[:, c : c + 1])


def test_image_takes_the_mean_of_the_logit() -> None:
    raw, x_t, t = some(5)
    p = read(Dual(ratio="image"), raw, x_t, t)
    for b in range(3):
        ratio = torch.sigmoid(raw[b, 4].mean())
        torch.testing.assert_close(p.parts["ratio"][b].flatten(), ratio.view(1))
        fixed = read(Dual(ratio=float(ratio)), raw[b : b + 1, :4], x_t[b : b + 1], t[b : b + 1])
        torch.testing.assert_close(p.x0[b : b + 1], fixed.x0)


def test_step_has_a_table_that_is_learned() -> None:
    raw, x_t, t = some(4)
    denoiser = Denoiser(lambda x, time: raw, Dual(ratio="step"), SHORT)
    assert isinstance(denoiser.head, StepRatio)
    assert denoiser.head.logit.shape == (T,)
    with torch.no_grad():
        denoiser.head.logit.copy_(torch.linspace(-2, 2, T))
    ratio = denoiser(x_t, t).parts["ratio"]
    torch.testing.assert_close(ratio[:, 0, 0, 0].float(), torch.linspace(-2, 2, T)[t].sigmoid())
    # an int and a batch of it read the same entry
    torch.testing.assert_close(denoiser(x_t, 20).parts["ratio"][0], ratio[1])


def test_step_learns_the_best_ratio() -> None:
    # heads with errors of known size: gradient descent on the table ends at the closed form
    schedule, errors = Linear(T, 2e-3, 0.4), (0.09, 0.04)
    torch.manual_seed(1)
    x0, noise = torch.randn(2, 2000, 1, 4, 4)
    off = [torch.randn(2000, 1, 4, 4) * v**0.5 for v in errors]
    t = torch.arange(2000) % T

    def network(x: Tensor, time: Tensor) -> Tensor:
        return torch.cat([noise + off[1], x0 + off[0]], 1)

    denoiser = Denoiser(network, Dual(ratio="step", gate="balanced"), schedule)
    optimizer = torch.optim.Adam(denoiser.parameters(), 0.2)
    for _ in range(100):
        optimizer.zero_grad()
        denoiser.loss(x0, t, noise).total.backward()
        optimizer.step()
    level = schedule.level(torch.arange(T))
    assert isinstance(denoiser.head, StepRatio)
    learned = (denoiser.head.logit.detach() - schedule.log_snr).sigmoid()
    torch.testing.assert_close(learned.double(), optimal_ratio(level, *errors), rtol=0, atol=0.05)


def test_a_balanced_gate_begins_as_velocity() -> None:
    raw, x_t, t = some(5)
    raw[:, 4:] = 0
    alpha, sigma = SHORT.level(t).like(x_t)[:2]
    p = read(Dual(gate="balanced"), raw, x_t, t)
    torch.testing.assert_close(p.parts["ratio"], (sigma**2).expand(3, 1, 4, 4))
    v = alpha * raw[:, :2] - sigma * raw[:, 2:4]
    torch.testing.assert_close(p.x0, alpha * x_t - sigma * v)


@pytest.mark.parametrize("schedule", [SHORT, Linear(T, 2e-3, 0.4), RectifiedFlow(T)], ids=lambda s: s.name)
@pytest.mark.parametrize(("ratio", "single"), [("velocity", Velocity()), ("flow", Flow())])
def test_named_blends_are_single_outputs(schedule: Schedule, ratio: str, single: Velocity | Flow) -> None:
    raw, x_t, t = some(4)
    alpha, sigma = schedule.level(t).like(x_t)[:2]
    eps, x0 = raw[:, :2], raw[:, 2:]
    output = alpha * eps - sigma * x0 if ratio == "velocity" else eps - x0
    expected = Denoiser(lambda x, time: output, single, schedule)(x_t, t)
    p = read(Dual(ratio=ratio), raw, x_t, t, schedule)
    torch.testing.assert_close(p.x0, expected.x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(p.eps, expected.eps, rtol=1e-8, atol=1e-8)


def test_a_ratio_of_0_or_1_does_not_look_at_the_other_route() -> None:
    raw, x_t, t = some(4)
    raw[:, 2:] = torch.nan
    assert read(Dual(ratio=0.0), raw, x_t, t).x0.isfinite().all()
    raw = torch.full_like(raw, torch.inf)
    raw[:, 2:] = 0.5
    assert (read(Dual(ratio=1.0), raw, x_t, t).x0 == 0.5).all()
    # halfway is halfway
    torch.testing.assert_close(blend(0.25, torch.tensor(1.0), torch.tensor(0.0)), torch.tensor(0.25))


def test_the_gates_loss_is_the_posterior_means() -> None:
    # |mu(x0, x_t) − mu(x0_mix, x_t)|² by the mean's full formula, its part in x_t included
    raw, x0, t = some(5)
    noise = torch.randn_like(x0)
    alpha, sigma = SHORT.level(t).like(x0)[:2]
    x_t = alpha * x0 + sigma * noise
    loss = Denoiser(lambda x, time: raw, Dual(), SHORT).loss(x0, t, noise).parts["mu"]
    before = torch.where(t > 0, SHORT.level((t - 1).clamp(min=0)).alpha, torch.ones(())).view(-1, 1, 1, 1)
    beta = 1 - (alpha / before) ** 2

    def mu(x0: Tensor) -> Tensor:
        return before * beta / sigma**2 * x0 + (alpha / before) * (1 - before**2) / sigma**2 * x_t

    expected = (mu(x0) - mu(read(Dual(), raw, x_t, t).x0)).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-15)


def test_a_balanced_gates_loss_is_relative() -> None:
    # an error of both routes, k times larger, is no larger loss: every t teaches alike
    raw, x0, t = some(5)
    noise = torch.randn_like(x0)

    def loss(k: float) -> Tensor:
        alpha, sigma = SHORT.level(t).like(x0)[:2]
        scaled = torch.cat([noise + k * raw[:, :2] * alpha / sigma, x0 + k * raw[:, 2:4], raw[:, 4:]], 1)
        return Denoiser(lambda x, time: scaled, Dual(gate="balanced"), SHORT).loss(x0, t, noise).parts["mu"]

    torch.testing.assert_close(loss(1.0), loss(0.01), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("dual", "weight"), [(Dual(), 1.0), (Dual(gate="balanced"), 0.05), (Dual(gate_weight=0.3), 0.3)]
)
def test_the_total_is_a_third_of_the_sum(dual: Dual, weight: float) -> None:
    raw, x0, t = some(5)
    total, parts = Denoiser(lambda x, time: raw, dual, SHORT).loss(x0, t, torch.randn_like(x0))
    expected = (parts["eps"].mean() + parts["x0"].mean() + weight * parts["mu"].mean()) / 3
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("correlation", [0.0, 0.6, -0.8])
def test_the_optimal_ratio_is_the_best_of_all(correlation: float) -> None:
    level, variance_x0, variance_eps = Linear().scalars(400), 0.05, 0.02
    best = float(optimal_ratio(level, variance_x0, variance_eps, correlation))

    def error(r: float) -> float:
        # x0_mix − x0 = r·a − (1 − r)·(sigma/alpha)·e
        s = level.sigma / level.alpha
        cross = correlation * (variance_x0 * variance_eps) ** 0.5
        return r**2 * variance_x0 + (1 - r) ** 2 * s**2 * variance_eps - 2 * r * (1 - r) * s * cross

    assert error(best) < min(error(best - 0.01), error(best + 0.01))
    assert error(best) <= min(error(k / 1000) for k in range(1001)) + 1e-12


@pytest.mark.parametrize(
    ("first", "second"),
    [(Epsilon(), CleanImage()), (Velocity(), CleanImage()), (Epsilon(), Velocity()), (Flow(), Velocity())],
    ids=lambda p: p.name,
)
def test_a_zero_logit_is_best_for_outputs_that_err_alike(first: SingleOutput, second: SingleOutput) -> None:
    torch.manual_seed(2)
    x0, noise, off, other = torch.randn(4, 1, 1, 60, 60, dtype=torch.float64)
    for t in (5, 25, 45):
        level = SHORT.scalars(t)
        x_t = level.alpha * x0 + level.sigma * noise
        heads = [p.target(x0, noise, level) + 0.1 * e for p, e in ((first, off), (second, other))]
        raw = torch.cat([*heads, torch.zeros_like(x0)], 1)
        p = Dual(gate="balanced", first=first, second=second).read(raw, x_t, level)
        one, two = first.to_x0(heads[0], x_t, level), second.to_x0(heads[1], x_t, level)
        # least squares over 3,600 pixels; the ratio of two variances is known to about 2 / √3600
        best = ((x0 - one) * (two - one)).sum() / (two - one).square().sum()
        assert float(p.parts["ratio"][0, 0, 0, 0]) == pytest.approx(float(best), abs=0.05)
        # and what is told elsewhere of the two routes is what they say
        torch.testing.assert_close(subtract(p.parts["eps"], x_t, level), one, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(p.parts["x0"], two)
        torch.testing.assert_close(p.x0, torch.lerp(one, two, p.parts["ratio"]))


def test_v_and_x0_by_their_names() -> None:
    dual = Parameterization.parse("dual-blend:first=v:second=x0")
    assert dual == Dual(gate="balanced", blend_weight=1.0, eps_weight=0.3, first=Velocity(), second=CleanImage())
    assert Parameterization.parse(dual.spec) == Parameterization.from_config(dual.config()) == dual


def test_equal_errors_make_velocity_optimal() -> None:
    for t in (0, 300, 999):
        level = Linear().scalars(t)
        assert optimal_ratio(level, 0.1, 0.1) == pytest.approx(level.sigma**2, rel=1e-9)


def test_subtraction_is_the_same_for_numbers_and_tensors() -> None:
    x_t, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    level = Linear().scalars(700)
    tensors = Linear().level(torch.full((3,), 700)).like(x_t)
    torch.testing.assert_close(subtract(eps, x_t, level), subtract(eps, x_t, tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ratio": "pixle"}, "did you mean 'pixel'"),
        ({"ratio": 1.5}, "from 0 (eps only) to 1 (x0 only), got 1.5"),
        ({"ratio": -0.1}, "got -0.1"),
        ({"gate": "balance"}, "did you mean 'balanced'"),
        ({"first": CleanImage()}, "two different single outputs"),
        ({"second": Karras()}, "of the same input"),
        ({"first": Dual()}, "two different single outputs"),
        # or the parts eps and x0 would not be the two routes, nor the part ratio the weight of x0's
        ({"first": CleanImage(), "second": Velocity()}, "a clean image it is the second"),
        ({"first": Velocity(), "second": Epsilon()}, "noise it is the first"),
        ({"first": CleanImage(), "second": Epsilon()}, "a clean image it is the second"),
        ({"ratio": None}, "is a name or a number; got None"),
        ({"gate_weight": -1.0}, "gate_weight is a number, 0 or more; got -1.0"),
        ({"x0_weight": "1"}, "is a number; got '1'"),
    ],
)
def test_what_is_no_dual_is_refused(fields: dict, says: str) -> None:
    with pytest.raises(InputError) as error:
        Dual(**fields)
    assert says in str(error.value)


def test_a_network_that_learned_a_ratio_is_read_without_it() -> None:
    raw, x_t, t = some(5)
    for route, ratio in {"eps": 0.0, "x0": 1.0, "velocity": "velocity", "flow": "flow", 0.5: 0.5}.items():
        without = read(Dual(ratio=ratio), raw[:, :4], x_t, t)
        torch.testing.assert_close(read(Dual().route(route), raw, x_t, t).x0, without.x0)


def test_the_blends_own_error_is_that_of_v_prediction():
    """With the ratio "velocity" the blend is v-prediction with v = alpha·eps_θ − sigma·x0_θ, and so is its loss."""
    x0, noise, eps, direct = (torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(4))
    t = torch.tensor([0, 300, 700, 999])
    level = Linear().level(t).like(x0)
    x_t = level.alpha * x0 + level.sigma * noise
    dual = Dual(ratio="velocity", blend_weight=2.0)
    losses = dual.losses(dual.read(torch.cat([eps, direct], 1), x_t, level), x0, noise)
    v = Velocity()
    expected = v.losses(v.read(level.alpha * eps - level.sigma * direct, x_t, level), x0, noise)["v"]
    torch.testing.assert_close(losses["blend"], expected)
    assert dual.weights(Linear())["blend"] == pytest.approx(2 / 3)


def test_the_blends_error_teaches_both_outputs_and_the_ratio():
    raw = torch.randn(2, 7, 4, 4, dtype=torch.float64, requires_grad=True)
    x0, noise = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    level = Linear().level(torch.tensor([200, 600])).like(x0)
    dual = Dual(gate="balanced", blend_weight=1.0)
    losses = dual.losses(dual.read(raw, level.alpha * x0 + level.sigma * noise, level), x0, noise)
    losses["blend"].sum().backward()
    assert (raw.grad.abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", ["eps_weight", "x0_weight", "blend_weight"])
def test_weights_are_numbers_from_0(name):
    with pytest.raises(InputError, match=name):
        Dual(**{name: -1.0})
    with pytest.raises(InputError, match=name):
        Dual(**{name: float("nan")})
