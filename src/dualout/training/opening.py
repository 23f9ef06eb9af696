"""Where the new route of an upgraded model may be used: measured on held-out images, bin by bin of t.

With the trained route's error a = x0 − x0_old, the blend's squared error is a quadratic of the ratio,

    |x0 − x0_mix|² = |x0 − x0_eps|² − 2·r·⟨x0 − x0_eps, x0_θ − x0_eps⟩ + r²·|x0_θ − x0_eps|²

so four numbers an image say what every ratio would give, and r* = ⟨x0 − x0_eps, x0_θ − x0_eps⟩ / |x0_θ − x0_eps|².
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualout.denoiser import Denoiser
from dualout.networks.device import double
from dualout.parameterizations.upgraded import SHUT
from dualout.training.noised import Noised, bin_edges

FEWEST = 16
"""Held-out images that are enough to decide."""
SURE = 2.0
"""A difference counts when it is this many standard errors away from none."""


@dataclass(frozen=True)
class Errors:
    """Of every held-out image in every bin of t: (bins, images), float64, means over pixels."""

    eps: Tensor
    """|x0 − x0_eps|²: the route through eps, or through a velocity."""
    along: Tensor
    """⟨x0 − x0_eps, x0_θ − x0_eps⟩."""
    apart: Tensor
    """|x0_θ − x0_eps|²."""

    def of(self, ratio: float | Tensor) -> Tensor:
        """The squared error of the blend, (bins, images), for a ratio, or one a bin (bins,)."""
        r = ratio[:, None] if isinstance(ratio, Tensor) else ratio
        return self.eps - 2 * r * self.along + r * r * self.apart

    def best(self, some: slice) -> Tensor:
        """r*, from some of the images: (bins,)."""
        ratio = self.along[:, some].sum(1) / self.apart[:, some].sum(1).clamp(min=1e-300)
        return ratio.clamp(0, 1)


def opened(errors: Errors, closed: float) -> list[float]:
    """The ratio of each bin: r* where it beats the trained route on images that it was not found with, else `closed`.

    Args:
        errors: measured ones.
        closed: the ratio that uses the trained route alone, 0 or 1.
    """
    trained = errors.of(closed)
    wins = torch.ones(len(trained), dtype=torch.bool)
    halves = slice(0, None, 2), slice(1, None, 2)
    for found, tried in (halves, halves[::-1]):
        blend = errors.of(errors.best(found))
        gain = (trained - blend)[:, tried]
        # the last time step of a cosine schedule errs a thousand times as much as the one before: a mean over both is
        # never sure, where every image's share of its own errors may be; of two looks the second has to be surer
        share = gain / (trained + blend)[:, tried].clamp(min=1e-300)
        sure = (gain.mean(1) > SURE * standard_error(gain)) | (share.mean(1) > (SURE + 1) * standard_error(share))
        wins &= (sure & (gain.mean(1) > 0)).cpu()
    ratios = errors.best(slice(None))
    return [float(r) if win else closed for r, win in zip(ratios, wins, strict=True)]


def worse(now: Tensor, before: Tensor, tolerance: float = 0.0) -> list[int]:
    """The bins in which an error (bins, images) is larger than it was, by more than a share of that, beyond chance."""
    more = now - (1 + tolerance) * before
    # what is rounded differently may be so in the same direction for every image
    rounding = 1e-9 * before.mean(1)
    return (more.mean(1) > (SURE + 1) * standard_error(more) + rounding).nonzero().flatten().tolist()


def score(now: Tensor, before: Tensor) -> float:
    """The mean over t of log(error / error before): below 0 is better."""
    return float((now.mean(1) / before.mean(1)).log().mean())


class Look(NamedTuple):
    """What held-out images say of an upgraded model."""

    ratios: list[float]
    """Of each bin; the closed one where the new route does not help."""
    score: float
    """The mean over t of log(error of x0 / error before): below 0 is better."""
    worse: list[int]
    """Bins with a larger error than is tolerated, beyond chance."""
    rows: list[dict[str, Any]]
    """A bin of t each: t, error before, error of either route now, ratio, error now."""


def look(
    errors: Errors, before: Tensor, closed: float, steps: int, *, shut: bool = False, tolerance: float = 0.0
) -> Look:
    """Decide where the gate is opened, and compare with the errors of the original.

    Args:
        errors: measured ones.
        before: the original's, (bins, images).
        closed: the ratio that uses the trained route alone, 0 or 1.
        steps: T.
        shut: leave the gate closed everywhere.
        tolerance: the share by which an error may be larger before it is worse.
    """
    ratios = [closed] * len(before) if shut else opened(errors, closed)
    now = errors.of(torch.tensor(ratios, dtype=torch.float64))
    columns = {"before": before, "eps": errors.of(0.0), "x0": errors.of(1.0), "after": now}
    means = {name: values.mean(1).tolist() for name, values in columns.items()}
    rows = [
        {"t": f"{first}–{end - 1}", "open": ratio != closed, "ratio": ratio}
        | {name: values[b] for name, values in means.items()}
        for b, (ratio, (first, end)) in enumerate(zip(ratios, pairwise(bin_edges(steps, len(before))), strict=True))
    ]
    return Look(ratios, score(now, before), worse(now, before, tolerance), rows)


def standard_error(values: Tensor) -> Tensor:
    """Of the mean of each row."""
    return values.std(1) / math.sqrt(values.shape[1])


def table(ratios: Sequence[float], steps: int, closed: float) -> Tensor:
    """The logit of each time step, (T,), for one ratio a bin; `closed` is exact in float32."""
    edges = bin_edges(steps, len(ratios))
    logits = torch.empty(steps)
    for b, r in enumerate(ratios):
        if r == closed:
            value = SHUT if closed else -SHUT
        else:
            # never quite 0 or 1: what is open can be learned further
            value = max(-12.0, min(12.0, math.log(max(r, 1e-300) / max(1 - r, 1e-300))))
        logits[edges[b] : edges[b + 1]] = value
    return logits


@torch.no_grad()
def measure(denoiser: Denoiser, batches: Iterable[Noised], bins: int) -> Errors:
    """Look at noised images with both routes of an upgraded model.

    Args:
        denoiser: of an `Upgraded` parameterization.
        batches: as many images in each bin, each batch of one.
        bins: how many there are.
    """
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in range(bins)]
    readings = [denoiser.parameterization.route(r) for r in (0.0, 1.0)]
    for batch in batches:
        raw, x_t, level = batch.seen_by(denoiser)
        # float64: at high noise these are small differences of large numbers
        eps, x0 = (double(reading.read(raw, x_t, level).x0) for reading in readings)
        error, step = double(batch.x0) - eps, x0 - eps
        values = (error.square(), error * step, step.square())
        assert isinstance(batch.bin, int)
        found[batch.bin].append(tuple(v.flatten(1).mean(1).cpu() for v in values))
    return Errors(*(torch.stack([torch.cat([row[k] for row in rows]) for rows in found]) for k in range(3)))
