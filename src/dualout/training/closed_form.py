"""The closed form for a network and images of one's own: the second output by least squares, in one pass.

What `dualout upgrade` does first, with whatever a network is told: text, classes, other images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.networks.trace import evaluating
from dualout.randomness import check_seed, mix
from dualout.training import opening, readout
from dualout.training.given import Batches, first, read
from dualout.training.noised import Bins, Noised, bin_edges
from dualout.training.opening import FEWEST
from dualout.training.upgrade import open_gate, output_layer, upgraded_of

_BIN = 0x62696E


@dataclass(frozen=True, repr=False)
class Fitted:
    """An upgraded model whose new output was fitted; printed, it is a table."""

    denoiser: Denoiser
    """With its gate open where the blend is better; the weights are those of the denoiser that was fitted."""
    score: float
    """The mean over t of log(error of x0 / error before), on held-out images: below 0 is better."""
    table: list[dict[str, Any]]
    """A bin of t each: t, open, ratio, and mean squared errors of x0: before, of eps' route, of x0's, and after."""
    images: int
    """How many it was fitted to."""
    held_out: int
    """How many decided."""

    @property
    def open(self) -> int:
        """In how many bins the gate is open."""
        return sum(row["open"] for row in self.table)

    def summary(self) -> dict[str, Any]:
        """What a model card says of it."""
        return {
            "stage": "closed form",
            "images": self.images,
            "held-out images": self.held_out,
            "x0 error, mean of log(after / before)": round(self.score, 4),
            "gate open in": f"{self.open} of {len(self.table)} parts of the noise levels",
        }

    def __repr__(self) -> str:
        """The table, and what it says on the whole."""
        names = ("t", "before", "eps", "x0", "ratio", "after")
        rows = [names, *([f"{v:.4g}" if isinstance(v := row[n], float) else v for n in names] for row in self.table)]
        lines = [" ".join(f"{value:>10}" for value in row) for row in rows]
        said = f"x0 error {np.expm1(self.score):+.1%} (geometric mean over t), gate open in {self.open} of "
        return "\n".join([*lines, f"{said}{len(self.table)}; {self.images} images, {self.held_out} held out"])


@torch.no_grad()
def fit(
    denoiser: Denoiser,
    batches: Batches,
    *,
    held_out: int | Batches = 128,
    images: int = 4000,
    pixels: int = 256,
    bins: int = 20,
    seed: int = 0,
) -> Fitted:
    """Fit the new output of an upgraded model by least squares, in one pass, and open its gate where that helps.

    ``fit(upgrade(denoiser), loader).denoiser`` is the result. Time steps and noise are drawn here, as many
    images in each bin of t. The result errs in no bin more than the model did before, on the held-out images, each of
    which is in every bin: where the blend is not better beyond chance, the trained output alone is used. Where that is
    so everywhere, the new rows are put back and the result is the denoiser itself, which samples as the original does,
    bit for bit.

    Args:
        denoiser: what `upgrade` made. The new rows of its network's output layer are written in place; the result has
            the same network. The sums take bins · F² · 8 bytes where that is, F what enters one of these rows: 4 MB for
            160 numbers, 1.3 GB for the 2881 of Stable Diffusion's UNet.
        batches: images in random order and the range that the network was trained in, (B, C, H, W) or with other sides;
            or pairs of images and what the network is told, {name: condition}, as in training. Any iterable, such as a
            DataLoader: it is gone through once, no further than needed.
        held_out: so many of the first images, in whole batches; or other batches. They are kept in memory.
        images: how many to fit to, at most, in whole batches.
        pixels: positions in the images of each batch that are looked at, at random.
        bins: ranges of t, for each of which the ratio is found separately.
        seed: of time steps, noise and positions: the same batches give the same numbers.

    Raises:
        InputError: for a model that `upgrade` did not make, or whose gate is open already; for batches that cannot be
            used, or too few; for a network that cannot be called with them, or does more with its layer's output than
            rearrange it.
    """
    closed = _closed_ratio(denoiser, seed, images=images, pixels=pixels, bins=bins)
    if batches is held_out:
        raise InputError("held_out is batches itself: images of the fit cannot decide where it helps; give others")
    given = read(denoiser, batches, "batches")
    held = [*(first(given, held_out) if isinstance(held_out, int) else read(denoiser, held_out, "held_out"))]
    count = sum(len(batch.x0) for batch in held)
    if count < FEWEST:
        raise InputError(f"{FEWEST} held-out images or more decide where the new output is used; got {count}")
    if (low := min(float(batch.x0.min()) for batch in held)) >= 0:
        high = max(float(batch.x0.max()) for batch in held)
        warnings.warn(f"images are from {low:.4g} to {high:.4g}; most networks are trained in [−1, 1]", stacklevel=3)
    steps, seen = denoiser.schedule.steps, 0
    fitted_to, looked_at = Bins(steps, bins, seed), Bins(steps, bins, seed + 1)  # noised differently

    def noised() -> Iterator[Noised]:
        nonlocal seen
        for batch in given:
            # each bin once in `bins` images, in an order that has nothing to do with theirs
            turns = mix(seed, _BIN, batch.numbers // bins).astype(np.uint32)
            yield batch.noised((batch.numbers + turns) % bins, fitted_to)
            seen += len(batch.x0)
            if seen >= images:
                return
        if seen < (least := max(FEWEST, bins)):
            raise InputError(
                f"beside {count} held-out images there are {seen} to fit to, and {least} are the fewest: give more "
                "images, or a lower held_out, or smaller batches, which are held out as a whole"
            )

    def looks() -> Iterator[Noised]:
        return (batch.noised(b, looked_at) for b in range(bins) for batch in held)

    kept = [(p, p.clone()) for p in _layer(denoiser)[1].parameters(recurse=False)]
    with evaluating(denoiser):
        before = opening.measure(denoiser, looks(), bins).of(closed)
        solve(denoiser, noised(), before, held[0].x0.shape[1], pixels=pixels, seed=seed)
        errors = opening.measure(denoiser, looks(), bins)
    found = opening.look(errors, before, closed, steps)
    if found.worse or not found.score < 0:
        for p, values in kept:
            p.copy_(values)
        found = opening.look(errors, before, closed, steps, shut=True)
    fitted = Fitted(open_gate(denoiser, found.ratios), found.score, found.rows, seen, count)
    if fitted.open:
        fitted.denoiser.card = denoiser.card | {"title": "A dual-output upgrade", "training": fitted.summary()}
    return fitted


def solve(
    denoiser: Denoiser, batches: Iterable[Noised], before: Tensor, channels: int, *, pixels: int, seed: int
) -> None:
    """Put the new rows of an upgraded model where least squares has them.

    Args:
        denoiser: whose rows are written.
        batches: noised images to fit to.
        before: the trained route's errors of x0 on other images, (bins, images).
        channels: of an image.
        pixels: positions to look at in each batch.
        seed: of that choice.

    Raises:
        InputError: when there are no images, or numbers that are not finite, or the network's output is not the
            layer's, rearranged.
    """
    bins, new_first = len(before), upgraded_of(denoiser).closed == 1
    trained = before.mean(1)
    if new_first:
        # an error of the noise is one of the image times sigma / alpha
        alpha, sigma = denoiser.schedule.levels
        gain = (alpha / sigma).square().to(trained)
        edges = bin_edges(denoiser.schedule.steps, bins)
        trained = trained * torch.stack([gain[a:b].mean() for a, b in pairwise(edges)])
    # before the network is looked at: NaN would seem to be no rearrangement of the layer's output
    _check_finite(trained.isfinite())
    name, layer = _layer(denoiser)
    moments, found = readout.collect(
        denoiser,
        name,
        slice(0, channels) if new_first else slice(channels, 2 * channels),
        batches,
        bins,
        target="noise" if new_first else "x0",
        pixels=pixels,
        seed=seed,
    )
    _check_finite(moments.gram.isfinite().all(2).all(1))
    readout.write_rows(layer, found, moments.solve_blended(trained.to(moments.count.device)))


def _check_finite(finite: Tensor) -> None:
    if not finite.all():
        raise InputError(
            f"the network gives what is not finite in parts {(~finite).nonzero().flatten().tolist()} of the "
            f"{len(finite)} of t"
        )


def _layer(denoiser: Denoiser) -> tuple[str, nn.Module]:
    """The widened output layer, and its name in the network."""
    network = denoiser.network
    assert isinstance(network, nn.Module)
    name = output_layer(network)
    return name, network.get_submodule(name)


def _closed_ratio(denoiser: Denoiser, seed: int, **numbers: int) -> float:
    """The closed ratio of what can be fitted; anything else is refused, and numbers below 1."""
    if not isinstance(denoiser, Denoiser):
        raise InputError(f"fit takes a denoiser that upgrade(…) made; got {type(denoiser).__name__}")
    own, steps = upgraded_of(denoiser), denoiser.schedule.steps
    if own.ratio != "closed":
        raise InputError(f"the gate of this model is open (ratio={own.ratio!r}): fit takes what upgrade(…) made")
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name} is 1 or more; got {value}")
    if numbers["bins"] > steps:
        raise InputError(f"{numbers['bins']} bins are more than the {steps} steps of the schedule")
    check_seed(seed)
    return own.closed
