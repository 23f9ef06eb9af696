"""Where the gate of an upgrade opens, and the noised images that decide."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import dualout
from dualout.data.dataset import Dataset
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.parameterizations import (
    Upgraded,
    Velocity,
)
from dualout.training import noised, opening
from dualout.training.upgrade import (
    gate_logits,
    new_rows,
    open_gate,
    output_layer,
    upgrade,
    upgraded_of,
)
from upgradable import CPU, SCHEDULE, SOURCE, noises, noisy, trained


def errors_of(eps: Tensor, x0: Tensor) -> opening.Errors:
    """From the two routes' errors, (bins, images, pixels)."""
    step = eps - x0
    return opening.Errors(eps.square().mean(2), (eps * step).mean(2), step.square().mean(2))


def test_the_blends_error_and_best_ratio_are_those_written_out() -> None:
    a, b = torch.randn(2, 3, 8, 20, dtype=torch.float64)
    errors = errors_of(a, 2 * b)
    for r in (0.0, 0.3, 1.0):
        torch.testing.assert_close(errors.of(r), ((1 - r) * a + r * 2 * b).square().mean(2))
    best = errors.best(slice(None))
    least = errors.of(best).mean(1)
    for r in np.linspace(0, 1, 101):
        assert (errors.of(float(r)).mean(1) >= least - 1e-12).all()
    # no further than either route: half of an error, or more than all, or no difference at all
    for x0, ratio in ((0.5 * a, 1.0), (2.0 * a, 0.0), (a, 0.0)):
        assert (errors_of(a, x0).best(slice(None)) == ratio).all()


@pytest.mark.parametrize("closed", [0.0, 1.0])
def test_the_gate_never_opens_where_the_new_route_does_not_help(closed) -> None:
    generator = torch.Generator().manual_seed(1)
    good = torch.randn(200, 64, 30, generator=generator, dtype=torch.float64)
    worse = good + torch.randn(200, 64, 30, generator=generator, dtype=torch.float64)
    # the new route is the trained one with more noise, so that every blend errs more
    eps, x0 = (good, worse) if closed == 0 else (worse, good)
    assert sum(r != closed for r in opening.opened(errors_of(eps, x0), closed)) == 0
    # an exact route needs no help, and a copy gives none
    assert opening.opened(errors_of(good * 0, good), 0.0) == [0.0] * 200
    assert opening.opened(errors_of(good, good), closed) == [closed] * 200


@pytest.mark.parametrize("helped", [0, 1])
def test_what_helps_every_other_image_only_is_taken_for_chance(helped) -> None:
    good, bad = torch.ones(1, 60, 4, dtype=torch.float64), torch.full((1, 60, 4), 2.0, dtype=torch.float64)
    trained, new = good.clone(), bad.clone()
    trained[:, helped::2], new[:, helped::2] = 10.0, 0.0
    assert opening.opened(errors_of(trained, new), 0.0) == [0.0]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("other", "ratio"), [(-9.0, 0.0), (-0.5, 2.5 / 3.25)])
def test_a_ratio_has_to_help_images_that_it_was_not_found_with(other, ratio, first) -> None:
    # the trained route errs by 1; half of the images want all of the new one, the others 1 / 10 or 2 / 3 of it
    trained = torch.ones(1, 60, 4, dtype=torch.float64)
    new = torch.zeros_like(trained)
    new[:, first::2] = other
    # at 1 the others err by 81 or 1 / 4; what both are given follows from all
    assert opening.opened(errors_of(trained, new), 0.0) == [pytest.approx(ratio)]


@pytest.mark.parametrize(("there", "opens"), [(0.0, True), (3.0, False)])
def test_one_time_steps_error_does_not_hide_what_helps_all_others(there, opens) -> None:
    # as at the end of a cosine schedule: of 64 images two, one in each half, are at a time step that errs far more
    generator = torch.Generator().manual_seed(1)
    trained, new = torch.randn(2, 1, 64, 50, generator=generator, dtype=torch.float64)
    trained[:, :2] *= 1e3
    new = torch.cat([there * trained[:, :2], 0.5 * new[:, 2:]], 1)
    assert (opening.opened(errors_of(trained, new), 0.0) != [0.0]) == opens


@pytest.mark.parametrize(("helped", "opens"), [(3, False), (4, True)])
def test_the_gate_opens_beyond_two_standard_errors(helped, opens) -> None:
    # what helps k of n images by as much lies √(k·(n − 1) / (n − k)) standard errors from none, n in each half
    trained = torch.zeros(1, 200, 4, dtype=torch.float64)
    trained[:, : 2 * helped] = 1.0
    assert (helped * 99 / (100 - helped)) ** 0.5 == pytest.approx(2, abs=0.3)
    assert opening.opened(errors_of(trained, 0 * trained), 0.0) == [float(opens)]
    assert opening.opened(errors_of(0 * trained, trained), 1.0) == [1.0 - opens]


