"""Guidance by its formula, from one call of the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import dualout
from dualout.calibrated import Calibrated
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.guidance import ClassifierFree
from dualout.parameterizations import Dual, Epsilon, Karras, Parameterization
from dualout.samplers import DDIM, Heun
from dualout.schedules import Cosine

T, NULL = 50, 10
calls: list[int] = []


def network(x: Tensor, t: Tensor, label: Tensor, strength: float = 1.0) -> Tensor:
    calls.append(len(x))
    pull = torch.sin(label.to(x.dtype)).view(-1, 1, 1, 1) * strength
    return torch.cat([torch.tanh(x + pull), pull - x, x[:, :1] * pull], 1)


def both(parameterization: Parameterization | None = None) -> tuple[Denoiser, Tensor, Tensor]:
    denoiser = Denoiser(network, parameterization or Dual(), Cosine(T))
    return denoiser, torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 4, 7])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("t", [7, torch.tensor(7), torch.tensor([0, 7, 49])], ids=["int", "scalar", "batch"])
def test_the_formula(scale: float, t: int | Tensor) -> None:
    denoiser, x, label = both()
    given, none = denoiser(x, t, label=label), denoiser(x, t, label=torch.full((3,), NULL))
    calls.clear()
    p = ClassifierFree(denoiser, scale, label=NULL)(x, t, label=label)
    assert calls == [6]
    torch.testing.assert_close(p.x0, none.x0 + scale * (given.x0 - none.x0), rtol=1e-10, atol=1e-10)
    # at a fixed x_t, guiding x0 is guiding eps
    torch.testing.assert_close(p.eps, none.eps + scale * (given.eps - none.eps), rtol=1e-9, atol=1e-9)
    assert torch.equal(p.x_t, x)
    for name, part in given.parts.items():
        torch.testing.assert_close(p.parts[name], part)


def test_scales_0_and_1_are_exact() -> None:
    denoiser, x, label = both()
    given, none = denoiser(x, 7, label=label), denoiser(x, 7, label=torch.full((3,), NULL))
    assert torch.equal(ClassifierFree(denoiser, 1, label=NULL)(x, 7, label=label).x0, given.x0)
    assert torch.equal(ClassifierFree(denoiser, 0, label=NULL)(x, 7, label=label).x0, none.x0)


def test_it_is_a_denoiser_to_samplers_and_to_itself() -> None:
    denoiser, x, label = both()
    guided = ClassifierFree(denoiser, 2.0, label=NULL)
    assert guided.schedule == denoiser.schedule
    for sampler in (DDIM(steps=4), Heun(steps=3)):
        calls.clear()
        ends = sampler.sample(guided, x, label=label)
        assert len(calls) == sampler.evaluations
        for b in range(3):
            one = sampler.sample(guided, x[b : b + 1], label=label[b : b + 1])
            torch.testing.assert_close(one, ends[b : b + 1], rtol=1e-10, atol=1e-10)
    # 1 + (2 − 1)·… twice over is the formula once more
    twice = ClassifierFree(guided, 1.0, label=NULL)(x, 7, label=label)
    torch.testing.assert_close(twice.x0, guided(x, 7, label=label).x0)


def test_other_conditions_are_the_same_for_both() -> None:
    denoiser, x, label = both()
    guided = ClassifierFree(denoiser, 0.0, label=NULL)
    expected = denoiser(x, 7, label=torch.full((3,), NULL), strength=3.0)
    torch.testing.assert_close(guided(x, 7, label=label, strength=3.0).x0, expected.x0)


def test_a_null_of_one_row_is_spread() -> None:
    def embedded(x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        return x * words.mean((1, 2)).view(-1, 1, 1, 1)

    denoiser, x = Denoiser(embedded, Epsilon(), Cosine(T)), torch.randn(3, 2, 4, 4)
    words, null = torch.randn(3, 5, 6), torch.zeros(1, 5, 6)
    p = ClassifierFree(denoiser, 0.0, words=null)(x, 7, words=words)
    torch.testing.assert_close(p.x0, denoiser(x, 7, words=null.expand(3, 5, 6)).x0)


def test_a_null_is_as_precise_as_what_it_stands_beside() -> None:
    told: list[torch.dtype] = []

    def embedded(x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        told.append(words.dtype)
        return x * words.mean(1).to(x.dtype).view(-1, 1, 1, 1)

    x, null = torch.randn(3, 2, 4, 4), torch.zeros(1, 6, dtype=torch.float64)
    guided = ClassifierFree(Denoiser(embedded, Epsilon(), Cosine(T)), 2.0, words=null)
    for dtype in (torch.float32, torch.bfloat16):
        guided(x, 7, words=torch.ones(3, 6).to(dtype))
        assert told.pop() == dtype


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_image_may_have_a_time_step_of_its_own(count: int) -> None:
    denoiser, x, label = both()
    guided, t = ClassifierFree(denoiser, 2.5, label=NULL), torch.tensor([3, 9, 40])
    together = guided(x[:count], t[:count], label=label[:count])
    for b in range(count):
        alone = guided(x[b : b + 1], int(t[b]), label=label[b : b + 1])
        torch.testing.assert_close(together.x0[b : b + 1], alone.x0)
        torch.testing.assert_close(together.eps[b : b + 1], alone.eps)


def test_levels_stay_right_for_every_parameterization() -> None:
    label = torch.tensor([1, 2, 3])
    for parameterization in (Epsilon(), Karras()):
        denoiser = Denoiser(lambda x, t, label: network(x, t, label)[:, :2], parameterization, Cosine(T))
        p = ClassifierFree(denoiser, 1.5, label=NULL)(torch.randn(3, 2, 4, 4), torch.tensor([3, 9, 40]), label=label)
        torch.testing.assert_close(p.level.alpha * p.x0 + p.level.sigma * p.eps, p.x_t)
        assert p.level.alpha.shape == (3, 1, 1, 1)  # type: ignore[union-attr]


def test_calibrated_beliefs_are_guided_in_noise_as_in_images() -> None:
    # a calibration corrects x_t too, each belief's own, and eps follows from x0 and x_t
    denoiser, x, label = both()
    values = {"x0_scale": [0.9], "eps_scale": [1.2], "ratio_gain": [2.0], "ratio_shift": [0.5]}
    calibrated = Calibrated(denoiser, [7], values)
    given, none = calibrated(x, 7, label=label), calibrated(x, 7, label=torch.full((3,), NULL))
    p = ClassifierFree(calibrated, 2.5, label=NULL)(x, 7, label=label)
    for name in ("x0", "eps", "x_t"):
        a, b = getattr(none, name), getattr(given, name)
        torch.testing.assert_close(getattr(p, name), a + 2.5 * (b - a), rtol=1e-9, atol=1e-9)
    # the ratio that it corrects is of one belief, and what is guided is of two
    with pytest.raises(InputError, match="guidance goes around a calibration"):
        Calibrated(ClassifierFree(denoiser, 2.5, label=NULL), [7], values)


LEVELS = [float(s / a) for a, s in map(Cosine(T).scalars, range(T))]
WITHIN = (LEVELS[10], LEVELS[30])


def test_an_interval_of_noise_levels_alone_is_guided() -> None:
    denoiser, x, label = both()
    everywhere, within = (ClassifierFree(denoiser, 2.5, interval=i, label=NULL) for i in (None, WITHIN))
    # above the first, up to the second
    for t, inside in ((5, False), (10, False), (11, True), (30, True), (31, False)):
        calls.clear()
        p = within(x, t, label=label)
        assert (calls, within.guides(t)) == ([6 if inside else 3], inside)
        assert torch.equal(p.x0, (everywhere if inside else denoiser)(x, t, label=label).x0)
    # a time step for each image: each as it would be alone
    together = within(x, torch.tensor([10, 11, 31]), label=label)
    for b, t in enumerate((10, 11, 31)):
        alone = within(x[b : b + 1], t, label=label[b : b + 1])
        torch.testing.assert_close(together.x0[b : b + 1], alone.x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(within(x, torch.tensor(11), label=label).x0, everywhere(x, 11, label=label).x0)
    from_none = ClassifierFree(denoiser, 2.5, interval=(0, LEVELS[10]), label=NULL)
    assert [from_none.guides(t) for t in (0, 10, 11)] == [True, True, False]


def test_a_trend_is_followed_by_both_beliefs_into_the_interval() -> None:
    # x0_trend needs the step before, of a batch of both; outside of the interval it is there, and does not count
    denoiser, x, label = both()
    times = [40, 20, 5]
    values = {"x0_trend": [0.0, 0.4, 0.7], "eps_scale": [1.1, 1.2, 0.9]}
    both_ways = ClassifierFree(Calibrated(denoiser, times, values), 2.5, interval=WITHIN, label=NULL)
    given = Calibrated(denoiser, times, values)
    none = Calibrated(denoiser, times, values)
    for t in times:
        calls.clear()
        p, a = both_ways(x, t, label=label), given(x, t, label=label)
        b = none(x, t, label=torch.full((3,), NULL))
        assert calls[0] == 6
        expected = b.x0 + 2.5 * (a.x0 - b.x0) if t == 20 else a.x0
        torch.testing.assert_close(p.x0, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("interval", [(2.0, 1.0), (1.0, 1.0), (-1.0, 2.0), (0.0, float("nan")), (1.0,), "ab", 3.0])
def test_an_interval_is_two_rising_levels(interval: object) -> None:
    denoiser, *_ = both()
    with pytest.raises(InputError, match="an interval of guidance"):
        ClassifierFree(denoiser, 2.0, interval=interval, label=NULL)  # type: ignore[arg-type]


def test_what_is_missing_is_named() -> None:
    denoiser, x, _ = both()
    with pytest.raises(InputError, match="what stands for no condition"):
        ClassifierFree(denoiser, 2.0)
    with pytest.raises(InputError, match="needs the condition label"):
        ClassifierFree(denoiser, 2.0, label=NULL)(x, 7)
    with pytest.raises(InputError, match="wraps a denoiser, which has a schedule; got Conv2d"):
        ClassifierFree(torch.nn.Conv2d(1, 1, 1), 2.0, label=NULL)
    assert dualout.ClassifierFree is ClassifierFree


def test_a_condition_that_cannot_be_left_out_is_not_taken_for_guided() -> None:
    denoiser, x, label = both()
    guided = ClassifierFree(denoiser, 3.0, label=NULL)
    for one in (4, torch.tensor(4), [0, 4, 7]):
        with pytest.raises(InputError, match="label is a tensor with a row an image"):
            guided(x, 7, label=one)
    # what there is no null of is the same on both sides, a number too
    p = guided(x, 7, label=label, strength=torch.tensor(0.5))
    torch.testing.assert_close(p.x0, guided(x, 7, label=label, strength=0.5).x0)


def test_conditions_have_a_row_an_image_or_are_for_all() -> None:
    denoiser, x, label = both()
    guided = ClassifierFree(denoiser, 3.0, label=NULL)
    for one in (label[:1], label[:2], label.repeat(2)):
        with pytest.raises(InputError, match="label has a row for each of 3 images"):
            guided(x, 7, label=one)
    # a row for all images
    strength = torch.full((1, 1, 1, 1), 0.5)
    torch.testing.assert_close(
        guided(x, 7, label=label, strength=strength).x0, guided(x, 7, label=label, strength=0.5).x0
    )
    with pytest.raises(InputError, match=r"no label, \(2,\), is one row of \(3,\)"):
        ClassifierFree(denoiser, 3.0, label=torch.tensor([NULL, NULL]))(x, 7, label=label)
    for nothing in (None, "none"):
        with pytest.raises(InputError, match="no label is a number or a tensor"):
            ClassifierFree(denoiser, 3.0, label=nothing)  # type: ignore[arg-type]
    for scale in ("x", float("nan"), float("inf"), torch.tensor([1.0, 2.0])):
        with pytest.raises(InputError, match="the scale of guidance is a number"):
            ClassifierFree(denoiser, scale, label=NULL)  # type: ignore[arg-type]


def test_one_time_step_for_all_may_be_a_tensor_of_one() -> None:
    denoiser, x, label = both()
    guided = ClassifierFree(denoiser, 3.0, label=NULL)
    for t in (np.int64(7), torch.tensor(7), torch.tensor([7])):
        torch.testing.assert_close(guided(x, t, label=label).x0, guided(x, 7, label=label).x0)  # type: ignore[arg-type]
