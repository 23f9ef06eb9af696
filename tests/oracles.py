"""Data whose every quantity is known: what a perfect network outputs, and where perfect samplers end.

The probability-flow equation of one-dimensional data keeps every point on its quantile, F_t(x_t) = F_s(x_s): that is
its solution in closed form, whatever the schedule. Pixels are independent here, so it holds for images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import ndtr
from torch import Tensor

from dualout.denoiser import Denoiser
from dualout.levels import Level
from dualout.parameterizations import CleanImage, Parameterization
from dualout.prediction import Prediction
from dualout.schedules import FromBetas, Schedule


@dataclass(frozen=True)
class Mixture:
    """Pixels from Σ wᵢ·N(mᵢ, vᵢ); one component is a Gaussian, one of no variance a point."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]

    def belief(self, x_t: Tensor, level: Level) -> Tensor:
        """E[x0 | x_t]."""
        alpha, sigma = level.like(x_t)[:2]
        w, m, v = (
            torch.tensor(p, dtype=x_t.dtype, device=x_t.device) for p in (self.weights, self.means, self.variances)
        )
        powers, beliefs = [], []
        for k in range(len(w)):
            variance = alpha**2 * v[k] + sigma**2
            difference = x_t - alpha * m[k]
            powers.append(torch.log(w[k]) - 0.5 * torch.log(variance) - 0.5 * difference**2 / variance)
            beliefs.append(m[k] + alpha * v[k] / variance * difference)
        weight = torch.stack([p.expand_as(x_t) for p in powers]).softmax(0)
        return (weight * torch.stack(beliefs)).sum(0)

    def denoiser(self, schedule: Schedule) -> Denoiser:
        """The denoiser that makes no error."""
        return Denoiser(lambda x, t: self.belief(x, schedule.level(t)), CleanImage(), schedule)

    def flow(self, x: Tensor, t: Level[float], s: Level[float]) -> Tensor:
        """The solution of the probability-flow equation from level t to level s."""
        if len(self.weights) == 1:
            (m,), (v,) = self.means, self.variances
            spread = (s.alpha**2 * v + s.sigma**2) / (t.alpha**2 * v + t.sigma**2)
            return s.alpha * m + (x - t.alpha * m) * spread**0.5
        reach = max(map(abs, self.means)) + 12 * (max(self.variances) + s.sigma**2) ** 0.5
        quantiles = self._cumulative(x.numpy(), t)
        ends = [
            brentq(lambda y, q=q: float(self._cumulative(y, s)) - q, -reach, reach, xtol=1e-13) for q in quantiles.flat
        ]
        return torch.tensor(ends, dtype=x.dtype).view_as(x)

    def _cumulative(self, x: np.ndarray | float, level: Level[float]) -> np.ndarray:
        parts = zip(self.weights, self.means, self.variances, strict=True)
        return sum(  # type: ignore[return-value]
            w * ndtr((x - level.alpha * m) / np.sqrt(level.alpha**2 * v + level.sigma**2)) for w, m, v in parts
        )


GAUSSIAN = Mixture((1.0,), (0.3,), (0.09,))
MIXTURE = Mixture((0.3, 0.7), (-0.6, 0.5), (0.01, 0.04))


def point(value: float) -> Mixture:
    """Data that are one image."""
    return Mixture((1.0,), (value,), (0.0,))


def toy_output(x_t: Tensor, level: Level) -> Tensor:
    """Dual output with known errors (golden/README.md): (B, 2C + 1, H, W)."""
    alpha, sigma = level.like(x_t)[:2]
    x0 = 0.3 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x_t - alpha * 0.3)
    eps = (x_t - alpha * x0) / sigma
    logit = x_t.mean(1, keepdim=True) - 0.25 * torch.log(alpha**2 / sigma**2)
    return torch.cat([eps + 0.1 * torch.sin(3 * x_t), x0 + 0.1 * torch.cos(2 * x_t), logit], 1)


def toy_denoiser(schedule: Schedule, parameterization: Parameterization) -> Denoiser:
    """A denoiser around the toy network, for dual output with a ratio a pixel."""
    return Denoiser(lambda x, t: toy_output(x, schedule.level(t)), parameterization, schedule)


def perfect_output(parameterization: Parameterization, x0: Tensor, eps: Tensor, x_t: Tensor, level: Level) -> Tensor:
    """The raw output that a network of any parameterization is trained towards, found from its losses alone.

    Each head's loss is a sum of squares over its own channels, so one Newton step from anywhere ends at its minimum.
    The ratio, which has no truth of its own, stays what it was: random.
    """

    def heads(raw: Tensor) -> Tensor:
        prediction = parameterization.read(with_head(parameterization, raw), x_t, level)
        losses = parameterization.losses(prediction, x0, eps)
        return torch.stack([losses[name].sum() for name in losses.keys() & prediction.parts.keys()]).sum()

    raw = torch.randn(len(x_t), parameterization.channels(x_t.shape[1]), *x_t.shape[2:], dtype=x_t.dtype)
    raw.requires_grad_()
    (slope,) = torch.autograd.grad(heads(raw), raw, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), raw)
    return torch.where(curvature > 0, raw - slope / curvature, raw).detach()


def with_head(parameterization: Parameterization, raw: Tensor) -> Tensor:
    """A raw output after the weights that the parameterization itself learns, at their start, for T = 50."""
    head = parameterization.head(Schedule.named("cosine", steps=50))
    return raw if head is None else head(raw, torch.zeros(len(raw), dtype=torch.long))


def constant_denoiser(schedule: Schedule, x0: Tensor) -> Denoiser:
    """A denoiser that always predicts the same images."""
    return Denoiser(lambda x, t: x0.to(x.dtype).expand_as(x), CleanImage(), schedule)


def predicted(schedule: Schedule, x_t: Tensor, x0: Tensor, t: int) -> Prediction:
    """A belief put by hand."""
    return Prediction(x_t, schedule.scalars(t), x0, {})


def even_in_log_snr(steps: int, reach: float = 9.0) -> FromBetas:
    """A variance-preserving schedule whose log(alpha²/sigma²) falls evenly from `reach` to −`reach`.

    So fine that the spacings' rounding to whole steps does not limit what can be measured.
    """
    signal = torch.linspace(reach, -reach, steps, dtype=torch.float64).sigmoid()
    return FromBetas(1 - signal / torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]]))