def test_the_gate_opens_at_the_optimum_where_it_helps() -> None:
    a, b = torch.randn(2, 5, 200, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.tensor([0.2, 0.5, 1.0, 2.0, 100.0], dtype=torch.float64).view(-1, 1, 1)
    ratios = opening.opened(errors_of(scale * a, b), 0.0)
    # independent errors: inverse-variance weighting
    expected = (scale**2 / (scale**2 + 1)).flatten()
    torch.testing.assert_close(torch.tensor(ratios, dtype=torch.float64), expected, rtol=0, atol=0.03)


def test_the_table_is_exact_where_the_gate_is_closed_and_can_learn_where_it_is_open() -> None:
    for closed in (0.0, 1.0):
        ratios = opening.table([closed, 0.25, 1 - closed], 10, closed).sigmoid()
        assert (ratios[:3] == closed).all()
        torch.testing.assert_close(ratios[3:7], torch.full((4,), 0.25))
        assert ((ratios[7:] > 0) & (ratios[7:] < 1)).all()
        torch.testing.assert_close(ratios[7:], torch.full((3,), 1 - closed), rtol=0, atol=1e-5)


@SOURCE
def test_an_opened_gate_blends_where_it_is_open_and_nowhere_else(source, tmp_path) -> None:
    before = trained(source)
    after = upgrade(before)
    layer = after.network.get_submodule(output_layer(after.network))
    with torch.no_grad():
        layer.weight[new_rows(after)[:1]] = 0.1
    closed = upgraded_of(after).closed
    opened = open_gate(after, [closed, 0.25])
    opened.save_pretrained(tmp_path / "open")
    for d in (opened, Denoiser.from_pretrained(tmp_path / "open")):
        x = noises()
        with torch.no_grad():
            assert torch.equal(d(x, 50).x0, before(x, 50).x0)
            p = d(x, 150)
            torch.testing.assert_close(p.x0, d.route(0.25)(x, 150).x0, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(d.route(closed)(x, 150).x0, before(x, 150).x0, rtol=0, atol=0)
            assert not torch.equal(p.x0, before(x, 150).x0)
    assert open_gate(after, [closed, closed]) is after
    with pytest.raises(InputError, match="this is not an upgraded model, but one of"):
        upgraded_of(before)
    assert gate_logits(opened).shape == (200,)


def test_the_standard_error_of_two_is_half_of_what_is_between_them() -> None:
    assert opening.standard_error(torch.tensor([[0.0, 2.0], [1.0, 1.0]])).tolist() == [1.0, 0.0]


def test_worse_and_score() -> None:
    before = torch.rand(4, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    now = before * torch.tensor([0.5, 1.0, 1.001, 1.5], dtype=torch.float64)[:, None]
    assert opening.worse(now, before) == [2, 3]
    # by half and by a tenth of a per cent more than is tolerated
    assert opening.worse(now, before, 0.0005) == [2, 3]
    assert opening.worse(now, before, 0.0011) == [3]
    # the same numbers, rounded differently
    assert opening.worse(before * (1 + 1e-13), before) == []
    # by two and a half and by three and a half standard errors
    around = torch.ones(2, 100, dtype=torch.float64)
    around[:, ::2] = -1
    more = around + torch.tensor([[0.25], [0.35]], dtype=torch.float64)
    assert opening.worse(before[:2] + more, before[:2]) == [1]
    assert opening.score(now, before) == pytest.approx((math.log(0.5) + math.log(1.001) + math.log(1.5)) / 4)
    # of the mean error in each bin, not of each image's
    some = torch.tensor([[1.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    assert opening.score(some, torch.tensor([[2.0, 2.0], [1.0, 1.0]]).double()) == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("closed", [0.0, 1.0])
def test_a_look_says_where_the_gate_opens_and_what_each_route_errs_by(closed) -> None:
    generator = torch.Generator().manual_seed(0)
    trained, new = torch.randn(2, 2, 100, 30, generator=generator, dtype=torch.float64)
    new[0] += trained[0]  # no help
    eps, x0 = (trained, new) if closed == 0 else (new, trained)
    errors, before = errors_of(eps, x0), 2 * trained.square().mean(2)
    found = opening.look(errors, before, closed, 9)
    assert [(row["t"], row["open"]) for row in found.rows] == [("0–3", False), ("4–8", True)]
    for row, ratio, a, b, old in zip(found.rows, found.ratios, eps, x0, before, strict=True):
        assert row["ratio"] == ratio
        told = a.square().mean(), b.square().mean(), ((1 - ratio) * a + ratio * b).square().mean(), old.mean()
        assert [row[name] for name in ("eps", "x0", "after", "before")] == pytest.approx([float(v) for v in told])
    assert found.ratios == [closed, pytest.approx(0.5, abs=0.05)]
    assert found.score == pytest.approx(sum(math.log(r["after"] / r["before"]) for r in found.rows) / 2)
    assert opening.look(errors, before, closed, 9, shut=True).ratios == [closed] * 2


def test_measured_errors_are_those_of_the_routes() -> None:
    after = upgrade(trained(Velocity()))
    with torch.no_grad():
        # a new route that says something
        after.network.get_submodule(output_layer(after.network)).weight[new_rows(after)] = 0.1
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    stream = noised.Stream(Dataset("x", images, "nhw"), np.arange(20), noised.Bins(200, 4, 0), CPU)
    errors = opening.measure(after, stream, 4)
    assert errors.eps.shape == (4, 20)
    for b, batch in enumerate(stream):
        assert batch.bin == b
        assert ((batch.t >= 50 * b) & (batch.t < 50 * (b + 1))).all()
        for ratio in (0.0, 0.4, 1.0):
            p = after.route(ratio)(noisy(batch), batch.t)
            error = (p.x0 - batch.x0).double().square().flatten(1).mean(1)
            torch.testing.assert_close(errors.of(ratio)[b], error, rtol=1e-5, atol=0)
    again = opening.measure(after, stream, 4)
    assert torch.equal(again.along, errors.along)


def test_small_errors_of_the_new_route_are_found_beside_large_ones_of_the_old() -> None:
    # one that is nearly right where the old one is far off, as eps is at high noise: a difference of large numbers
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    (batch,) = noised.Stream(Dataset("x", images, "nhw"), np.arange(4), noised.Bins(200, 1, 0), CPU)
    batch = batch._replace(t=torch.full((4,), 199))
    off = 1e-3 * dualout.noise(range(4), (1, 8, 8))
    raw = torch.cat([torch.zeros_like(off), batch.x0 + off, torch.zeros_like(off)], 1)
    found = opening.measure(Denoiser(lambda *_: raw, Upgraded(), SCHEDULE), [batch], 1)
    assert (found.of(0.0) > 1000).all()
    expected = (batch.x0 + off - batch.x0).double().square().flatten(1).mean(1)
    torch.testing.assert_close(found.of(1.0)[0], expected, rtol=1e-5, atol=0)


def test_times_and_noise_are_an_images_own_in_each_bin() -> None:
    x0, rows = torch.zeros(2000, 1, 2, 2), np.arange(2000)

    def draw(bin: int | np.ndarray = 0, some: slice = slice(None), number: int = 0, seed: int = 0) -> noised.Noised:
        return noised.Bins(10, 2, seed).draw(bin, x0[some], rows[some], number, {})

    batch = draw()
    # every time of the bin as often
    assert batch.t.bincount().tolist() == pytest.approx([400] * 5, abs=100)
    assert set(draw(1).t.tolist()) == {5, 6, 7, 8, 9}
    # not of its batch, and each in the bin that is asked for
    part = draw(some=slice(30, 40))
    assert torch.equal(part.t, batch.t[30:40])
    assert torch.equal(part.noise, batch.noise[30:40])
    mixed = draw(rows % 2)
    assert torch.equal(mixed.t >= 5, torch.from_numpy(rows % 2 == 1))
    assert torch.equal(mixed.t[::2], batch.t[::2])
    for other in (draw(number=1), draw(seed=1)):
        assert not torch.equal(other.t, batch.t)
        assert not (other.noise == batch.noise).any()


def test_an_order_is_of_all_and_follows_the_seed() -> None:
    first, again, other = (noised.shuffled(50, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(50)) != first


@pytest.mark.parametrize(("images", "size"), [(1280, 64), (256, 12), (20, 1), (7, 1)])
def test_few_images_are_spread_over_all_bins(images: int, size: int) -> None:
    data = Dataset("x", np.zeros((images, 2, 2), np.uint8), "nhw")
    stream = noised.Stream(data, np.arange(images), noised.Bins(200, 20, 0), CPU, each=False)
    batches = list(stream)
    assert {b.bin for b in batches} == set(range(min(images, 20)))
    assert max(len(b.x0) for b in batches) == size
    assert sum(len(b.x0) for b in batches) == images
    assert len(stream) == len(batches)


@pytest.mark.parametrize("each", [True, False])
def test_the_images_that_are_looked_at(each) -> None:
    images = np.arange(20, dtype=np.uint8).repeat(64).reshape(20, 8, 8)
    dataset = Dataset("x", images, "nhw", labels=torch.arange(20) % 5, classes=tuple("abcde"))
    rows = np.array([7, 0, 3, 19, 12, 5, 8])
    stream = noised.Stream(dataset, rows, noised.Bins(200, 2, 0), CPU, conditional=True, each=each, batch_size=3)
    seen = [(b.bin, ((b.x0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()) for b in stream]
    blocks = [[7, 0, 3], [19, 12, 5], [8]]
    assert seen == (
        [(b, rows) for b in (0, 1) for rows in blocks] if each else list(zip([0, 1, 0], blocks, strict=True))
    )
    assert len(stream) == len(seen)
    for batch, (b, rows) in zip(stream, seen, strict=True):
        assert batch.conditions["class_labels"].tolist() == [row % 5 for row in rows]
        assert ((batch.t >= 100 * b) & (batch.t < 100 * (b + 1))).all()
    # other noise each time that an image is looked at, and no classes for a network that is told none
    looks = [noise for batch in stream for noise in batch.noise]
    assert len(torch.stack(looks).unique(dim=0)) == len(looks)
    assert not any(b.conditions for b in noised.Stream(dataset, np.arange(20), noised.Bins(200, 2, 0), CPU))
