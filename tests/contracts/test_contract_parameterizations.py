"""What holds for every way to read a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dualout.denoiser import Denoiser
from dualout.parameterizations import Dual, LearnedVariance, Parameterization
from dualout.parameterizations.dual import LEARNED
from dualout.parameterizations.upgraded import Upgraded
from dualout.prediction import Prediction
from dualout.schedules import Cosine, Schedule
from oracles import perfect_output
from variants import parameterizations, schedule_of

T = 50
SCHEDULES = [schedule_of(cls, T) for cls in Schedule.kinds().values()]
EVERY = pytest.mark.parametrize("parameterization", parameterizations())


def batch(parameterization: Parameterization, channels: int = 2, size: int = 4, **kwargs: Any) -> tuple[Tensor, ...]:
    """Four 4×4 images: as many as they are wide, so that a (B,) that is broadcast along a row is found out."""
    shape = (size, channels, size, size)
    raw = torch.randn(size, parameterization.channels(channels), size, size, **kwargs)
    return raw, torch.randn(shape, **kwargs), torch.randn(shape, **kwargs), torch.tensor([0, 7, 21, T - 1])


def around(raw: Tensor, parameterization: Parameterization, schedule: Schedule) -> Denoiser:
    denoiser = Denoiser(lambda x, t: raw, parameterization, schedule)
    return denoiser.to(raw.dtype)


@EVERY
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_invariant(parameterization: Parameterization, dtype: torch.dtype, bound: float) -> None:
    for schedule in SCHEDULES:
        raw, x_t, _, t = batch(parameterization, dtype=dtype)
        denoiser = around(raw, parameterization, schedule)
        for time in (t, 0, 21, T - 1):
            p = denoiser(x_t, time)
            level = schedule.level(t if isinstance(time, Tensor) else torch.full((4,), time)).like(x_t)
            assert p.x0.shape == p.eps.shape == x_t.shape
            assert p.x0.dtype == p.eps.dtype == dtype
            scale = (level.alpha * p.x0).abs().amax() + (level.sigma * p.eps).abs().amax()
            assert (level.alpha * p.x0 + level.sigma * p.eps - x_t).abs().amax() <= bound * scale


@EVERY
def test_an_int_and_a_tensor_of_it_agree(parameterization: Parameterization) -> None:
    raw, x_t, _, _ = batch(parameterization, dtype=torch.float64)
    denoiser = around(raw, parameterization, Cosine(T))
    for t in (0, 21, T - 1):
        one, scalar, many = (denoiser(x_t, time) for time in (t, torch.tensor(t), torch.full((4,), t)))
        for other in (scalar, many):
            torch.testing.assert_close(one.x0, other.x0, rtol=1e-11, atol=1e-11)
            assert one.parts.keys() == other.parts.keys()
            for name, part in one.parts.items():
                torch.testing.assert_close(part, other.parts[name].expand_as(part), rtol=1e-11, atol=1e-11)


@EVERY
def test_a_level_of_one_number_an_image_is_read_image_by_image(parameterization: Parameterization) -> None:
    for schedule in SCHEDULES:
        raw, x_t, x0, t = batch(parameterization, dtype=torch.float64)
        head = parameterization.head(schedule)
        raw = raw if head is None else head(raw, t)
        plain = parameterization.read(raw, x_t, schedule.level(t))
        shaped = parameterization.read(raw, x_t, schedule.level(t).like(x_t))
        for p in (plain, Prediction(x_t, schedule.level(t), plain.x0, plain.parts)):
            assert torch.equal(p.x0, shaped.x0)
            assert torch.equal(p.eps, shaped.eps)
            assert all(torch.equal(p.parts[name], part) for name, part in shaped.parts.items())
            losses = (parameterization.losses(q, x0, x_t) for q in (p, shaped))
            assert all(torch.equal(a, b) for a, b in zip(*(one.values() for one in losses), strict=True))


@EVERY
def test_images_do_not_see_each_other(parameterization: Parameterization) -> None:
    for schedule in SCHEDULES:
        raw, x_t, x0, t = batch(parameterization, dtype=torch.float64)
        noise = torch.randn_like(x0)
        together = around(raw, parameterization, schedule)
        p, loss = together(x_t, t), together.loss(x0, t, noise)
        assert all(part.shape == (4,) for part in loss.parts.values())
        for b in range(4):
            alone = around(raw[b : b + 1], parameterization, schedule)
            one = slice(b, b + 1)
            torch.testing.assert_close(alone(x_t[one], t[one]).x0, p.x0[one], rtol=1e-12, atol=1e-12)
            for name, part in alone.loss(x0[one], t[one], noise[one]).parts.items():
                torch.testing.assert_close(part, loss.parts[name][one], rtol=1e-12, atol=0)


@EVERY
def test_a_perfect_network_gives_the_truth_and_no_loss(parameterization: Parameterization) -> None:
    for schedule in SCHEDULES:
        _, x0, eps, t = batch(parameterization, dtype=torch.float64)
        level = schedule.level(t).like(x0)
        x_t = level.alpha * x0 + level.sigma * eps
        raw = perfect_output(parameterization, x0, eps, x_t, level)
        denoiser = around(raw, parameterization, schedule)
        p = denoiser(x_t, t)
        torch.testing.assert_close(p.x0, x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(p.eps, eps, rtol=1e-8, atol=1e-8)
        for name, part in denoiser.loss(x0, t, eps).parts.items():
            assert part.isfinite().all()
            # a likelihood has another minimum than zero
            assert (part < 1e-7).all() or name == "vlb"


@EVERY
def test_the_total_is_the_weighted_sum_of_means(parameterization: Parameterization) -> None:
    for schedule in SCHEDULES:
        raw, x0, noise, t = batch(parameterization, dtype=torch.float64)
        loss = around(raw, parameterization, schedule).loss(x0, t, noise)
        weights = parameterization.weights(schedule)
        expected = sum(weights.get(name, 1.0) * part.mean() for name, part in loss.parts.items())
        assert loss.total.shape == ()
        torch.testing.assert_close(loss.total, torch.as_tensor(expected))


def _any_belief(parameterization: Parameterization, channels: int) -> tuple[Any, Tensor, Tensor]:
    x = torch.ones(1, channels, 2, 2)
    return around(torch.zeros(1, parameterization.channels(channels), 2, 2), parameterization, Cosine(T))(x, 3), x, x


def taught(parameterization: Parameterization, channels: int) -> dict[str, set[int]]:
    """Which output channels each loss teaches: a head's loss its own, the gate's the ratio, or all if not detached."""
    total = parameterization.channels(channels)
    if isinstance(parameterization, LearnedVariance):
        return taught(parameterization.base, channels) | {"vlb": set(range(total - channels, total))}
    if isinstance(parameterization, Upgraded):
        names = [*parameterization.base.losses(*_any_belief(parameterization.base, channels))]
        old, new = set(range(channels)), set(range(channels, 2 * channels))
        heads = {"x0": new, "eps": old} if parameterization.trained == "x0" else {names[0]: old, "x0": new}
        return heads | ({"mu": {2 * channels}} if parameterization.ratio == "pixel" else {})
    if not isinstance(parameterization, Dual):
        parts = [*_any_belief(parameterization, channels)[0].parts]
        return _several(parameterization, channels) if len(parts) > 1 else {parts[0]: set(range(total))}
    first, second = parameterization.first.symbol, parameterization.second.symbol
    heads = {first: set(range(channels)), second: set(range(channels, 2 * channels))}
    if parameterization.blend_weight:
        heads["blend"] = set(range(total))
    ratio = set(range(2 * channels, total))
    if not parameterization.detach:
        # a fixed ratio of 0 or 1 hears one route only
        one = {0.0: heads[first], 1.0: heads[second]}.get(parameterization.ratio)  # type: ignore[arg-type]
        return heads | {"mu": one or set(range(total))}
    return heads | ({"mu": ratio} if parameterization.ratio in LEARNED else {})


def _several(parameterization: Parameterization, channels: int) -> dict[str, set[int]]:
    """Of a class with outputs that nothing is known of: each loss teaches some, and together they teach all."""
    raw, x0, noise, t = batch(parameterization, channels)
    losses = around(raw.requires_grad_(), parameterization, Cosine(T)).loss(x0, t, noise).parts
    slopes = {name: torch.autograd.grad(part.sum(), raw, retain_graph=True)[0] for name, part in losses.items()}
    found = {name: set(slope.abs().sum((0, 2, 3)).nonzero().flatten().tolist()) for name, slope in slopes.items()}
    assert all(found.values())
    assert set.union(*found.values()) == set(range(raw.shape[1]))
    return found


@EVERY
@pytest.mark.parametrize("channels", [1, 3])
def test_each_loss_teaches_its_own_channels_and_no_other(parameterization: Parameterization, channels: int) -> None:
    raw, x0, noise, t = batch(parameterization, channels)
    raw.requires_grad_()
    denoiser = around(raw, parameterization, Cosine(T))
    expected = taught(parameterization, channels)
    losses = denoiser.loss(x0, t, noise).parts
    assert losses.keys() == expected.keys()
    for name, part in losses.items():
        weights = [*denoiser.parameters()]
        slope, *own = torch.autograd.grad(part.sum(), [raw, *weights], retain_graph=True, allow_unused=True)
        moved = set() if slope is None else {c for c in range(raw.shape[1]) if slope[:, c].abs().sum() > 0}
        assert moved == expected[name], name
        for weight, gradient in zip(weights, own, strict=True):
            # a table of ratios is taught by the gate's loss, at the steps that were seen
            seen = torch.zeros_like(weight) if gradient is None else gradient
            assert set(seen.nonzero().flatten().tolist()) == (set(t.tolist()) if name == "mu" else set())


@EVERY
def test_gradients_equal_finite_differences(parameterization: Parameterization) -> None:
    raw, x0, noise, t = batch(parameterization, channels=1, size=2, dtype=torch.float64)
    t = torch.tensor([3, 30])
    expected = taught(parameterization, 1)
    for name, channels in expected.items():
        if not channels or (
            name == "mu" and isinstance(parameterization, Dual) and parameterization.gate == "balanced"
        ):
            channels = {c for c in channels if c >= 2}  # what is detached is invisible to autograd, not to differences
        if not channels:
            continue
        index = sorted(channels)

        def loss(some: Tensor, name: str = name, index: list[int] = index) -> Tensor:
            full = raw.index_copy(1, torch.tensor(index), some)
            return around(full, parameterization, Cosine(T)).loss(x0, t, noise).parts[name]

        assert torch.autograd.gradcheck(loss, raw[:, index].clone().requires_grad_(), eps=1e-6, atol=1e-6)


@EVERY
def test_float32_agrees_with_float64(parameterization: Parameterization) -> None:
    raw, x0, noise, t = batch(parameterization, dtype=torch.float64)
    exact = around(raw, parameterization, Cosine(T)).loss(x0, t, noise)
    single = around(raw.float(), parameterization, Cosine(T)).loss(x0.float(), t, noise.float())
    for name, part in single.parts.items():
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), exact.parts[name], rtol=2e-4, atol=1e-9)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_read_in_float32(parameterization: Parameterization, dtype: torch.dtype) -> None:
    raw, x_t, _, t = batch(parameterization)
    half = around(raw.to(dtype), parameterization, Cosine(T))(x_t.to(dtype), t)
    full = around(raw.to(dtype).float(), parameterization, Cosine(T))(x_t.to(dtype).float(), t)
    assert half.x0.dtype == torch.float32
    torch.testing.assert_close(half.x0, full.x0, rtol=0, atol=0)


@EVERY
def test_a_wrong_output_is_named(parameterization: Parameterization) -> None:
    # four channels an image more than any reading takes
    raw = torch.zeros(2, parameterization.channels(2) + 4, 4, 4)
    with pytest.raises(ValueError, match=r"needs a network output of shape .* got \(2, "):
        around(raw, parameterization, Cosine(T))(torch.zeros(2, 2, 4, 4), 3)
    raw = torch.zeros(1, parameterization.channels(2), 4, 4)
    with pytest.raises(ValueError, match="needs a network output of shape"):
        around(raw, parameterization, Cosine(T))(torch.zeros(2, 2, 4, 4), 3)
    for raw in (torch.zeros(2), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="needs a network output of shape"):
            around(raw, parameterization, Cosine(T))(torch.zeros(2, 2, 4, 4), 3)


@EVERY
def test_mix_is_the_way_it_was_trained(parameterization: Parameterization) -> None:
    assert parameterization.route("mix") == parameterization
