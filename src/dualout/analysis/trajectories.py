"""What happens on the way from noise to images: films of a few images, and statistics of many.

The statistics are held against an exact denoiser of Gaussian data with the set's mean and covariance. Every sampler
is linear in its images when the denoiser is and nothing is clipped, so the variance that an exact denoiser ends with
is known in closed form: along an eigenvector of the covariance with eigenvalue λ,

    x0 = alpha·λ / (alpha²·λ + sigma²) · x_t

and x after k steps is a combination of the first noise and of every fresh one, whose squared coefficients add up.
What of the shortfall the exact denoiser shares is the sampler's; the rest is the network's.

| column | meaning |
|---|---|
| `t`, `t_next` | the step's time step, and the next one's (−1: clean) |
| `mean`, `drift` | of the images after the step over pixels, channels and seeds; less alpha times the data's mean |
| `drift_0` … | the same of channel 0 … |
| `sd` | of a pixel over seeds, root mean square over pixels, after the step |
| `sd_exact`, `sd_data` | of the exact denoiser with the same sampler; of noisy data at that level |
| `clipped` | share of the predicted pixels outside the clipping range; latents, which have none, have no such column |
| `ratio_mean` | of the learned r |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualout.analysis.tables import Row
from dualout.parameterizations.base import subtract
from dualout.prediction import Prediction
from dualout.randomness import SeededDraw, noise
from dualout.samplers.base import Denoises, Moment, Sampler, visited
from dualout.samplers.diffusers import FromDiffusers
from dualout.schedules import Schedule


class Frame(NamedTuple):
    """One step of a film."""

    k: int
    t: int
    x_t: Tensor
    """The noisy images before the step, (B, C, H, W)."""
    x0: Tensor
    """The predicted clean images, clipped as the sampler clips."""
    x_next: Tensor
    """The images after the step."""
    subtractive: Tensor | None
    """x0_eps, clipped; None for single outputs."""
    direct: Tensor | None
    """x0_θ, clipped; None for single outputs."""
    ratio: Tensor | None
    """r, (B, 1 or C, H, W); None for single outputs."""


def film(
    denoiser: Denoises,
    sampler: Sampler,
    seeds: Sequence[int],
    shape: Sequence[int],
    labels: Sequence[int] | None = None,
) -> Iterator[Frame]:
    """Every step of a few images.

    Args:
        denoiser: of any parameterization.
        sampler: any.
        seeds: one an image.
        shape: of one image, (C, H, W).
        labels: the class of each image, for a network that is told it.
    """
    for m in _trajectory(denoiser, sampler, seeds, shape, labels):
        yield frame(m, sampler)


def frame(m: Moment, sampler: Sampler) -> Frame:
    """What is to be seen of one step."""
    parts = m.prediction.parts
    both = {"eps", "x0"} <= parts.keys()
    subtractive = subtract(parts["eps"], m.prediction.x_t, m.prediction.level) if both else None
    return Frame(
        m.k,
        m.t,
        m.x_t,
        sampler.clipped(m.prediction.x0),
        m.x_next,
        None if subtractive is None else sampler.clipped(subtractive),
        sampler.clipped(parts["x0"]) if both else None,
        parts.get("ratio"),
    )


def seen(frame: Frame, look: Callable[[Tensor], Tensor]) -> Frame:
    """The same step, its images (not the ratio) as they are to be looked at."""
    images = {name: getattr(frame, name) for name in ("x_t", "x0", "x_next", "subtractive", "direct")}
    return frame._replace(**{name: look(x) for name, x in images.items() if x is not None})


def _trajectory(
    denoiser: Denoises, sampler: Sampler, seeds: Sequence[int], shape: Sequence[int], labels: Sequence[int] | None
) -> Iterator[Moment]:
    device = getattr(getattr(denoiser, "times", None), "device", None)
    draw = SeededDraw(seeds, shape, device=device) if sampler.stochastic else None
    conditions: dict[str, Any] = {} if labels is None else {"class_labels": torch.tensor(labels, device=device)}
    with torch.no_grad():
        yield from sampler.trajectory(denoiser, noise(seeds, shape, device=device), draw, **conditions)


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian of a set of images.

    Attributes:
        mean: one number a channel, (C,).
        spectrum: the D = C·H·W eigenvalues of the covariance, float64.
    """

    mean: Tensor
    spectrum: Tensor

    @classmethod
    def of(cls, images: Tensor) -> Gaussian:
        """Of images (N, C, H, W); at most N − 1 of the eigenvalues are not 0."""
        flat = images.cpu().double().flatten(1)
        centred = flat - flat.mean(0)
        n, d = centred.shape
        small = centred.T @ centred if d <= n else centred @ centred.T
        eigenvalues = torch.linalg.eigvalsh(small).clamp(min=0) / max(n - 1, 1)
        spectrum = torch.zeros(d, dtype=torch.float64)
        spectrum[: len(eigenvalues)] = eigenvalues
        return cls(images.cpu().double().mean((0, 2, 3)), spectrum)

    @property
    def variance(self) -> float:
        """Mean over the pixels."""
        return float(self.spectrum.mean())


