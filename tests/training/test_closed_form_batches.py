"""The batches that the closed form is given: however they come, and those that cannot be used."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dualout
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.parameterizations import Epsilon
from dualout.training import noised, readout
from dualout.training.closed_form import fit
from dualout.training.upgrade import upgrade
from fitted import LATENTS, SCHEDULE, Toy, fitted, images, text_unet, toy, weights


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
        fit(toy(), (X > 0).float().split(16), held_out=32, bins=4)
    # where it was called
    assert warned[0].filename == __file__
