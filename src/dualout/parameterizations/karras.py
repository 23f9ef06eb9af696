"""The preconditioning of EDM, at any signal scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dualout.errors import InputError
from dualout.levels import Level, Scalar
from dualout.parameterizations.base import SingleOutput


@dataclass(frozen=True)
class Karras(SingleOutput):
    """x0 = c_skip·x_t + c_out·F(c_in·x_t); loss |F − F*|² (Karras et al. 2022, arXiv 2206.00364, table 1).

    The paper's coefficients are for x0 + σ·eps; here x_t / alpha takes that place and σ = sigma / alpha, which
    gives, with p² = sigma² + alpha²·sigma_data²:

        c_skip = alpha·sigma_data² / p²,   c_out = sigma·sigma_data / p,   c_in = 1 / p

    The loss is the paper's: its weight λ = 1 / c_out² turns |x0 − x0_θ|² into |F − F*|². With sigma_data = 1 and a
    variance-preserving schedule, F is −v.
    """

    aliases = ("edm",)
    symbol = "F"

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        self.check_types()
        if not 0 < self.sigma_data < math.inf:
            raise InputError(f"sigma_data is the standard deviation of the images, above 0; got {self.sigma_data}")

    def _coefficients(self, level: Level) -> tuple[Scalar, Scalar, Scalar]:
        power = level.sigma**2 + (level.alpha * self.sigma_data) ** 2
        c_in = power**-0.5
        return level.alpha * self.sigma_data**2 / power, level.sigma * self.sigma_data * c_in, c_in

    def input_scale(self, level: Level) -> Tensor | float | None:
        """c_in."""
        return self._coefficients(level)[2]

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """F* = (x0 − c_skip·x_t) / c_out."""
        alpha, sigma = level
        c_in = self._coefficients(level)[2]
        # with x_t = alpha·x0 + sigma·eps put in: no difference of nearly equal numbers is divided by c_out
        return c_in * (sigma / self.sigma_data * x0 - alpha * self.sigma_data * eps)

    def to_x0(self, raw: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """c_skip·x_t + c_out·F."""
        c_skip, c_out, _ = self._coefficients(level)
        return c_skip * x_t + c_out * raw

    def gain(self, level: Level) -> Scalar:
        """c_out."""
        return self._coefficients(level)[1]
