"""The noise is predicted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dualout.parameterizations.base import Parameterization, check_channels, mean_square, subtract
from dualout.prediction import Prediction
from dualout.schedules import Level


@dataclass(frozen=True)
class Epsilon(Parameterization):
    """x0 = (x_t − sigma·eps) / alpha; loss |eps − eps_θ|² (DDPM, Ho et al. 2020, equation 14)."""

    name = "eps"
    aliases = ("epsilon", "noise")

    def channels(self, image_channels: int) -> int:
        """C."""
        return image_channels

    def read(self, raw: Tensor, x_t: Tensor, level: Level) -> Prediction:
        """Subtract the noise."""
        check_channels(raw, x_t, (x_t.shape[1],), self.name)
        return Prediction(x_t, level, subtract(raw, x_t, level), {"eps": raw}, direct=raw)

    def losses(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """|eps − eps_θ|²."""
        return {"eps": mean_square(eps - prediction.parts["eps"])}
