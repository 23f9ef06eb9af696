"""Noise levels: how much signal and how much noise an image holds.

``x_t = alpha · x0 + sigma · eps``; a clean image has alpha 1 and sigma 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Self

import torch
from torch import Tensor
from torch.func import debug_unwrap
from typing_extensions import TypeVar

Scalar = Tensor | float
Number = TypeVar("Number", bound=Tensor | float, default=Tensor | float, covariant=True)

HALF = frozenset((torch.float16, torch.bfloat16))
"""Types that noise levels, and images on their way, are never computed in."""

_numbers: dict[tuple[float, torch.dtype], Tensor] = {}


def number(value: Scalar, like: Tensor) -> Tensor:
    """A number to multiply `like` with, as a tensor without dimensions.

    torch makes one of a Python number too, and casts it, each time: at the size of one image that is half of the time
    of the product. These are kept.
    """
    if not isinstance(value, float):  # a tensor, of a step that is compiled
        return torch.as_tensor(value)
    key = value, like.dtype
    found = _numbers.get(key)
    if found is None:
        # on the CPU, from where a kernel on any device takes it as an argument
        with torch.inference_mode(False):
            found = torch.tensor(value, dtype=like.dtype, device="cpu")
        if lasting(found):
            if len(_numbers) >= 10_000:
                _numbers.clear()
            _numbers[key] = found
    return found


def lasting(x: Tensor) -> bool:
    """Whether a tensor may be kept for later calls: those of a tracer, or of a transformation (`torch.func.jvp`), end
    with it."""
    return type(x) is Tensor and (torch.compiler.is_compiling() or debug_unwrap(x) is x)


class Posterior(NamedTuple, Generic[Number]):
    """q(x_{t−1} | x_t, x0) over one of the T steps (DDPM, Ho et al. 2020, equations 6 and 7)."""

    gain: Number
    """Of x0 in its mean: √ᾱ_{t−1}·β_t/(1−ᾱ_t). It is 1 at t = 0, and less elsewhere."""
    large: Number
    """β_t: the variance that the step adds."""
    small: Number
    """β̃_t = β_t·(1−ᾱ_{t−1})/(1−ᾱ_t): its variance; at t = 0, where there is none, that of t = 1."""


class _Scales(NamedTuple, Generic[Number]):
    alpha: Number
    sigma: Number


class Level(_Scales[Number], Generic[Number]):
    """A noise level: ``x_t = alpha · x0 + sigma · eps``; ``alpha, sigma = level``.

    Each entry is one number for the whole batch (a float or a 0-d tensor) or a tensor with one number an image.
    """

    posterior: Posterior[Number] | None = None
    """The step to the level before; levels that are none of a schedule's know of none."""

    def __new__(cls, alpha: Number, sigma: Number, posterior: Posterior[Number] | None = None) -> Self:
        """A level of three entries, of which two are unpacked."""
        level = super().__new__(cls, alpha, sigma)
        level.posterior = posterior
        return level

    @property
    def gain(self) -> Number | None:
        """Of x0 in the posterior's mean."""
        return None if self.posterior is None else self.posterior.gain

    def map(self, change: Callable[[Any], Any]) -> Level[Any]:
        """The level with each of its numbers changed."""
        posterior = None if self.posterior is None else Posterior(*map(change, self.posterior))
        return Level(change(self.alpha), change(self.sigma), posterior)

    def like(self, x: Tensor) -> Level:
        """The same level, shaped to multiply a batch `x` of shape (B, …), in its dtype and on its device."""
        return self.map(lambda value: _like(value, x))

    def over(self, x: Tensor) -> Level:
        """The same level, as `like` gives it where it has one number for each image, (B,).

        Those would be multiplied with the pixels of a row, without a word where images are as wide as they are many.
        """
        sigma = self.sigma
        return self.like(x) if isinstance(sigma, Tensor) and sigma.ndim not in (0, x.ndim) else self


CLEAN = Level(1.0, 0.0)


def _like(value: Scalar, x: Tensor) -> Scalar:
    if not isinstance(value, Tensor):
        return value
    value = value.to(device=x.device, dtype=x.dtype)
    return value if value.ndim in (0, x.ndim) else per_image(value, x)


def per_image(numbers: Tensor, x: Tensor) -> Tensor:
    """One number an image, (B,), or one for all, shaped to broadcast against a batch `x` of shape (B, …)."""
    return numbers.view(-1, *[1] * (x.ndim - 1))
