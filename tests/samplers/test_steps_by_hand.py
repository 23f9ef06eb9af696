"""One, two and three steps, each by the formula in its paper, written out."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dualout.errors import InputError
from dualout.levels import Level
from dualout.parameterizations import Dual
from dualout.prediction import Prediction
from dualout.samplers import DDIM, DDPM, IPNDM, DPMSolver, Heun, Sampler, UniPC
from dualout.samplers.ipndm import adams_bashforth
from dualout.schedules import EDM, Cosine, Linear, RectifiedFlow, Schedule
from oracles import constant_denoiser, toy_denoiser

T = 50
TIMES = (45, 30, 12)
SCHEDULES = [Linear(T, 2e-3, 0.4), Cosine(T), RectifiedFlow(T), EDM(T)]
ON_EACH = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
CLIPS = pytest.mark.parametrize("clip", [None, (-0.3, 0.3)], ids=["unclipped", "clipped"])


class Walk:
    """A trajectory by hand: beliefs at any x and t, and the levels on the way."""

    def __init__(self, schedule: Schedule, clip: tuple[float, float] | None, times: tuple[int, ...] = TIMES) -> None:
        self.denoiser, self.clip, self.times = toy_denoiser(schedule, Dual()), clip, times
        self.levels = [*(schedule.scalars(t) for t in times), Level(1.0, 0.0)]
        noise = torch.randn(2, 1, 4, 4, dtype=torch.float64)
        first = self.levels[0]
        self.noise, self.start = noise, noise * math.hypot(first.alpha, first.sigma)

    def look(self, x: Tensor, k: int) -> Prediction:
        return self.denoiser(x, self.times[k])

    def clipped(self, x0: Tensor) -> Tensor:
        return x0 if self.clip is None else x0.clamp(*self.clip)

    def predicted(self, x: Tensor, k: int) -> Tensor:
        return self.clipped(self.look(x, k).x0)

    def run(self, sampler: Sampler, draw=None) -> list[Tensor]:
        moments = list(sampler.trajectory(self.denoiser, self.noise, draw))
        torch.testing.assert_close(moments[0].x_t, self.start, rtol=1e-12, atol=1e-12)
        return [m.x_next for m in moments]

    def options(self) -> dict:
        return {"steps": len(self.times), "spacing": self.times, "clip": self.clip}


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@ON_EACH
@CLIPS
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(schedule: Schedule, clip: tuple[float, float] | None, eta: float) -> None:
    walk, z = Walk(schedule, clip), torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    x, states = walk.start, []
    for k, (t, s) in enumerate(pairwise(walk.levels)):
        p = walk.look(x, k)
        # Song et al., equation 16, in variances: what the step adds and keeps
        tau2 = eta**2 * s.sigma**2 / t.sigma**2 * (t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2)
        x = s.alpha * walk.clipped(p.x0) + math.sqrt(max(s.sigma**2 - tau2, 0)) * p.eps + math.sqrt(max(tau2, 0)) * z[k]
        states.append(x)
    same(walk.run(DDIM(eta=eta, **walk.options()), z.__getitem__), states)


@ON_EACH
@CLIPS
@pytest.mark.parametrize("variance", ["large", "small"])
def test_ddpm(schedule: Schedule, clip: tuple[float, float] | None, variance: str) -> None:
    walk, z = Walk(schedule, clip), torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    x, states = walk.start, []
    for k, (t, s) in enumerate(pairwise(walk.levels)):
        # q(x_s | x_t, x0): condition x_s = alpha_s·x0 + sigma_s·n on x_t = step·x_s + √β·n'
        step = t.alpha / s.alpha
        beta = t.sigma**2 - step**2 * s.sigma**2
        if s.sigma == 0:
            x = walk.predicted(x, k)
        else:
            precision = 1 / s.sigma**2 + step**2 / beta
            mean = (s.alpha * walk.predicted(x, k) / s.sigma**2 + step * x / beta) / precision
            x = mean + math.sqrt(beta if variance == "large" else 1 / precision) * z[k]
        states.append(x)
    same(walk.run(DDPM(variance=variance, **walk.options()), z.__getitem__), states)


@ON_EACH
@CLIPS
def test_eta_1_is_ddpm_with_small_variance(schedule: Schedule, clip: tuple[float, float] | None) -> None:
    walk, z = Walk(schedule, clip), torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    ddpm = walk.run(DDPM(variance="small", **walk.options()), z.__getitem__)
    same(walk.run(DPMSolver(order=1, eta=1.0, **walk.options()), z.__getitem__), ddpm)
    # DDIM's eps is of the x0 before clipping
    if clip is None:
        same(walk.run(DDIM(eta=1.0, **walk.options()), z.__getitem__), ddpm)


def half(level: Level[float]) -> float:
    return math.log(level.alpha / level.sigma)


@ON_EACH
@CLIPS
def test_dpmsolver_2m(schedule: Schedule, clip: tuple[float, float] | None) -> None:
    walk = Walk(schedule, clip)
    a, b, c, _ = walk.levels
    first = walk.predicted(walk.start, 0)
    x1 = b.sigma / a.sigma * walk.start - b.alpha * math.expm1(half(a) - half(b)) * first
    # Lu et al., algorithm 2: D = (1 + 1/2r)·x0 − 1/2r·x0 before, r = h before / h
    second = walk.predicted(x1, 1)
    h = half(c) - half(b)
    r = (half(b) - half(a)) / h
    d = (1 + 1 / (2 * r)) * second - 1 / (2 * r) * first
    x2 = c.sigma / b.sigma * x1 - c.alpha * math.expm1(-h) * d
    same(walk.run(DPMSolver(order=2, **walk.options())), [x1, x2, walk.predicted(x2, 2)])


@ON_EACH
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_reach_bounds_how_far_x0_is_followed(schedule: Schedule, eta: float) -> None:
    # the second step is 2.3 to 7 times as long as the first
    walk, z = Walk(schedule, None, (45, 41, 20)), torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    a, b, c, _ = walk.levels
    longer = (half(c) - half(b)) / (half(b) - half(a))
    plain, bounded, unbounded = (
        walk.run(DPMSolver(eta=eta, reach=reach, **walk.options()), z.__getitem__) for reach in (None, 1.5, longer * 2)
    )
    same(unbounded, plain)
    torch.testing.assert_close(bounded[0], plain[0], rtol=0, atol=0)
    second = walk.look(plain[0], 1).x0
    followed = second - walk.look(walk.start, 0).x0
    straight = walk.run(DPMSolver(eta=eta, reach=1e-12, **walk.options()), z.__getitem__)
    share = -c.alpha * math.expm1(-(1 + eta) * (half(c) - half(b)))
    for states, far in ((plain, longer), (bounded, 1.5)):
        torch.testing.assert_close(states[1] - straight[1], share * 0.5 * far * followed, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=lambda s: s.name)
def test_reach_2_changes_no_trailing_step(schedule: Schedule) -> None:
    for steps in range(2, 101):
        bounded, plain = DPMSolver(steps, reach=2.0), DPMSolver(steps)
        times = plain.timesteps(schedule)
        assert bounded.plan(schedule, times) == plain.plan(schedule, times)


@ON_EACH
@CLIPS
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_dpmsolver_2m_with_noise(schedule: Schedule, clip: tuple[float, float] | None, eta: float) -> None:
    # as k-diffusion writes it, for x/alpha: sigma is sigma/alpha there
    walk, z = Walk(schedule, clip), torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    x, states, before = walk.start, [], None
    for k, (t, s) in enumerate(pairwise(walk.levels)):
        x0 = walk.predicted(x, k)
        if s.sigma == 0:
            x = x0
        else:
            h = half(s) - half(t)
            share = -math.expm1(-h - eta * h)
            y = (s.sigma / s.alpha) / (t.sigma / t.alpha) * math.exp(-h * eta) * x / t.alpha + share * x0
            if before is not None:
                y = y + 0.5 * share * h / (half(t) - half(walk.levels[k - 1])) * (x0 - before)
            x = s.alpha * y + s.sigma * math.sqrt(1 - math.exp(-2 * h * eta)) * z[k]
        before = x0
        states.append(x)
    same(walk.run(DPMSolver(eta=eta, **walk.options()), z.__getitem__), states)


@ON_EACH
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_dpmsolver_3m_integrates_the_parabola(schedule: Schedule, eta: float) -> None:
    # four steps, of which the third is of order 3: the integral of (1+η)·e^((1+η)(u−h))·x0(λ + u) by quadrature
    walk = Walk(schedule, None, (45, 35, 22, 9))
    sampler, nothing = DPMSolver(order=3, eta=eta, **walk.options()), torch.zeros_like(walk.noise)
    moments = list(sampler.trajectory(walk.denoiser, walk.noise, lambda k: nothing))
    t, s = walk.levels[2], walk.levels[3]
    h = half(s) - half(t)
    nodes = torch.tensor([half(level) - half(t) for level in walk.levels[:3]], dtype=torch.float64)
    places, weights = np.polynomial.legendre.leggauss(24)
    powers = torch.arange(3, dtype=torch.float64)
    interpolate = torch.linalg.inv(nodes[:, None] ** powers)
    integral = torch.zeros_like(walk.noise)
    for point, weight in zip(torch.tensor(places + 1) * h / 2, weights * h / 2, strict=True):
        basis = point**powers @ interpolate
        x0 = sum(c * m.prediction.x0 for c, m in zip(basis, moments[:3], strict=True))
        integral = integral + weight * (1 + eta) * torch.exp((1 + eta) * (point - h)) * x0
    expected = s.sigma / t.sigma * math.exp(-eta * h) * moments[2].x_t + s.alpha * integral
    torch.testing.assert_close(moments[2].x_next, expected, rtol=1e-9, atol=1e-9)


@ON_EACH
@CLIPS
def test_unipc_2(schedule: Schedule, clip: tuple[float, float] | None) -> None:
    # Zhao et al., algorithms 5 to 8, with B(h) = e^h − 1 of h = −(λ_s − λ_t)
    walk = Walk(schedule, clip, (45, 30, 20, 9))
    a, b, c, d, _ = walk.levels
    first = walk.predicted(walk.start, 0)
    h = half(b) - half(a)
    x1 = b.sigma / a.sigma * walk.start - b.alpha * math.expm1(-h) * first
    # the corrector with p = 1: half of the difference, which the paper sets where there is one unknown
    second = walk.predicted(x1, 1)
    x1_corrected = x1 - b.alpha * math.expm1(-h) * 0.5 * (second - first)
    # the predictor with p = 2, likewise
    h = half(c) - half(b)
    r = (half(a) - half(b)) / h
    base = c.sigma / b.sigma * x1_corrected - c.alpha * math.expm1(-h) * second
    x2 = base - c.alpha * math.expm1(-h) * 0.5 * (first - second) / r
    # the corrector with p = 2: both unknowns, from their order conditions Σ ρᵢ·rᵢ^(k−1) = k!·φ_(k+1)/B
    third = walk.predicted(x2, 2)
    phi_2 = (math.expm1(-h) / -h - 1) / -h
    phi_3 = (phi_2 - 0.5) / -h
    conditions = torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64)
    right = torch.tensor([phi_2 * -h, 2 * phi_3 * -h], dtype=torch.float64) / math.expm1(-h)
    rho = torch.linalg.solve(conditions, right)
    difference = rho[0] * (first - second) / r + rho[1] * (third - second)
    x2_corrected = base - c.alpha * math.expm1(-h) * difference
    # the predictor once more, and the step to the clean level, where x_t no longer counts
    h = half(d) - half(c)
    r = (half(b) - half(c)) / h
    x3 = d.sigma / c.sigma * x2_corrected - d.alpha * math.expm1(-h) * (third + 0.5 * (second - third) / r)
    same(walk.run(UniPC(order=2, **walk.options())), [x1, x2, x3, walk.predicted(x3, 3)])


@ON_EACH
@CLIPS
def test_ipndm_2(schedule: Schedule, clip: tuple[float, float] | None) -> None:
    walk = Walk(schedule, clip)
    x, states, before = walk.start, [], None
    for k, (t, s) in enumerate(pairwise(walk.levels)):
        eps = walk.look(x, k).eps
        mean = eps
        if before is not None:
            # Adams–Bashforth for uneven steps of u = sigma/alpha
            previous = walk.levels[k - 1]
            h, h_before = s.sigma / s.alpha - t.sigma / t.alpha, t.sigma / t.alpha - previous.sigma / previous.alpha
            mean = eps + h / (2 * h_before) * (eps - before)
        x = s.alpha * walk.clipped((x - t.sigma * mean) / t.alpha) + s.sigma * mean
        before = eps
        states.append(x)
    same(walk.run(IPNDM(order=2, **walk.options())), states)


@ON_EACH
@CLIPS
def test_heun(schedule: Schedule, clip: tuple[float, float] | None) -> None:
    walk = Walk(schedule, clip)
    x, states = walk.start, []
    for k, (t, s) in enumerate(pairwise(walk.levels)):
        eps = walk.look(x, k).eps
        euler = s.alpha * walk.clipped((x - t.sigma * eps) / t.alpha) + s.sigma * eps
        if s.sigma == 0:
            x = euler
        else:
            mean = (eps + walk.look(euler, k + 1).eps) / 2
            x = s.alpha * walk.clipped((x - t.sigma * mean) / t.alpha) + s.sigma * mean
        states.append(x)
    same(walk.run(Heun(**walk.options())), states)


def test_adams_bashforth_is_the_textbooks_for_even_steps() -> None:
    u = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    assert adams_bashforth(u, 1) == pytest.approx((1,))
    assert adams_bashforth(u, 2) == pytest.approx((3 / 2, -1 / 2))
    assert adams_bashforth(u, 3) == pytest.approx((23 / 12, -16 / 12, 5 / 12))
    assert adams_bashforth(u, 4) == pytest.approx((55 / 24, -59 / 24, 37 / 24, -9 / 24))
    # and exact for cubics at any spacing
    u = [9.0, 5.5, 5.0, 2.0, 0.7]
    weights = adams_bashforth(u, 4)
    for power in range(4):
        exact = (u[-1] ** (power + 1) - u[-2] ** (power + 1)) / (power + 1) / (u[-1] - u[-2])
        assert sum(w * v**power for w, v in zip(weights, u[-2::-1], strict=True)) == pytest.approx(exact)


def test_order_1_of_every_solver_is_ddim() -> None:
    for schedule in SCHEDULES:
        walk = Walk(schedule, None)
        ddim = walk.run(DDIM(**walk.options()))
        same(walk.run(DPMSolver(order=1, **walk.options())), ddim)
        same(walk.run(DPMSolver(order=1, published=True, **walk.options())), ddim)
        same(walk.run(IPNDM(order=1, **walk.options())), ddim)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DDIM(eta=1.5), "eta is from 0"),
        (lambda: DDIM(eta=-0.1), "got -0.1"),
        (lambda: DPMSolver(eta=1.1), "1 (SDE-DPM-Solver++); got 1.1"),
        (lambda: DPMSolver(eta=-0.1), "got -0.1"),
        (lambda: DPMSolver(order=3, published=True, eta=1.0), "no eta and no reach"),
        (lambda: DPMSolver(order=3, published=True, reach=2.0), "no eta and no reach"),
        (lambda: DPMSolver(order=1, reach=2.0), "got 2.0 for order 1"),
        (lambda: DPMSolver(reach=0), "reach is above 0, for orders 2 and 3, or null; got 0"),
        (lambda: DDPM(variance="medium"), "unknown variance 'medium'"),
        (lambda: DPMSolver(order=4), "orders 1, 2 and 3; got 4"),
        (lambda: UniPC(order=0), "orders 1, 2 and 3; got 0"),
        (lambda: IPNDM(order=5), "orders 1 to 4; got 5"),
        (lambda: DDIM(clip=(1.0, -1.0)), "low < high"),
        (lambda: DDIM(clip=(1.0,)), "low < high"),  # type: ignore[arg-type]
        (lambda: DDIM(spacing="training"), "did you mean 'trailing'"),
        (lambda: DDIM(spacing=None), "spacing of sampler 'ddim' is a name or a list of numbers; got None"),  # type: ignore[arg-type]
        (lambda: DDIM(clip=1.0), "clip of sampler 'ddim' is a list of numbers or null; got 1.0"),  # type: ignore[arg-type]
        (lambda: DDIM(eta="0.5"), "eta of sampler 'ddim' is a number; got '0.5'"),  # type: ignore[arg-type]
        (lambda: DPMSolver(order=True), "order of sampler 'dpmsolver' is a whole number; got True"),
        (lambda: DDIM(steps=2, spacing=(5.5, 1)), "spacing of sampler"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_sampler_is_refused(make, says: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert says in str(error.value)


def test_numpys_and_torchs_numbers_are_numbers() -> None:
    expected = DDIM(steps=3, spacing=(40, 7, 2))
    for times in ([40, 7, 2], np.array([40, 7, 2]), torch.tensor([40, 7, 2]), tuple(np.array([40, 7, 2]))):
        assert DDIM(steps=np.int64(3), spacing=times) == expected  # type: ignore[arg-type]
    assert DDIM(torch.tensor(3), spacing=(40, 7, 2)) == expected  # type: ignore[arg-type]
    half = np.float32(0.5)
    assert DDIM(3, eta=half, clip=(-half, half)) == DDIM(3, eta=0.5, clip=(-0.5, 0.5))  # type: ignore[arg-type]
    assert UniPC(3, order=np.int64(2)) == UniPC(3, order=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", [DDPM(3), DDIM(3, eta=0.5)], ids=lambda s: s.spec)
def test_fresh_noise_is_for_each_image(sampler: Sampler) -> None:
    denoiser = constant_denoiser(Linear(), torch.zeros(1, 1, 2, 2))
    with pytest.raises(InputError, match=r"for each image, \(2, 1, 2, 2\); got \(1, 1, 2, 2\)"):
        sampler.sample(denoiser, torch.randn(2, 1, 2, 2), lambda k: torch.randn(1, 1, 2, 2))


@pytest.mark.parametrize("made", [[1.0], (k for k in (1.0, 1.0)), None])
def test_a_plan_has_an_entry_for_each_step(made: Any) -> None:
    class Own(DDIM):
        def plan(self, schedule, times):
            return made

    with pytest.raises(InputError, match=r"plan\(\) of sampler 'own' gives a list, an entry for each of 2 steps; got"):
        Own(steps=2).sample(constant_denoiser(Linear(), torch.zeros(1, 1, 2, 2)), torch.randn(1, 1, 2, 2))
