"""How wrong each of the two routes to the clean image is at each t, and whether the ratio knows it.

With the routes' distance g = x0_θ − x0_eps and what the subtractive route lacks, d = x0 − x0_eps, a constant ratio r
errs by

    |x0 − x0_mix|² = |d|² − 2r·⟨d, g⟩ + r²·|g|²,    r* = ⟨d, g⟩ / |g|²

and what no denoiser can know of x0 is orthogonal to g: it cancels in r*. The sharp test of a learned ratio is
its calibration: wherever it says r, r* should be r. The slope of d on r·g is 1 then.

| column | meaning |
|---|---|
| `x0_error`, `eps_error`, `v_error` | mean square error of the prediction, in three scales of the same error |
| `subtractive_…`, `direct_…` | of x0_eps = (x_t − sigma·eps_θ)/alpha alone; of x0_θ alone |
| `velocity_x0_error`, `best_x0_error` | with r = sigma²/(alpha² + sigma²); with r* |
| `ratio_best`, `ratio_best_se` | r* and its standard error over images |
| `ratio_closed_form`, `ratio_independent` | `optimal_ratio` of the heads' errors; the same without correlation |
| `ratio_…`, `ratio_gap` | of the learned r: mean, sd, quantiles over pixels; mean of abs(r − r*) |
| `slope`, `slope_se` | of x0 − x0_eps on r·(x0_θ − x0_eps), through the origin |
| `blend_over_best` | x0_error / best_x0_error |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualout.analysis.tables import Row
from dualout.errors import InputError
from dualout.levels import Level
from dualout.networks.device import double
from dualout.parameterizations.base import subtract
from dualout.parameterizations.dual import optimal_ratio
from dualout.prediction import Prediction
from dualout.randomness import mix, noise
from dualout.samplers.base import Denoises
from dualout.schedules import Schedule

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 10
_MOST = 1_000_000
"""Pixels a quantile is taken of; of more, every n-th."""


class RoutesAt(NamedTuple):
    """What was measured at one t."""

    row: Row
    """One row of the table of routes."""
    reliability: list[Row]
    """For dual outputs, the pixels by what their ratio said: one row a bin of r."""
    ratio_map: Tensor | None
    """For dual outputs, r of each pixel, mean over images, (1 or C, H, W)."""


def grid(schedule: Schedule, points: int = 20) -> list[int]:
    """Time steps from 0 to T−1, evenly spaced, and a few more close to 0, where the errors change fastest."""
    if points < 1:
        raise InputError(f"a grid of time steps has 1 or more intervals, got {points}")
    last = schedule.steps - 1
    even = {round(last * k / points) for k in range(points + 1)}
    return sorted(even | {round(last * f) for f in (0.003, 0.01, 0.02)})


@torch.no_grad()
def routes(
    denoiser: Denoises,
    images: Tensor,
    times: Sequence[int] | None = None,
    *,
    seed: int = 0,
    repeats: int = 1,
    batch_size: int = 256,
    labels: Tensor | None = None,
) -> Iterator[RoutesAt]:
    """Errors and ratios on images that training has not seen, one t after another.

    The noise of image i is a function of (seed, repeat, i): the same for every t and every model.

    Args:
        denoiser: of any parameterization; what a single output does not have is left out of the rows.
        images: clean images in [−1, 1], (N, C, H, W).
        times: which t; `grid` of the schedule when None.
        seed: of the noise.
        repeats: how many noises an image is given.
        batch_size: images at a time.
        labels: the class of each image, LongTensor (N,), for a network that is told it; None tells nothing.

    Raises:
        InputError: when there are no images, or a t is outside the schedule.
    """
    if not len(images):
        raise InputError("the errors of the routes are measured on images; got none")
    for t in grid(denoiser.schedule) if times is None else times:
        yield _at(denoiser, images, int(t), seed, repeats, batch_size, labels)


def _at(
    denoiser: Denoises, images: Tensor, t: int, seed: int, repeats: int, batch_size: int, labels: Tensor | None
) -> RoutesAt:
    level = denoiser.schedule.scalars(t)
    sums: dict[str, list[Tensor]] = {}
    ratios: list[np.ndarray] = []
    bins = np.zeros((4, BINS))
    ratio_map: Tensor | None = None
    thin = max(1, repeats * images[:, :1].numel() // _MOST)
    # a divisor of the pixels would see the same ones of every image
    while math.gcd(thin, images[0].numel()) > 1:
        thin += 1
    for repeat in range(repeats):
        for first in range(0, len(images), batch_size):
            x0 = images[first : first + batch_size]
            seeds = mix(seed, repeat, np.arange(first, first + len(x0)))
            eps = noise(seeds, x0.shape[1:], device=x0.device, dtype=x0.dtype)
            conditions = {} if labels is None else {"class_labels": labels[first : first + len(x0)].to(x0.device)}
            prediction = denoiser(level.alpha * x0 + level.sigma * eps, t, **conditions)
            for name, value in _squares(prediction, x0, eps, level).items():
                sums.setdefault(name, []).append(value)
            if "ratio" in prediction.parts:
                ratio = prediction.parts["ratio"]
                ratios.append(ratio.flatten()[::thin].float().cpu().numpy())
                total = double(ratio).sum(0).cpu() / (repeats * len(images))
                ratio_map = total if ratio_map is None else ratio_map + total
                bins += _binned(prediction, x0, level)
    # noises of one image err alike: only images are independent, and standard errors are over them
    per_image = {name: torch.cat(values).cpu().view(repeats, -1).mean(0) for name, values in sums.items()}
    row: Row = {"t": t, "alpha": level.alpha, "sigma": level.sigma, "images": len(images), "repeats": repeats}
    row |= _errors(per_image, level)
    if ratios:
        row |= _ratio(np.concatenate(ratios).astype(np.float64), row["ratio_best"])
    return RoutesAt(row, _reliability(t, bins) if ratios else [], ratio_map)


def _squares(p: Prediction, x0: Tensor, eps: Tensor, level: Level[float]) -> dict[str, Tensor]:
    """Means of products over the pixels of each image, (B,), float64."""
    x0, eps = double(x0), double(eps)
    blend = x0 - double(p.x0)
    found = {"blend": _dot(blend, blend)}
    if not {"eps", "x0"} <= p.parts.keys():
        return found
    d, g = _routes(p, x0, level)
    a, e = double(p.parts["x0"]) - x0, double(p.parts["eps"]) - eps
    found |= {"dd": _dot(d, d), "dg": _dot(d, g), "gg": _dot(g, g)}
    found |= {"aa": _dot(a, a), "ee": _dot(e, e), "ae": _dot(a, e)}
    if "ratio" in p.parts:
        rg = double(p.parts["ratio"]) * g
        found |= {"d_rg": _dot(d, rg), "rg_rg": _dot(rg, rg)}
    return found


def _routes(p: Prediction, x0: Tensor, level: Level[float]) -> tuple[Tensor, Tensor]:
    """d = x0 − x0_eps and g = x0_θ − x0_eps."""
    x0_eps = subtract(double(p.parts["eps"]), double(p.x_t), level)
    return x0 - x0_eps, double(p.parts["x0"]) - x0_eps


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).mean(1)


def _errors(m: dict[str, Tensor], level: Level[float]) -> Row:
    alpha, sigma = level.alpha, level.sigma
    to_eps = (alpha / sigma) ** 2
    to_v = ((alpha**2 + sigma**2) / sigma) ** 2
    blend = float(m["blend"].mean())
    row: Row = {"x0_error": blend, "eps_error": to_eps * blend, "v_error": to_v * blend}
    if "gg" not in m:
        return row
    mean = {name: float(value.mean()) for name, value in m.items()}
    best, best_se = _slope(m["dg"], m["gg"])
    velocity = sigma**2 / (alpha**2 + sigma**2)
    best_error = mean["dd"] - best * mean["dg"]
    correlation = mean["ae"] / math.sqrt(mean["aa"] * mean["ee"]) if mean["aa"] * mean["ee"] else 0.0
    row |= {
        "subtractive_x0_error": mean["dd"],
        "direct_x0_error": mean["aa"],
        "subtractive_eps_error": mean["ee"],
        "direct_eps_error": to_eps * mean["aa"],
        "velocity_x0_error": mean["dd"] - 2 * velocity * mean["dg"] + velocity**2 * mean["gg"],
        "best_x0_error": best_error,
        "blend_over_best": blend / best_error if best_error else math.nan,
        "heads_correlation": correlation,
        "ratio_best": best,
        "ratio_best_se": best_se,
        "ratio_closed_form": float(optimal_ratio(level, mean["aa"], mean["ee"], correlation)),
        "ratio_independent": float(optimal_ratio(level, mean["aa"], mean["ee"])),
        "ratio_velocity": velocity,
    }
    if "rg_rg" in m:
        row["slope"], row["slope_se"] = _slope(m["d_rg"], m["rg_rg"])
    return row


def _slope(products: Tensor, squares: Tensor) -> tuple[float, float]:
    """Σ⟨d, g⟩ / Σ|g|² and its standard error, images being independent (the delta method)."""
    total = float(squares.sum())
    if total == 0:
        return math.nan, math.nan
    slope = float(products.sum()) / total
    n = len(products)
    scale = math.sqrt(n / (n - 1)) if n > 1 else math.nan
    return slope, scale * float((products - slope * squares).square().sum().sqrt()) / total


def _ratio(r: np.ndarray, best: float) -> Row:
    quantiles = np.quantile(r, QUANTILES)
    row = {"ratio_mean": float(r.mean()), "ratio_sd": float(r.std())}
    row |= {f"ratio_q{round(100 * q):02d}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
    return row | {"ratio_gap": float(np.abs(r - best).mean())}


def _binned(p: Prediction, x0: Tensor, level: Level[float]) -> np.ndarray:
    """Per bin of r: how many pixels, the sums of r, ⟨d, g⟩ and |g|²; (4, BINS)."""
    d, g = (v.flatten().cpu().numpy() for v in _routes(p, double(x0), level))
    r = double(p.parts["ratio"]).expand_as(x0).flatten().cpu().numpy()
    index = np.clip((r * BINS).astype(int), 0, BINS - 1)
    return np.stack([np.bincount(index, weights, BINS) for weights in (np.ones_like(r), r, d * g, g * g)])


def _reliability(t: int, bins: np.ndarray) -> list[Row]:
    count, r, dg, gg = bins
    return [
        {
            "t": t,
            "bin": k,
            "share": float(count[k] / count.sum()),
            "ratio_mean": float(r[k] / count[k]),
            "ratio_best": float(dg[k] / gg[k]) if gg[k] else math.nan,
            "weight": float(gg[k] / gg.sum()) if gg.sum() else 0.0,
        }
        for k in range(BINS)
        if count[k]
    ]


def crossings(rows: Sequence[Row]) -> list[float]:
    """The t at which the two routes' errors in x0 are equal, between the rows' t (log error is taken as linear)."""
    rows = sorted((r for r in rows if r.get("direct_x0_error")), key=lambda r: r["t"])
    gaps = [(r["t"], math.log(r["subtractive_x0_error"] / r["direct_x0_error"])) for r in rows]
    found = [s + (t - s) * a / (a - b) for (s, a), (t, b) in pairwise(gaps) if a * b < 0]
    return sorted(found + [float(t) for t, gap in gaps if gap == 0])
