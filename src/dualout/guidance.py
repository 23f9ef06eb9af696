"""Guidance: a denoiser that wraps a denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dualout.errors import InputError
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
        null: the conditions that stand for "none", by name: tensors of one row, or numbers.
    """

    def __init__(self, denoiser: nn.Module, scale: float, **null: Tensor | float) -> None:
        super().__init__()
        if not null:
            raise InputError("guidance needs to know what stands for no condition, say class_labels=10")
        self.schedule = schedule_of(denoiser, "guidance wraps")
        self.denoiser = denoiser
        self.scale = float(scale)
        self.null = null

    if TYPE_CHECKING:  # torch's is of Any
        __call__: Callable[..., Prediction]

    def extra_repr(self) -> str:
        """What `repr` says besides the denoiser."""
        return f"scale={self.scale}"

    def forward(self, x_t: Tensor, t: int | Tensor, **conditions: Any) -> Prediction:
        """Predict under `conditions`, guided away from the unconditional prediction.

        Raises:
            InputError: where a condition that there is a null of is missing, or no tensor with a row an image.
        """
        missing = self.null.keys() - conditions.keys()
        if missing:
            raise InputError(f"guidance needs the condition {', '.join(sorted(missing))}; pass it to sample()")
        both = {name: self._beside(name, value) for name, value in conditions.items()}
        twice = torch.cat([t, t]) if isinstance(t, Tensor) and t.numel() > 1 else t
        doubled = torch.cat([x_t, x_t])
        p = self.denoiser(doubled, twice, **both)
        b = len(x_t)
        level = p.level.map(lambda v: v[:b] if isinstance(v, Tensor) and v.ndim else v)
        seen = x_t if p.x_t is doubled else self._guided(p.x_t)
        return Prediction(seen, level, self._guided(p.x0), {k: v[:b] for k, v in p.parts.items()})

    def _guided(self, both: Tensor) -> Tensor:
        given, none = both.chunk(2)
        return torch.lerp(none, given, self.scale)

    def _beside(self, name: str, value: Any) -> Any:
        if name in self.null and not (isinstance(value, Tensor) and value.ndim):
            raise InputError(f"guidance doubles the batch, so {name} is a tensor with a row an image; got {value!r}")
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        null = self.null.get(name, value)
        # a number is filled in where the others are: nothing is copied to the device
        null = null.to(value).expand_as(value) if isinstance(null, Tensor) else torch.full_like(value, null)
        return torch.cat([value, null])
