"""The closed form for a network and images of one's own: it agrees with the command, and with least squares by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout.data import pixels
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.networks import adapted, build
from dualout.parameterizations import CleanImage, Epsilon, Flow, LearnedVariance, Parameterization, Velocity
from dualout.samplers import DDIM, DPMSolver
from dualout.training import closed_form, noised, opening, readout
from dualout.training.closed_form import Fitted, fit
from dualout.training.given import Given
from dualout.training.upgrade import new_rows, output_layer, upgrade, upgraded_of
from dualout.training.upgrade_config import UpgradeConfig
from dualout.training.upgrade_run import Upgrade

SCHEDULE = dualout.schedules.Linear(200, 5e-4, 0.08)


class Toy(nn.Module):
    """Random features, dropout, then a layer; remembers what it was called with."""

    def __init__(self, kind: Any = nn.Conv2d, channels: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = kind(channels, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.last = kind(6, channels, 3, padding=1)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((x, t))
        h = torch.tanh(self.features(x) + (0.01 * t).to(x).view(-1, *[1] * (x.ndim - 1)))
        return self.last(self.dropout(h)).to(x.dtype)


def images(count: int = 96, *shape: int) -> Tensor:
    """Smooth ones, so that there is something to learn."""
    shape = shape or (1, 6, 6)
    return (dualout.noise(range(count), (shape[0], *[1] * (len(shape) - 1))) * torch.ones(shape)).tanh()


def toy(source: Parameterization | None = None, kind: Any = nn.Conv2d, channels: int = 1) -> Denoiser:
    return upgrade(Denoiser(Toy(kind, channels), source or Epsilon(), SCHEDULE), layer="last")


def fitted(denoiser: Denoiser, batches: Any, **options: Any) -> Fitted:
    return fit(denoiser, batches, **({"held_out": 32, "bins": 4} | options))


def weights(denoiser: Denoiser) -> Tensor:
    """Of the new outputs: a row each, the bias last."""
    layer: Any = denoiser.network.get_submodule(output_layer(denoiser.network))  # type: ignore[union-attr, arg-type]
    rows = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1)
    return rows[new_rows(denoiser)].detach().clone()


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


# networks that are told something


def text_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=8, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip


def class_dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, num_layers=1, sample_size=8,
        patch_size=2, norm_num_groups=1, num_embeds_ada_norm=10,
    )  # fmt: skip
    nn.init.normal_(network.proj_out_1.weight, std=0.2)
    return adapted(network, SCHEDULE)


LATENTS = images(96, 2, 8, 8)
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


# batches


def test_a_batch_of_several_bins_adds_up_to_batches_of_one() -> None:
    denoiser, x0 = toy().eval(), images(12)
    t, eps = torch.arange(12) * 16, dualout.noise(range(12), (1, 6, 6))
    bin = torch.tensor([0, 1, 2] * 4)
    whole, _ = readout.collect(denoiser, "last", slice(1, 2), [noised.Noised(bin, x0, t, eps, {})], 3)
    parts = [noised.Noised(b, x0[bin == b], t[bin == b], eps[bin == b], {}) for b in range(3)]
    apart, _ = readout.collect(denoiser, "last", slice(1, 2), parts, 3)
    for name, value in vars(whole).items():
        torch.testing.assert_close(value, getattr(apart, name), rtol=1e-6, atol=1e-9, msg=name)


def test_the_same_images_give_the_same_numbers_however_they_come() -> None:
    x = images()
    first, *others = [
        fitted(toy(), batches, pixels=36)
        for batches in (
            x.split(16),
            iter(x.split(16)),
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=16),
            [(b, {}) for b in x.split(16)],
            x.double().split(16),
            x.split(32),
        )
    ]
    for other in others[:4]:
        assert other.table == first.table
    # what is random belongs to the image, not to its batch
    assert others[4].score == pytest.approx(first.score, abs=1e-4)
    assert fitted(toy(), x.split(16), seed=1).table != first.table
    apart = fitted(toy(), x[32:].split(16), held_out=x[:32].split(16))
    assert (apart.images, apart.held_out) == (64, 32)
    assert apart.score == pytest.approx(first.score, abs=0.2)


def test_endless_batches_are_read_no_further_than_needed() -> None:
    read = 0

    def endless() -> Iterator[Tensor]:
        nonlocal read
        for i in itertools.count():
            read += 1
            yield images()[16 * (i % 6) :][:16]

    found = fitted(toy(), endless(), images=40)
    assert (found.held_out, found.images, read) == (32, 48, 5)


def test_images_of_several_sizes() -> None:
    batches = [*images(64).split(16), *images(32, 1, 8, 4).split(16)]
    assert fitted(toy(), batches).images == 64


def test_dropout_is_off_meanwhile_and_modes_are_kept() -> None:
    denoiser = toy()
    denoiser.train()
    denoiser.network.features.eval()  # type: ignore[union-attr]
    first = fitted(denoiser, images().split(16))
    assert denoiser.network.dropout.training  # type: ignore[union-attr]
    assert not denoiser.network.features.training  # type: ignore[union-attr]
    assert first.table == fitted(toy().eval(), images().split(16)).table


def test_printed_it_is_a_table() -> None:
    found = fitted(toy(), images().split(16))
    head, *rows, last = str(found).splitlines()
    assert head.split() == ["t", "before", "eps", "x0", "ratio", "after"]
    assert [row.split()[0] for row in rows] == ["0–49", "50–99", "100–149", "150–199"]
    assert last.endswith(f"gate open in {found.open} of 4; 64 images, 32 held out")


# what cannot be used


def spent() -> Iterator[Tensor]:
    batches = iter(images().split(16))
    list(batches)
    return batches


X = images()
WRONG = {
    "a path": ("images.npz", "batches is an iterable of batches, such as a DataLoader; got str"),
    "one tensor": (X, r"got one tensor: say images\.split\(64\)"),
    "a dict": ({"a": X}, "batches is an iterable of batches, such as a DataLoader; got dict"),
    "nothing": ([], "batches is empty"),
    "an iterator that is spent": (spent(), "an iterator that was gone through before has nothing left"),
    "few": (X[:8].split(4), "16 held-out images or more .* got 8"),
    "few beside those held out": (X[:36].split(4), "beside 32 held-out images there are 4 to fit to, and 16 are"),
    "classes without a name": ([(X, torch.zeros(96))], r"batch 1 of batches is of Tensor, Tensor.*class_labels"),
    "an empty pair": ([()], "batch 1 of batches is of tuple"),
    "too many": ([(X, {}, {})], "batch 1 of batches is of Tensor, dict, dict"),
    "arrays": ([X.numpy()], "batch 1 of batches is of ndarray"),
    "pixels": ([X[:16], X.byte()], r"batch 2 of batches: images are floats .* got torch\.uint8 \(96, 1, 6, 6\)"),
    "numbers without channels": ([X.flatten()], r"got torch\.float32 \(3456,\)"),
    "no images": ([X[:0]], r"got torch\.float32 \(0, 1, 6, 6\)"),
    "NaN": ([X[:16], X.log()], "batch 2 of batches has images with values that are not finite"),
    "infinity": ([X[:16], X.abs() / 0], "batch 2 of batches has images with values that are not finite"),
    "other channels later": ([X[:16], torch.cat([X, X], 1)], r"batch 2 of batches: this Toy cannot be called .* 2 ch"),
    "other channels": ([torch.cat([X, X], 1)], r"batch 1 of batches: this Toy cannot be called .* 2 channels"),
    "a condition it has not": ([(X, {"text": X})], r"unexpected keyword.*conditions: \{'text': \(96, 1, 6, 6\)\}"),
}


@pytest.mark.parametrize(("batches", "says"), WRONG.values(), ids=WRONG)
def test_batches_that_cannot_be_used(batches, says) -> None:
    denoiser = toy()
    with pytest.raises(InputError, match=says):
        fitted(denoiser, batches)
    assert not weights(denoiser).any()


def test_conditions_without_a_row_an_image() -> None:
    denoiser = upgrade(Denoiser(text_unet().eval(), Epsilon(), SCHEDULE))
    text = torch.zeros(96, 5, 8)
    for told, says in [
        ({}, "missing 1 required positional argument: 'encoder_hidden_states'; conditions: none"),
        ({"encoder_hidden_states": text[0]}, r"batch 1 of batches: .*conditions: .*\(5, 8\)"),
        ({"encoder_hidden_states": text[:3]}, r"batch 1 of batches: .*conditions: .*\(3, 5, 8\)"),
    ]:
        with pytest.raises(InputError, match=says):
            fitted(denoiser, [(x, told) for x in LATENTS.split(16)])
    # also where it is only the last
    batches = [(x, {"encoder_hidden_states": text[: len(x)]}) for x in LATENTS.split(16)]
    batches[-1][1]["encoder_hidden_states"] = text[:7]
    with pytest.raises(InputError, match=r"batch 6 of batches"):
        fitted(denoiser, batches)


def test_models_that_cannot_be_fitted() -> None:
    batches = X.split(16)
    with pytest.raises(InputError, match=r"not an upgraded model, but one of eps; upgrade\(denoiser\) makes one"):
        fit(Denoiser(Toy(), Epsilon(), SCHEDULE), batches)
    with pytest.raises(InputError, match=r"fit takes a denoiser that upgrade\(…\) made; got Toy"):
        fit(Toy(), batches)  # type: ignore[arg-type]
    found = fitted(toy(), batches)
    with pytest.raises(InputError, match=r"the gate of this model is open \(ratio='pixel'\)"):
        fitted(found.denoiser, batches)
    for options, says in [
        ({"bins": 201}, "201 bins are more than the 200 steps"),
        ({"bins": 0}, "bins is 1 or more; got 0"),
        ({"pixels": 0}, "pixels is 1 or more"),
        ({"images": 0}, "images is 1 or more"),
        ({"bins": 80}, "there are 64 to fit to, and 80 are the fewest"),
        ({"held_out": batches}, "held_out is batches itself"),
        ({"held_out": []}, "held_out is empty"),
        ({"seed": -1}, "seed is a whole number"),
    ]:
        with pytest.raises(InputError, match=says):
            fitted(toy(), batches, **options)


@pytest.mark.parametrize(
    ("finite", "parts"),
    # somewhere, and everywhere but where it is tried
    [(lambda t: t <= 160, r"\[3\]"), (lambda t: (t == 1) | (t == 100), r"\[0, 1, 2, 3\]")],
)
def test_a_network_that_gives_nan_is_refused_and_it_is_said_where(finite: Any, parts: str) -> None:
    class Breaks(Toy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t) + torch.where(finite(t), 0.0, torch.nan).view(-1, 1, 1, 1)

    both = upgrade(Denoiser(Breaks(), Epsilon(), SCHEDULE), layer="last")
    with pytest.raises(InputError, match=f"not finite in parts {parts} of the 4 of t"):
        fitted(both, X.split(16))


def test_what_is_not_finite_in_images_of_the_fit_alone_is_refused() -> None:
    class Told(Toy):
        def forward(self, x: Tensor, t: Tensor, more: Tensor) -> Tensor:
            return super().forward(x + more.view(-1, 1, 1, 1), t)

    both = upgrade(Denoiser(Told(), Epsilon(), SCHEDULE), layer="last")
    told = torch.zeros(96)
    told[80:] = torch.nan
    with pytest.raises(InputError, match=r"not finite in parts \[0, 1, 2, 3\] of the 4 of t"):
        fitted(both, [(x, {"more": more}) for x, more in zip(X.split(16), told.split(16), strict=True)])
    assert not weights(both).any()


def test_conditions_of_another_shape_are_tried_where_they_come() -> None:
    class Told(Toy):
        def forward(self, x: Tensor, t: Tensor, more: Tensor) -> Tensor:
            return super().forward(x + more.view(-1, 1, 1, 1), t)

    both = upgrade(Denoiser(Told(), Epsilon(), SCHEDULE), layer="last")
    batches = [(x, {"more": torch.zeros(16 if b < 5 else 3)}) for b, x in enumerate(X.split(16))]
    with pytest.raises(InputError, match=r"batch 6 of batches: .*; conditions: {'more': \(3,\)}"):
        fitted(both, batches)


def test_images_from_0_to_1_are_doubted() -> None:
    with pytest.warns(UserWarning, match=r"images are from 0 to 1; most networks are trained in \[−1, 1\]") as warned:
        fitted(toy(), (X > 0).float().split(16))
    # where it was called
    assert warned[0].filename == __file__
