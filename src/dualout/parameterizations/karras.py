"""The preconditioning of EDM, at any signal scale."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dualout.errors import InputError
from dualout.parameterizations.base import Parameterization, check_channels, mean_square
from dualout.prediction import Prediction
from dualout.schedules import Level, Scalar


@dataclass(frozen=True)
class Karras(Parameterization):
    """x0 = c_skip·x_t + c_out·F(c_in·x_t); loss |F − F*|² (Karras et al. 2022, arXiv 2206.00364, table 1).

    The paper's coefficients are for x0 + σ·eps; here x_t / alpha takes that place and σ = sigma / alpha, which
    gives, with p² = sigma² + alpha²·sigma_data²:

        c_skip = alpha·sigma_data² / p²,   c_out = sigma·sigma_data / p,   c_in = 1 / p

    The loss is the paper's: its weight λ = 1 / c_out² turns |x0 − x0_θ|² into |F − F*|². With sigma_data = 1 and a
    variance-preserving schedule, F is −v.
    """

    aliases = ("edm",)

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise InputError(f"sigma_data is the standard deviation of the images, above 0; got {self.sigma_data}")

    def channels(self, image_channels: int) -> int:
        """C."""
        return image_channels

    def _coefficients(self, level: Level) -> tuple[Scalar, Scalar, Scalar]:
        power = level.sigma**2 + (level.alpha * self.sigma_data) ** 2
        c_in = power**-0.5
        return level.alpha * self.sigma_data**2 / power, level.sigma * self.sigma_data * c_in, c_in

    def input_scale(self, level: Level) -> Tensor | float | None:
        """c_in."""
        return self._coefficients(level)[2]

    def read(self, raw: Tensor, x_t: Tensor, level: Level) -> Prediction:
        """x0 = c_skip·x_t + c_out·F."""
        check_channels(raw, x_t, (x_t.shape[1],), self.name)
        c_skip, c_out, _ = self._coefficients(level)
        return Prediction(x_t, level, c_skip * x_t + c_out * raw, {"F": raw})

    def losses(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """|F − F*|², F* = (x0 − c_skip·x_t) / c_out."""
        alpha, sigma, _ = prediction.level
        c_in = self._coefficients(prediction.level)[2]
        # F* with x_t = alpha·x0 + sigma·eps put in: no difference of nearly equal numbers is divided by c_out
        target = c_in * (sigma / self.sigma_data * x0 - alpha * self.sigma_data * eps)
        return {"F": mean_square(target - prediction.parts["F"])}
