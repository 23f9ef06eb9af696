"""What holds for every sampler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.parameterizations import Dual, Epsilon
from dualout.randomness import SeededDraw, noise
from dualout.samplers import FromDiffusers, Sampler
from dualout.schedules import Schedule
from oracles import MIXTURE, constant_denoiser, point, toy_denoiser
from variants import samplers, schedules, short

SHAPE = (2, 4, 4)
EVERY = pytest.mark.parametrize("sampler", samplers())
# clipping has corners, where neither order nor gradient is defined
SMOOTH = pytest.mark.parametrize("sampler", samplers(clip=None))
# diffusers' schedulers keep float32 coefficients, and ask for their values
OWN = pytest.mark.parametrize("sampler", [s for s in samplers(clip=None) if not isinstance(s.values[0], FromDiffusers)])


class Conv(nn.Module):
    """A small smooth network with weights."""

    def __init__(self, channels_in: int = 2, channels_out: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, 8, 3, padding=1)
        self.last = nn.Conv2d(8, channels_out, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + (t / 50).to(x.dtype).view(-1, 1, 1, 1)))


def start(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return noise(range(count), SHAPE, dtype=dtype)


def fresh(count: int, dtype: torch.dtype = torch.float64) -> SeededDraw:
    return SeededDraw(range(count), SHAPE, dtype=dtype)


def accepts(sampler: Sampler, schedule: Schedule) -> bool:
    try:
        sampler.plan(schedule, sampler.timesteps(schedule))
    except InputError:
        # diffusers' schedulers are of one family of schedules
        assert isinstance(sampler, FromDiffusers)
        return False
    return True


@EVERY
@pytest.mark.parametrize("schedule", schedules(50))
def test_data_of_one_image_are_reached_exactly_by_any_number_of_steps(sampler: Sampler, schedule: Schedule) -> None:
    # x0 and eps are constant along the way, so that every solver of every order is exact, not only at the end
    if not accepts(sampler, schedule):
        pytest.skip("refused")
    image = torch.linspace(-0.9, 0.9, 32, dtype=torch.float64).view(1, *SHAPE)
    denoiser = constant_denoiser(schedule, image)
    moments = list(sampler.trajectory(denoiser, start(3), fresh(3)))
    # float32 of diffusers' schedulers grows with sigma / alpha of the first level, and in eps with alpha / sigma
    close, close_eps = (1e-5, 1e-3) if isinstance(sampler, FromDiffusers) else (1e-6, 1e-5)
    torch.testing.assert_close(moments[-1].x_next, image.expand(3, *SHAPE), rtol=close, atol=close)
    deterministic = not sampler.stochastic or isinstance(sampler, FromDiffusers)
    for m in moments if deterministic else []:
        torch.testing.assert_close(m.prediction.eps, moments[0].prediction.eps, rtol=close_eps, atol=close_eps)


@EVERY
def test_moments_tell_what_happened(sampler: Sampler) -> None:
    denoiser = toy_denoiser(short(), Dual())
    moments = list(sampler.trajectory(denoiser, start(2), fresh(2)))
    assert [m.k for m in moments] == [0, 1, 2, 3, 4]
    assert [m.t for m in moments] == sampler.timesteps(short())
    for m, following in pairwise(moments):
        assert following.x_t is m.x_next
    for m in moments:
        k, t, x_t, prediction = m
        assert (k, t) == (m.k, m.t)
        assert x_t is m.x_t
        assert prediction is m.prediction
        assert m.prediction.x_t is m.x_t
        torch.testing.assert_close(denoiser(m.x_t, m.t).x0, m.prediction.x0, rtol=1e-12, atol=1e-12)
    assert torch.equal(sampler.sample(denoiser, start(2), fresh(2)), moments[-1].x_next)


@EVERY
def test_network_calls_are_those_declared_for_every_number_of_steps(sampler: Sampler) -> None:
    schedule, calls = short(), 0

    def network(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.1 * x

    denoiser = Denoiser(network, Epsilon(), schedule)
    x = torch.randn(1, 1, 1, 1)
    for steps in range(1, schedule.steps + 1):
        calls = 0
        some = dataclasses.replace(sampler, steps=steps)
        assert some.sample(denoiser, x).isfinite().all()
        assert calls == some.evaluations
        assert len(set(some.timesteps(schedule))) == steps


@EVERY
def test_too_many_steps_are_refused(sampler: Sampler) -> None:
    denoiser = toy_denoiser(short(), Dual())
    with pytest.raises(InputError, match="from 1 to 50"):
        dataclasses.replace(sampler, steps=51).sample(denoiser, start(1))
    for steps in (0, -1, 2.5, True):
        with pytest.raises(InputError, match=r"is a whole number|looks"):
            dataclasses.replace(sampler, steps=steps)


@EVERY
def test_one_step_ends_at_the_predicted_image(sampler: Sampler) -> None:
    denoiser, one = toy_denoiser(short(), Dual()), dataclasses.replace(sampler, steps=1)
    (moment,) = one.trajectory(denoiser, start(2), fresh(2))
    torch.testing.assert_close(moment.x_next, moment.prediction.x0.clamp(-1, 1), rtol=1e-6, atol=1e-6)


@EVERY
def test_a_batch_is_its_images_one_by_one(sampler: Sampler) -> None:
    denoiser = toy_denoiser(short(), Dual())
    together = sampler.sample(denoiser, start(4), fresh(4))
    for i in range(4):
        alone = sampler.sample(
            denoiser, noise([i], SHAPE, dtype=torch.float64), SeededDraw([i], SHAPE, dtype=torch.float64)
        )
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-10, atol=1e-10)


@EVERY
def test_stochastic_means_that_fresh_noise_matters(sampler: Sampler) -> None:
    denoiser = toy_denoiser(short(), Dual())
    some = [sampler.sample(denoiser, start(2), SeededDraw(s, SHAPE, dtype=torch.float64)) for s in ([0, 1], [2, 3])]
    if not isinstance(sampler, FromDiffusers):  # which cannot know
        assert sampler.stochastic != torch.equal(*some)
    torch.manual_seed(1)
    undrawn = sampler.sample(denoiser, start(2))
    torch.manual_seed(1)
    assert torch.equal(undrawn, sampler.sample(denoiser, start(2)))


@pytest.mark.parametrize("sampler", [s for s in samplers() if s.values[0].stochastic])
@pytest.mark.parametrize(
    "shaped",
    [lambda z: z[:1], lambda z: z.mean(1, keepdim=True), lambda z: z.transpose(0, 1), lambda z: z.numpy()],
    ids=["one for all", "one for all channels", "transposed", "array"],
)
def test_fresh_noise_is_one_an_image(sampler: Sampler, shaped: Callable[[Tensor], Any]) -> None:
    # the first two would be spread over the images without a word
    draw = fresh(3)
    with pytest.raises(InputError, match=r"draw\(k\) gives noise for each image, \(3, 2, 4, 4\); got"):
        sampler.sample(toy_denoiser(short(), Dual()), start(3), lambda k: shaped(draw(k)))


@OWN
def test_float32_agrees_with_float64(sampler: Sampler) -> None:
    network, draw = Conv(), fresh(4, torch.float32)
    x = start(4, torch.float32)
    single = sampler.sample(Denoiser(network, Dual(), short()), x, draw)
    # the same fresh noise: what is drawn in float64 is another number
    exact = sampler.sample(Denoiser(network.double(), Dual(), short()), x.double(), lambda k: draw(k).double())
    assert (single.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert (single.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@EVERY
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.001), (torch.bfloat16, 0.006)])
def test_half_precision_stays_near(sampler: Sampler, dtype: torch.dtype, bound: float) -> None:
    # the network computes in half precision, the steps in float32; the bound is on the root mean square
    network, x, draw = Conv(), start(8, torch.float32).to(dtype), fresh(8, torch.float32)
    full = sampler.sample(Denoiser(network, Dual(), short()), x.float(), draw)
    half = sampler.sample(Denoiser(network.to(dtype), Dual(), short()), x, draw)
    assert half.dtype == dtype
    assert (half.float() - full).square().mean().sqrt() <= bound


@EVERY
def test_the_noise_that_was_given_is_not_changed(sampler: Sampler) -> None:
    x, drawn = start(2), [noise([7, 8], SHAPE, dtype=torch.float64) for _ in range(5)]
    before, drawn_before = x.clone(), [d.clone() for d in drawn]
    draw = fresh(2) if isinstance(sampler, FromDiffusers) else drawn.__getitem__
    moments = [
        (m.x_t, m.x_t.clone(), m.prediction.x0, m.prediction.x0.clone())
        for m in sampler.trajectory(toy_denoiser(short(), Dual()), x, draw)
    ]
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(drawn, drawn_before, strict=True))
    # nor is anything that was handed out written to afterwards
    assert all(torch.equal(a, b) and torch.equal(c, d) for a, b, c, d in moments)


@EVERY
def test_clipping_bounds_the_result_and_leaves_beliefs_alone(sampler: Sampler) -> None:
    def far(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x - 3, 3 * torch.ones_like(x), 0 * x[:, :1]], 1)

    denoiser = Denoiser(far, Dual(), short())
    moments = list(sampler.trajectory(denoiser, start(2), fresh(2)))
    assert moments[-1].x_next.abs().max() <= 1 + 1e-6
    assert moments[-1].prediction.x0.abs().max() > 1.5
    narrow = dataclasses.replace(sampler, clip=(-0.25, 0.25))
    if not isinstance(sampler, FromDiffusers):
        assert narrow.sample(denoiser, start(2), fresh(2)).abs().max() <= 0.25 + 1e-6
    loose = dataclasses.replace(sampler, clip=None)
    assert loose.sample(denoiser, start(2), fresh(2)).abs().max() > 1.5


@SMOOTH
def test_what_lies_inside_the_range_is_not_touched_by_clipping(sampler: Sampler) -> None:
    denoiser = point(0.4).denoiser(short())
    wide = dataclasses.replace(sampler, clip=(-50.0, 50.0))
    a, b = (s.sample(denoiser, start(3), fresh(3)) for s in (sampler, wide))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@OWN
def test_gradients_through_a_trajectory_equal_finite_differences(sampler: Sampler) -> None:
    sampler, shape = dataclasses.replace(sampler, steps=4), (1, 1, 2, 2)
    strength = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    draw = SeededDraw([3], shape[1:], dtype=torch.float64)

    def end(x: Tensor, strength: Tensor) -> Tensor:
        def network(x: Tensor, t: Tensor) -> Tensor:
            eps = torch.tanh(strength * x)
            return torch.cat([eps, torch.sin(x), strength * x], 1)

        denoiser = Denoiser(network, Dual(), short())
        *_, last = sampler.trajectory(denoiser, x, draw, differentiable=True)
        return last.x_next

    x = noise([0], shape[1:], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(end, (x, strength), eps=1e-6, atol=1e-5, rtol=1e-5)


@EVERY
def test_no_graph_is_kept_unless_asked_for(sampler: Sampler) -> None:
    denoiser = Denoiser(Conv(), Dual(), short())
    x = start(1, torch.float32).requires_grad_()
    for m in sampler.trajectory(denoiser, x, fresh(1, torch.float32)):
        assert not m.x_next.requires_grad
        assert torch.is_grad_enabled()  # the caller's own setting is back between steps
    assert not sampler.sample(denoiser, x, fresh(1, torch.float32)).requires_grad


@EVERY
def test_conditions_reach_the_network(sampler: Sampler) -> None:
    seen = []

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(label)
        return 0.1 * x

    label = torch.tensor([4, 2])
    sampler.sample(Denoiser(network, Epsilon(), short()), start(2), fresh(2), label=label)
    assert len(seen) == sampler.evaluations
    assert all(s is label for s in seen)


@SMOOTH
def test_many_steps_end_at_the_data(sampler: Sampler) -> None:
    # 50 of 50 steps with the perfect denoiser of a mixture: both of its peaks, with their weights
    many = dataclasses.replace(sampler, steps=50)
    seeds = range(64)
    x, draw = noise(seeds, (1, 8, 8), dtype=torch.float64), SeededDraw(seeds, (1, 8, 8), dtype=torch.float64)
    ends = many.sample(MIXTURE.denoiser(short()), x, draw)
    left = float((ends < 0).double().mean())
    assert math.isclose(left, 0.3, abs_tol=0.05)
    assert ends[ends < 0].mean() == pytest.approx(-0.6, abs=0.05)
    assert ends[ends > 0].mean() == pytest.approx(0.5, abs=0.05)
    assert ends[ends > 0].std() == pytest.approx(0.2, abs=0.05)
