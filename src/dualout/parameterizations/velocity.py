"""The velocity is predicted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dualout.parameterizations.base import Parameterization, check_channels, mean_square
from dualout.prediction import Prediction
from dualout.schedules import Level


@dataclass(frozen=True)
class Velocity(Parameterization):
    """v = alpha·eps − sigma·x0; loss |v − v_θ|² (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""

    name = "velocity"
    aliases = ("v", "v_prediction")

    def channels(self, image_channels: int) -> int:
        """C."""
        return image_channels

    def read(self, raw: Tensor, x_t: Tensor, level: Level) -> Prediction:
        """x0 = (alpha·x_t − sigma·v) / (alpha² + sigma²)."""
        check_channels(raw, x_t, (x_t.shape[1],), self.name)
        power = level.alpha**2 + level.sigma**2
        x0 = (level.alpha / power) * x_t - (level.sigma / power) * raw
        return Prediction(x_t, level, x0, {"v": raw})

    def losses(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """|v − v_θ|²."""
        alpha, sigma, _ = prediction.level
        return {"v": mean_square(alpha * eps - sigma * x0 - prediction.parts["v"])}
