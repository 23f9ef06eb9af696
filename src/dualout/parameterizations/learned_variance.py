"""The variance of the sampling step is learned too, whatever else is predicted.

IDDPM (Nichol & Dhariwal 2021, arXiv 2102.09672):

    Σ = exp(v·log β_t + (1 − v)·log β̃_t)                     equation 15
    L_hybrid = L_simple + λ·L_vlb,   λ = 0.001                equation 16

    L_vlb = Σ_t L_t,   L_t = KL(q(x_{t−1} | x_t, x0) ‖ N(mu(x̂0, x_t), Σ)),   L_0 = −log p(x0 | x_1)

x̂0 is detached in L_vlb, which so teaches v only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dualout.errors import InputError
from dualout.levels import Level, Scalar
from dualout.parameterizations.base import Parameterization, Route, check_channels, log
from dualout.parameterizations.epsilon import Epsilon
from dualout.prediction import Prediction, directly
from dualout.schedules import Schedule


@dataclass(frozen=True)
class LearnedVariance(Parameterization):
    """Another parameterization, and C channels more for v; channels [those of `base`, v (C)].

    The network gives 2v − 1, as IDDPM's do, so that a new output of 0 is the geometric middle; v is not clipped.
    ``DDPM(variance="learned")`` uses it, between the β̃ and β of its own K steps. Other samplers warn, once, that they
    do not.

    Attributes:
        base: what is predicted besides; noise in the paper.
        weight: λ. L_vlb is in bits a pixel and channel, and the sum over all T steps, as in the paper's code.
    """

    name = "learned"

    base: Parameterization = field(default_factory=Epsilon)
    weight: float = 0.001

    def __post_init__(self) -> None:
        self.check_types()
        if not isinstance(self.base, Parameterization) or isinstance(self.base, LearnedVariance):
            raise InputError(f"a learned variance is added to another parameterization, say Dual(); got {self.base!r}")
        if not 0 <= self.weight < math.inf:
            raise InputError(f"the weight of L_vlb is a number, 0 or more; got {self.weight!r}")

    @property
    def learns_ratio(self) -> bool:
        """As `base` does."""
        return self.base.learns_ratio

    def channels(self, image_channels: int) -> int:
        """C more than `base` has."""
        return self.base.channels(image_channels) + image_channels

    def accepts(self, image_channels: int) -> tuple[int, ...]:
        """C more than `base` accepts."""
        return tuple(n + image_channels for n in self.base.accepts(image_channels))

    def input_scale(self, level: Level) -> Tensor | float | None:
        """That of `base`."""
        return self.base.input_scale(level)

    def head(self, schedule: Schedule) -> nn.Module | None:
        """That of `base`, for its channels."""
        head = self.base.head(schedule)
        return None if head is None else _Head(self, head)

    def read(self, raw: Tensor, x_t: Tensor, level: Level) -> Prediction:
        """As `base` does; v is the part `variance`."""
        channels = x_t.shape[1]
        check_channels(raw, x_t, self.accepts(channels), self.name)
        p = self.base.read(raw[:, :-channels], x_t, level)
        parts = {**p.parts, "variance": (raw[:, -channels:] + 1) / 2}
        return directly(replace(p, parts=parts), p.direct)

    def losses(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """Those of `base`, and L_t."""
        return {**self.base.losses(prediction, x0, eps), "vlb": bound(prediction, x0)}

    def weights(self, schedule: Schedule) -> Mapping[str, float]:
        """Those of `base`; λ·T for L_t, whose mean over t is a T-th of L_vlb."""
        return {**self.base.weights(schedule), "vlb": self.weight * schedule.steps}

    def route(self, route: Route) -> Parameterization:
        """A route of `base`, with the same variance."""
        return self if route in ("mix", self.name) else replace(self, base=self.base.route(route))


def base_of(parameterization: Parameterization) -> Parameterization:
    """What is predicted besides a learned variance; where none is learned, the parameterization itself."""
    return parameterization.base if isinstance(parameterization, LearnedVariance) else parameterization


def rebased(parameterization: Parameterization, base: Parameterization) -> Parameterization:
    """Another parameterization in the place of `base_of`; a learned variance stays."""
    return replace(parameterization, base=base) if isinstance(parameterization, LearnedVariance) else base


class _Head(nn.Module):
    """The head of the other parameterization, before the channels of v."""

    def __init__(self, parameterization: LearnedVariance, base: nn.Module) -> None:
        super().__init__()
        self.parameterization, self.base = parameterization, base

    def forward(self, raw: Tensor, t: Tensor) -> Tensor:
        """(B, channels(C), H, W), (B,) -> (B, accepts(C), H, W)."""
        channels = next(c for c in range(1, raw.shape[1]) if self.parameterization.channels(c) == raw.shape[1])
        return torch.cat([self.base(raw[:, :-channels], t), raw[:, -channels:]], 1)


def log_variance(v: Tensor, large: Scalar, small: Scalar) -> Tensor:
    """log Σ = v·log β + (1 − v)·log β̃ (equation 15)."""
    return log(small) + v * (log(large) - log(small))


def bound(prediction: Prediction, x0: Tensor) -> Tensor:
    """L_t, in bits a pixel and channel: (B,). Its gradient reaches the variance only.

    Args:
        prediction: with the part `variance`, at a level of a schedule.
        x0: the clean images; L_0 takes them for 8-bit ones in [−1, 1].
    """
    q = prediction.level.posterior
    if q is None:
        raise InputError("L_vlb needs levels from Schedule.level, which know the step to the level before")
    predicted = prediction.x0.detach()
    log_p, log_q = log_variance(prediction.parts["variance"], q.large, q.small), log(q.small)
    # the means differ by what x0 is weighted with: both hold the same x_t
    apart = q.gain * (x0 - predicted)
    kl = 0.5 * (log_p - log_q - 1 + (log_q - log_p).exp() + apart**2 * (-log_p).exp())
    # the mean of the last step is x̂0 itself, and no other gain is 1
    first = torch.as_tensor(q.gain, device=x0.device) == 1
    nats = torch.where(first, -log_likelihood(x0, predicted, log_p), kl)
    return nats.flatten(1).mean(1) / math.log(2)


def log_likelihood(x0: Tensor, mean: Tensor, log_sigma2: Tensor) -> Tensor:
    """log of the probability that a Gaussian gives to the 8-bit bin of each value (DDPM, equation 13).

    Bins are 2/255 wide; those of −1 and 1 reach to infinity.
    """
    precision = (-0.5 * log_sigma2).exp()
    above, below = (x0 + 1 / 255 - mean) * precision, (x0 - 1 / 255 - mean) * precision
    # Φ(above) − Φ(below), taken in the left tail, where neither is near 1
    right = above + below > 0
    high, low = _log_ndtr(torch.where(right, -below, above)), _log_ndtr(torch.where(right, -above, below))
    between = high + (-torch.expm1((low - high).clamp(max=-torch.finfo(x0.dtype).eps))).log()
    return torch.where(x0 < -0.999, _log_ndtr(above), torch.where(x0 > 0.999, _log_ndtr(-below), between))


def _log_ndtr(x: Tensor) -> Tensor:
    """log Φ(x)."""
    # torch has none for Apple's GPUs
    return torch.special.log_ndtr(x.cpu()).to(x.device) if x.device.type == "mps" else torch.special.log_ndtr(x)
