"""The direction from image to noise is predicted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dualout.parameterizations.base import Parameterization, check_channels, mean_square
from dualout.prediction import Prediction
from dualout.schedules import Level


@dataclass(frozen=True)
class Flow(Parameterization):
    """u = eps − x0; loss |u − u_θ|² (rectified flow, Liu et al. 2022, arXiv 2209.03003, equation 1)."""

    name = "flow"

    def channels(self, image_channels: int) -> int:
        """C."""
        return image_channels

    def read(self, raw: Tensor, x_t: Tensor, level: Level) -> Prediction:
        """x0 = (x_t − sigma·u) / (alpha + sigma)."""
        check_channels(raw, x_t, (x_t.shape[1],), self.name)
        x0 = (x_t - level.sigma * raw) / (level.alpha + level.sigma)
        return Prediction(x_t, level, x0, {"u": raw})

    def losses(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """|u − u_θ|²."""
        return {"u": mean_square(eps - x0 - prediction.parts["u"])}
