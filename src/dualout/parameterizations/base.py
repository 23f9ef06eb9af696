"""The interface of every way to read a network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualout.errors import InputError
from dualout.levels import Level, Scalar, number
from dualout.prediction import Prediction, directly
from dualout.registry import Registered
from dualout.schedules import Schedule

Route = str | float
"""Which output to use: "mix" (all, as trained), "eps", "x0", "velocity", "flow", or a fixed ratio in [0, 1]."""


@dataclass(frozen=True)
class Parameterization(Registered, ABC):
    """What a network's raw output means.

    Letters: B images, C image channels, H×W pixels.
    """

    kind: ClassVar[str] = "parameterization"

    @property
    def learns_ratio(self) -> bool:
        """Whether two routes are blended by a learned ratio."""
        return False

    @abstractmethod
    def channels(self, image_channels: int) -> int:
        """How many channels the network must output for images of `image_channels` channels."""

    @abstractmethod
    def read(self, raw: Tensor, x_t: Tensor, level: Level) -> Prediction:
        """The prediction that follows from a raw output.

        Args:
            raw: the network's output, (B, channels(C), H, W).
            x_t: the noisy images it was given, (B, C, H, W).
            level: their noise level: floats, or tensors of one number an image, (B,) or shaped to broadcast.
        """

    @abstractmethod
    def losses(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """What training minimizes: by name, one mean over pixels and channels an image, (B,).

        Args:
            prediction: what `read` gave for x_t = alpha·x0 + sigma·eps.
            x0: the clean images, (B, C, H, W).
            eps: the noise that was applied, (B, C, H, W).
        """

    def accepts(self, image_channels: int) -> tuple[int, ...]:
        """The numbers of channels that `read` takes: `channels`, and more where some may be left unread."""
        return (self.channels(image_channels),)

    def weights(self, schedule: Schedule) -> Mapping[str, float]:
        """The weight of each of the losses in their sum; 1 where it is not named."""
        return {}

    def input_scale(self, level: Level) -> Tensor | float | None:
        """What `x_t` is multiplied with before the network sees it; None leaves it alone."""
        return None

    def head(self, schedule: Schedule) -> nn.Module | None:
        """Weights that the parameterization itself learns: a module called as ``raw = head(raw, t)``, or None."""
        return None

    def route(self, route: Route) -> Parameterization:
        """The same network read another way.

        Raises:
            InputError: when this parameterization has no such output.
        """
        if route in ("mix", self.name):
            return self
        raise InputError(
            f"a network trained with {self.name!r} has one output and one route, 'mix'; got route {route!r}. "
            "Only dual-output networks have the routes 'eps', 'x0', 'velocity', 'flow' and fixed ratios."
        )


@dataclass(frozen=True)
class SingleOutput(Parameterization, ABC):
    """One output of C channels, from which a clean image follows by an affine map.

    A kind is three equations: what is predicted, the clean image that it implies, and how far its errors carry there.
    """

    symbol: ClassVar[str]
    """The output's name among a prediction's parts and losses."""
    is_noise: ClassVar[bool] = False
    """Whether the output is the noise itself."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """What the network should output for x_t = alpha·x0 + sigma·eps."""

    @abstractmethod
    def to_x0(self, raw: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """The clean image that follows from a raw output; both (B, C, H, W)."""

    @abstractmethod
    def gain(self, level: Level) -> Scalar:
        """The factor by which an error of the output becomes an error of the clean image."""

    def channels(self, image_channels: int) -> int:
        """C."""
        return image_channels

    def read(self, raw: Tensor, x_t: Tensor, level: Level) -> Prediction:
        """A Prediction of the clean image that `to_x0` gives."""
        if raw.shape != x_t.shape:
            check_channels(raw, x_t, (x_t.shape[1],), self.name)
        level = level.over(x_t)
        p = Prediction(x_t, level, self.to_x0(raw, x_t, level), {self.symbol: raw})
        return directly(p, raw) if self.is_noise else p

    def losses(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """|target − output|²."""
        target = self.target(x0, eps, prediction.level)
        return {self.symbol: mean_square(target - prediction.parts[self.symbol])}


def subtract(eps: Tensor, x_t: Tensor, level: Level) -> Tensor:
    """The clean image that follows from a predicted noise: (x_t − sigma·eps) / alpha."""
    if isinstance(level.alpha, float) and isinstance(level.sigma, float):
        return torch.add(x_t, eps, alpha=-level.sigma).mul_(number(1 / level.alpha, x_t))
    return (x_t - level.sigma * eps) / level.alpha


def log(value: Scalar) -> Scalar:
    """The natural logarithm of a number or a tensor."""
    return value.log() if isinstance(value, Tensor) else math.log(value)


def mean_square(difference: Tensor) -> Tensor:
    """(B, …) -> (B,): the mean square of each image."""
    return difference.square().flatten(1).mean(1)


def check_channels(raw: Tensor, x_t: Tensor, allowed: tuple[int, ...], name: str) -> int:
    """Refuse an output of another shape than a parameterization reads.

    Args:
        raw: the network's output.
        x_t: the noisy images it was given, (B, C, H, W).
        allowed: the numbers of channels that are read.
        name: of the parameterization.

    Returns:
        the number of channels.

    Raises:
        InputError: unless `raw` is (B, one of `allowed`, H, W).
    """
    shape, images = raw.shape, x_t.shape
    if len(shape) < 2 or shape[1] not in allowed or shape[0] != images[0] or shape[2:] != images[2:]:
        need = " or ".join(f"({', '.join(map(str, (images[0], c, *images[2:])))})" for c in allowed)
        what = "dualout.widen gives a network more output channels"
        if len(shape) > 1 and shape[1] - images[1] in allowed:
            what = "one that learned a variance too is read by LearnedVariance"
        raise InputError(
            f"parameterization {name!r} of {images[1]}-channel images needs a network output of shape {need}, "
            f"got {tuple(shape)}; {what}"
        )
    return shape[1]


def check_losses(parts: Any, count: int, name: str) -> None:
    """Refuse losses that are not one number an image: the mean of a batch, or a map, would pass for them.

    Args:
        parts: what `Parameterization.losses` gave.
        count: B.
        name: of the parameterization.

    Raises:
        InputError: unless `parts` is one or more of (B,), by name.
    """
    shapes = {key: tuple(getattr(part, "shape", ())) for key, part in parts.items()} if isinstance(parts, dict) else {}
    if not shapes or any(shape != (count,) for shape in shapes.values()):
        raise InputError(
            f"losses() of parameterization {name!r} gives by name a number for each of {count} images, of shape "
            f"({count},), as error.square().flatten(1).mean(1) is; got {shapes or type(parts).__name__}"
        )
