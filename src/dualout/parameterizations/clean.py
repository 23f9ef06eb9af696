"""The clean image is predicted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dualout.parameterizations.base import Parameterization, check_channels, mean_square
from dualout.prediction import Prediction
from dualout.schedules import Level


@dataclass(frozen=True)
class CleanImage(Parameterization):
    """x0 = x0_θ; loss |x0 − x0_θ|² (DDPM, Ho et al. 2020, section 3.2)."""

    name = "x0"
    aliases = ("clean", "sample")

    def channels(self, image_channels: int) -> int:
        """C."""
        return image_channels

    def read(self, raw: Tensor, x_t: Tensor, level: Level) -> Prediction:
        """Take it as it is."""
        check_channels(raw, x_t, (x_t.shape[1],), self.name)
        return Prediction(x_t, level, raw, {"x0": raw})

    def losses(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """|x0 − x0_θ|²."""
        return {"x0": mean_square(x0 - prediction.parts["x0"])}
