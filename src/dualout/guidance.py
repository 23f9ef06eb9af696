"""Guidance: a denoiser that wraps a denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dualout.errors import InputError
from dualout.levels import per_image
from dualout.prediction import Prediction
from dualout.schedules import schedule_of


class ClassifierFree(nn.Module):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, equation 6).

    x0 = x0(∅) + scale · (x0(condition) − x0(∅)), which at fixed x_t is the same as guiding eps. Both predictions
    come from one call of the network, on a batch of 2B. Where a calibration has corrected x_t too, x_t and eps are
    guided as x0 is; `Calibrated` goes inside, since a ratio belongs to one prediction.

    Args:
        denoiser: trained with its condition left out at times.
        scale: 0 is unconditional, 1 is plain conditional, above 1 is guided.
        interval: the noise levels, sigma / alpha from above the first number to the second, that are guided; at others
            the network is asked under the condition alone (Kynkäänniemi et al. 2024, arXiv 2404.07724). None is all.
        null: the conditions that stand for "none", by name: tensors of one row, or numbers.
    """

    def __init__(
        self, denoiser: nn.Module, scale: float, *, interval: Sequence[float] | None = None, **null: Tensor | float
    ) -> None:
        super().__init__()
        if not null:
            raise InputError("guidance needs to know what stands for no condition, say class_labels=10")
        for name, value in null.items():
            if not isinstance(value, Tensor | int | float):
                raise InputError(f"what stands for no {name} is a number or a tensor of one row; got {value!r}")
        self.schedule = schedule_of(denoiser, "guidance wraps")
        self.denoiser = denoiser
        self.scale = _number(scale)
        self.interval = None if interval is None else _checked(interval)
        self.null = null

    if TYPE_CHECKING:  # torch's is of Any
        __call__: Callable[..., Prediction]

    def extra_repr(self) -> str:
        """What `repr` says besides the denoiser."""
        return f"scale={self.scale}" + ("" if self.interval is None else f", interval={self.interval}")

    def guides(self, t: int) -> bool:
        """Whether time step `t` is guided."""
        alpha, sigma = self.schedule.scalars(t)
        return bool(self._inside(sigma / alpha))

    def forward(self, x_t: Tensor, t: int | Tensor, **conditions: Any) -> Prediction:
        """Predict under `conditions`, guided away from the unconditional prediction.

        Raises:
            InputError: where a condition that there is a null of is missing, or no tensor with a row an image.
        """
        missing = self.null.keys() - conditions.keys()
        if missing:
            raise InputError(f"guidance needs the condition {', '.join(sorted(missing))}; pass it to sample()")
        scale: Tensor | float = self.scale
        if not isinstance(t, Tensor) and not self.guides(t):
            if not self.doubles(t):
                return self.denoiser(x_t, t, **conditions)
            scale = 1.0
        both = {name: self._beside(name, value, len(x_t)) for name, value in conditions.items()}
        twice = torch.cat([t, t]) if isinstance(t, Tensor) and t.numel() > 1 else t
        doubled = torch.cat([x_t, x_t])
        p = self.denoiser(doubled, twice, **both)
        b = len(x_t)
        level = p.level.map(lambda v: v[:b] if isinstance(v, Tensor) and v.ndim else v)
        if self.interval is not None and isinstance(t, Tensor):
            alpha, sigma = self.schedule.level(t)
            scale = per_image(torch.where(self._inside(sigma / alpha), self.scale, 1.0).to(x_t), x_t)
        seen = x_t if p.x_t is doubled else _guided(p.x_t, scale)
        return Prediction(seen, level, _guided(p.x0, scale), {k: v[:b] for k, v in p.parts.items()})

    def doubles(self, t: int) -> bool:
        """Whether the network predicts twice at time step `t`, with the condition and without.

        A calibration that continues from the step before needs both predictions of that one, guided or not.
        """
        return self.guides(t) or getattr(self.denoiser, "follows", False)

    def _inside(self, noise: Any) -> Any:
        low, high = self.interval or (0.0, math.inf)
        return (noise > low) & (noise <= high)

    def _beside(self, name: str, value: Any, images: int) -> Any:
        if name in self.null and not (isinstance(value, Tensor) and value.ndim):
            raise InputError(f"guidance doubles the batch, so {name} is a tensor with a row an image; got {value!r}")
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if len(value) != images:
            if name in self.null:
                raise InputError(f"{name} has a row for each of {images} images; got {tuple(value.shape)}")
            return value
        null = self.null.get(name, value)
        if not isinstance(null, Tensor):
            # filled in where the others are: nothing is copied to the device
            return torch.cat([value, torch.full_like(value, null)])
        try:
            return torch.cat([value, null.to(value).expand_as(value)])
        except RuntimeError as error:
            wrong = f"what stands for no {name}, {tuple(null.shape)}, is one row of {tuple(value.shape)}"
            raise InputError(wrong) from error


def _guided(both: Tensor, scale: Tensor | float) -> Tensor:
    given, none = both.chunk(2)
    return torch.lerp(none, given, scale)


def _number(scale: Any) -> float:
    try:
        value = float(scale)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"the scale of guidance is a number, 1 for none; got {scale!r}")
    return value


def _checked(interval: Sequence[float]) -> tuple[float, float]:
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError) as error:
        raise InputError(f"an interval of guidance is two noise levels (low, high), got {interval!r}") from error
    if not 0 <= low < high:
        raise InputError(f"an interval of guidance has 0 <= low < high, noise levels sigma / alpha; got {interval!r}")
    return low, high