@dataclass(frozen=True)
class _Exact:
    """The exact denoiser of zero-mean Gaussian data in the basis of its eigenvectors: images are (B, 1, 1, D)."""

    schedule: Schedule
    spectrum: Tensor

    def __call__(self, x_t: Tensor, t: int | Tensor, **conditions: Any) -> Prediction:
        level = self.schedule.scalars(int(t))
        alpha, sigma = level.alpha, level.sigma
        return Prediction(x_t, level, alpha * self.spectrum / (alpha**2 * self.spectrum + sigma**2) * x_t)


def exact_variances(sampler: Sampler, schedule: Schedule, spectrum: Tensor) -> list[float] | None:
    """Variance after each step, mean over pixels, of an exact denoiser of Gaussian data; nothing clipped.

    Args:
        sampler: its steps, spacing and noise.
        schedule: the noise levels.
        spectrum: eigenvalues of the data's covariance, (D,), float64.

    Returns:
        K numbers; None for samplers that need not be linear: diffusers' schedulers, and those of learned variance.
    """
    if isinstance(sampler, FromDiffusers) or sampler.reads_variance:
        return None
    # image 0 of the batch is the response to the first noise, image k + 1 to the fresh noise of step k
    responses = 1 + (sampler.steps if sampler.stochastic else 0)

    def impulse(k: int) -> Tensor:
        x = torch.zeros(responses, 1, 1, len(spectrum), dtype=torch.float64)
        if k < responses:
            x[k] = 1
        return x

    moments = replace(sampler, clip=None).trajectory(_Exact(schedule, spectrum), impulse(0), lambda k: impulse(k + 1))
    return [float(m.x_next.square().sum(0).mean()) for m in moments]


def drift(
    denoiser: Denoises,
    sampler: Sampler,
    data: Gaussian,
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    batch_size: int = 256,
    labels: Sequence[int] | None = None,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
) -> list[Row]:
    """Mean, spread and clipping of many images, after each of the K steps.

    Args:
        denoiser: of any parameterization.
        sampler: any.
        data: what the images should be like.
        seeds: one an image.
        shape: of one image, (C, H, W).
        batch_size: images at a time.
        labels: the class of each image, for a network that is told it.
        bounds: the range of images, which pixels are counted as clipped outside of where the sampler has none; None for
            latents.
    """
    schedule, bounds = denoiser.schedule, sampler.clip or bounds
    total = [_Sums() for _ in range(sampler.steps)]
    for first in range(0, len(seeds), batch_size):
        own = slice(first, first + batch_size)
        for m in _trajectory(denoiser, sampler, seeds[own], shape, None if labels is None else labels[own]):
            total[m.k].add(m, bounds)
    levels = visited(schedule, [s.t for s in total])[1:]
    exact = exact_variances(sampler, schedule, data.spectrum) or [math.nan] * sampler.steps
    rows: list[Row] = []
    for k, (sums, level, variance) in enumerate(zip(total, levels, exact, strict=True)):
        means = sums.channel_means() - level.alpha * data.mean
        row: Row = {"k": k, "t": sums.t, "t_next": total[k + 1].t if k + 1 < len(total) else -1, "images": len(seeds)}
        row |= {"mean": float(sums.channel_means().mean()), "drift": float(means.mean())}
        row |= {f"drift_{c}": float(value) for c, value in enumerate(means)}
        row |= {
            "sd": sums.sd(),
            "sd_exact": math.sqrt(variance) if variance >= 0 else math.nan,
            "sd_data": math.sqrt(level.alpha**2 * data.variance + level.sigma**2),
        }
        row |= {"clipped": sums.clipped / sums.pixels} if bounds else {}
        rows.append(row | ({"ratio_mean": sums.ratio / len(seeds)} if sums.ratio is not None else {}))
    return rows


class _Sums:
    """Running sums over the images of one step."""

    def __init__(self) -> None:
        self.t, self.count, self.pixels, self.clipped = -1, 0, 0, 0.0
        self.total = self.squares = torch.zeros((), dtype=torch.float64)
        self.ratio: float | None = None

    def add(self, m: Moment, bounds: tuple[float, float] | None) -> None:
        x = m.x_next.cpu().double()
        self.t, self.count = m.t, self.count + len(x)
        self.total = x.sum(0) + self.total
        self.squares = x.square().sum(0) + self.squares
        x0 = m.prediction.x0
        self.pixels += x0.numel()
        if bounds:
            self.clipped += float(((x0 < bounds[0]) | (x0 > bounds[1])).sum())
        if "ratio" in m.prediction.parts:
            self.ratio = (self.ratio or 0.0) + float(m.prediction.parts["ratio"].cpu().double().mean((1, 2, 3)).sum())

    def channel_means(self) -> Tensor:
        return (self.total / self.count).mean((1, 2))

    def sd(self) -> float:
        if self.count < 2:
            return math.nan
        variance = (self.squares - self.total.square() / self.count) / (self.count - 1)
        return float(variance.mean().clamp(min=0).sqrt())
