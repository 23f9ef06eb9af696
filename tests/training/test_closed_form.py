"""The closed form for a network and images of one's own: it agrees with the command, and with least squares by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout.data import pixels
from dualout.denoiser import Denoiser
from dualout.networks import adapted, build
from dualout.parameterizations import CleanImage, Epsilon, Flow, LearnedVariance, Velocity
from dualout.samplers import DDIM, DPMSolver
from dualout.training import closed_form, noised, opening, readout
from dualout.training.closed_form import fit
from dualout.training.given import Given
from dualout.training.upgrade import upgrade, upgraded_of
from dualout.training.upgrade_config import UpgradeConfig
from dualout.training.upgrade_run import Upgrade
from fitted import LATENTS, SCHEDULE, Toy, fitted, images, text_unet, toy, weights


def test_it_agrees_with_the_command_on_the_same_images(tmp_path) -> None:
    torch.manual_seed(0)
    # of v, whose errors do not depend on t as much as those of eps within a bin
    source = Denoiser(build("tiny:width=8", 1, 8, 1), Velocity(), dualout.schedules.Linear()).eval()
    source.save_pretrained(tmp_path / "source")
    config = UpgradeConfig(
        source=str(tmp_path / "source"), data="digits", bins=4, held_out=64, images=256, device="cpu",
        out=str(tmp_path / "out"),
    )  # fmt: skip
    with Upgrade(config) as work:
        *_, check = work
        dataset = work.dataset
    order = noised.shuffled(len(dataset), 0)
    found = fit(upgrade(source), pixels.to_model(dataset.batch(order)).split(64), held_out=64, images=256, bins=4)
    assert found.images == 256
    assert found.held_out == 64
    assert found.score == pytest.approx(check.score, abs=0.1)
    for ours, theirs in zip(found.table, check.rows, strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["t"], ours["open"]) == (theirs["t"], theirs["open"])
        assert ours["ratio"] == pytest.approx(theirs["ratio"], abs=0.05)
        for error in ("before", "eps", "x0", "after"):
            assert ours[error] == pytest.approx(theirs[error], rel=0.1), (ours["t"], error)


@pytest.mark.parametrize("source", [Epsilon(), CleanImage()], ids=lambda p: p.spec)
def test_it_is_least_squares(source, monkeypatch) -> None:
    denoiser, x = toy(source), images()
    written: list[Tensor] = []
    monkeypatch.setattr(readout, "write_rows", lambda _, __, solution: written.append(solution[:, 0]))
    network: Any = denoiser.network
    seen: list[tuple[Tensor, Tensor]] = []

    def batches() -> Iterator[Tensor]:
        for batch in x.split(16):
            yield batch
            # the last look before the next batch is asked for is the one at this
            seen.append(network.calls[-1])

    # of one bin: its weight does not matter
    fitted(denoiser, batches(), bins=1, pixels=36)
    seen = seen[2:]
    x_t, t, x0 = torch.cat([x for x, _ in seen]), torch.cat([t for _, t in seen]), x[32:]
    with torch.no_grad():
        h = torch.tanh(network.features(x_t) + 0.01 * t.view(-1, 1, 1, 1))
    level = SCHEDULE.level(t).like(x0)
    y = (x_t - level.alpha * x0) / level.sigma if source.name == "x0" else x0
    phi = nn.functional.unfold(h, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    phi = torch.cat([phi, torch.ones(len(phi), 1)], 1)
    by_hand = torch.linalg.lstsq(phi, y.flatten()[:, None].double()).solution[:, 0]
    (rows,) = written
    torch.testing.assert_close(rows, by_hand, rtol=1e-3, atol=1e-4)
    # in each quarter of t
    assert (t // 50).bincount().min() >= 8


def test_each_bin_gets_as_many_images_in_any_order_of_them() -> None:
    def seen(seed: int) -> tuple[Tensor, Tensor]:
        denoiser, looks = toy(), []
        network: Any = denoiser.network

        def batches() -> Iterator[Tensor]:
            for batch in images(352).split(32):
                yield batch
                looks.append(network.calls[-1])

        fitted(denoiser, batches(), seed=seed)
        x_t, t = (torch.cat(part) for part in zip(*looks[1:], strict=True))
        return x_t, t

    x_t, t = seen(0)
    bins = (t // 50).view(-1, 4)
    # every four images are one of each bin, and of every fourth image, which may be one class, there are some in each
    assert bins.sort(1).values.eq(torch.arange(4)).all()
    assert bins[:, 0].bincount(minlength=4).min() > 8
    # bins, and times within them, are those of the seed
    assert torch.equal(seen(0)[0], x_t)
    _, other = seen(1)
    same = other // 50 == t // 50
    assert 0.15 < same.double().mean() < 0.35
    assert (other == t)[same].double().mean() < 0.1


def test_the_network_looks_at_each_batch_once_and_decides_by_other_noise() -> None:
    denoiser, x = toy(), images(96)
    network: Any = denoiser.network
    network.calls.clear()
    # the images that decide are those of the fit, with other noise
    fitted(denoiser, x.split(16), held_out=list(x.split(16)), bins=1)
    # one call without noise, which shows whether it can be called, six to decide and six to fit
    assert len({x_t.numpy().tobytes() for x_t, _ in network.calls}) == 1 + 6 + 6


def test_an_image_that_decides_has_noise_of_its_own_in_each_bin() -> None:
    x0, bins = images(5), noised.Bins(200, 2, 0)
    first, second = (Given(3, x0, {}).noised(b, bins).noise for b in (0, 1))
    assert not (first == second).any()
    # which is that of its number, in whatever batch
    assert torch.equal(Given(5, x0[2:], {}).noised(0, bins).noise, first[2:])


@pytest.mark.parametrize("source", [Epsilon(), CleanImage()], ids=lambda p: p.spec)
def test_the_new_rows_are_weighed_by_the_trained_outputs_error_in_their_own_units(source, monkeypatch) -> None:
    given: list[Tensor] = []
    blended = readout.Moments.solve_blended
    monkeypatch.setattr(
        readout.Moments, "solve_blended", lambda self, trained: given.append(trained) or blended(self, trained)
    )
    denoiser, x0, eps = toy(source), images(40), dualout.noise(range(40), (1, 6, 6))
    t, bin = torch.arange(40) * 5, torch.arange(40) // 10
    # what the trained output says is off by these errors of the noise, hence of the image by sigma / alpha as much
    errors = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    alpha, sigma = SCHEDULE.tables()
    times = range(0, 200, 50)
    size = torch.stack([(sigma / alpha)[a : a + 50].square().reciprocal().mean().reciprocal() for a in times])
    before = (errors * size)[:, None] * torch.tensor([0.5, 1.5], dtype=torch.float64)
    closed_form.solve(denoiser, [noised.Noised(bin, x0, t, eps, {})], before, 1, pixels=36, seed=0)
    torch.testing.assert_close(given[0], errors if source.name == "x0" else errors * size)
    assert weights(denoiser)[0].any()


def test_so_many_positions_are_looked_at_and_the_seed_says_which() -> None:
    def rows(**options: int) -> Tensor:
        denoiser, x0, eps = toy(), images(40), dualout.noise(range(40), (1, 6, 6))
        batch = noised.Noised(0, x0, torch.arange(40) * 5, eps, {})
        before = torch.ones(1, 40, dtype=torch.float64)
        closed_form.solve(denoiser, [batch], before, 1, **({"pixels": 9, "seed": 0} | options))
        return weights(denoiser)

    assert torch.equal(rows(), rows())
    assert not torch.equal(rows(), rows(seed=1))
    assert not torch.equal(rows(), rows(pixels=36))


def test_sixteen_images_decide_and_as_many_are_fitted_to() -> None:
    schedule = dualout.schedules.Linear(16, 5e-3, 0.4)
    denoiser = upgrade(Denoiser(Toy(), Epsilon(), schedule), layer="last")
    # one bin a time step, and one image in each
    found = fitted(denoiser, images(32).split(16), held_out=16, bins=16)
    assert (found.held_out, found.images, len(found.table)) == (16, 16, 16)


SOURCES = [Epsilon(), CleanImage(), Velocity(), Flow(), LearnedVariance(), LearnedVariance(Velocity())]


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.spec)
@pytest.mark.filterwarnings("ignore:this network learned a variance")
def test_it_errs_nowhere_more_and_the_trained_output_is_kept(source, tmp_path) -> None:
    torch.manual_seed(0)
    network = build("tiny:width=8", 1, 8, source.channels(1))
    before = Denoiser(network, source, SCHEDULE).eval()
    found = fitted(upgrade(before), images(96, 1, 8, 8).split(16))
    assert found.score < 0
    assert 0 < found.open == sum(row["open"] for row in found.table)
    assert all(row["after"] <= row["before"] * (1 + 1e-9) for row in found.table)
    after, closed = found.denoiser, upgraded_of(found.denoiser).closed
    x, t = dualout.noise(range(4), (1, 8, 8)), torch.tensor([1, 60, 120, 199])
    with torch.no_grad():
        assert torch.equal(after.route(closed)(x, t).x0, before(x, t).x0)
    # the errors are those of images that were not seen before, too
    x0, eps = images(248, 1, 8, 8)[96:], dualout.noise(range(5000, 5152), (1, 8, 8))
    for b, row in enumerate(found.table):
        t = torch.arange(len(x0)) % 50 + 50 * b
        level = SCHEDULE.level(t).like(x0)
        with torch.no_grad():
            error = (after(level.alpha * x0 + level.sigma * eps, t).x0 - x0).square().mean()
        assert float(error) == pytest.approx(row["after"], rel=0.35)
    after.save_pretrained(tmp_path)
    loaded = Denoiser.from_pretrained(tmp_path)
    assert torch.equal(DDIM(3).sample(loaded, x), DDIM(3).sample(after, x))
    assert loaded.card["training"]["gate open in"] == f"{found.open} of 4 parts of the noise levels"


def test_the_gate_stays_shut_where_the_trained_output_is_the_best_there_is() -> None:
    # of white noise, alpha·x_t is the mean: a velocity of zero says so
    before = Denoiser(Toy(), Velocity(), SCHEDULE).eval()
    for p in before.network.last.parameters():  # type: ignore[union-attr]
        nn.init.zeros_(p)
    both = upgrade(before, layer="last")
    card = dict(both.card)
    found = fitted(both, dualout.noise(range(300), (1, 6, 6)).split(30), held_out=60)
    assert found.denoiser is both
    assert both.card == card
    assert (found.open, found.score) == (0, 0)
    assert all(row["after"] == row["before"] == row["eps"] for row in found.table)
    assert not weights(both).any()
    x = dualout.noise(range(3), (1, 6, 6))
    for sampler in (DDIM(steps=4), DPMSolver(steps=3)):
        assert torch.equal(sampler.sample(found.denoiser, x), sampler.sample(before, x))


def test_a_trained_output_that_got_worse_is_seen(monkeypatch) -> None:
    # rounding, say: whatever makes the result err more, the rows are put back
    both = toy()
    monkeypatch.setattr(opening, "worse", lambda *_: [1])
    found = fitted(both, images().split(16))
    assert found.denoiser is both
    assert not weights(both).any()


def class_dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, num_layers=1, sample_size=8,
        patch_size=2, norm_num_groups=1, num_embeds_ada_norm=10,
    )  # fmt: skip
    nn.init.normal_(network.proj_out_1.weight, std=0.2)
    return adapted(network, SCHEDULE)


TOLD = {
    "text": (text_unet, {"encoder_hidden_states": dualout.noise(range(96), (5, 8))}),
    "classes": (class_dit, {"class_labels": torch.arange(96) % 10}),
}


@pytest.mark.parametrize(("make", "told"), TOLD.values(), ids=TOLD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_that_are_told_something(make: Callable[[], nn.Module], told, dtype) -> None:
    before = Denoiser(make().to(dtype), Epsilon(), SCHEDULE).eval()
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in told.items()}
    batches = [(LATENTS[i : i + 16], {k: v[i : i + 16] for k, v in cast.items()}) for i in range(0, 96, 16)]
    found = fitted(upgrade(before), iter(batches))
    assert found.open > 0
    assert found.score < -0.3
    some, x = {k: v[:4] for k, v in cast.items()}, dualout.noise(range(4), (2, 8, 8))
    samples = DDIM(4, clip=None).sample(found.denoiser, x, **some)
    assert samples.isfinite().all()
    assert torch.equal(
        DDIM(4, clip=None).sample(found.denoiser.route("eps"), x, **some), DDIM(4, clip=None).sample(before, x, **some)
    )
    # and what it is told matters
    other = {k: v.flip(0) for k, v in some.items()}
    assert not torch.equal(DDIM(4, clip=None).sample(found.denoiser, x, **other), samples)


def test_a_network_in_half_precision_gets_the_same_rows() -> None:
    whole, half = toy(), toy().to(torch.bfloat16)
    for denoiser in (whole, half):
        # 3 · 144 numbers come out of the layer for an image, and bfloat16 counts to 256
        fitted(denoiser, images(96, 1, 12, 12).split(32))
    assert weights(half).dtype == torch.bfloat16
    torch.testing.assert_close(weights(half).float(), weights(whole), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.Conv1d, (2, 16)), (nn.Conv3d, (1, 3, 5, 5))], ids=["signals", "videos"]
)
def test_signals_and_videos(kind, shape) -> None:
    found = fitted(toy(None, kind, shape[0]), images(96, *shape).split(16))
    assert found.open > 0


def test_a_video_whose_frames_are_images_to_the_layer_is_least_squares_too() -> None:
    from diffusers import UNet3DConditionModel

    torch.manual_seed(0)
    network = UNet3DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=8, attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",),
    )  # fmt: skip
    x0, eps, t = images(8, 1, 3, 8, 8), dualout.noise(range(50, 58), (1, 3, 8, 8)), torch.arange(8) * 25
    told = {"encoder_hidden_states": dualout.noise(range(8), (5, 8))}
    after = upgrade(Denoiser(network.eval(), Epsilon(), SCHEDULE)).eval()
    moments, rows = readout.collect(after, "conv_out", slice(1, 2), [noised.Noised(0, x0, t, eps, told)], 1)
    solution = moments.solve(ridge=0.0)
    readout.write_rows(after.network.conv_out, rows, solution)  # type: ignore[union-attr, arg-type]
    level = SCHEDULE.level(t).like(x0)
    with torch.no_grad():
        error = (after(level.alpha * x0 + level.sigma * eps, t, **told).parts["x0"] - x0).double().square().mean()
    torch.testing.assert_close(error, moments.errors(solution)[0], rtol=1e-4, atol=0)
    assert error < x0.square().mean()
