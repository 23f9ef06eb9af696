"""The noise is predicted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dualout.levels import Level, Scalar
from dualout.parameterizations.base import SingleOutput, subtract


@dataclass(frozen=True)
class Epsilon(SingleOutput):
    """x0 = (x_t − sigma·eps) / alpha; loss |eps − eps_θ|² (DDPM, Ho et al. 2020, equation 14)."""

    name = "eps"
    aliases = ("epsilon", "noise")
    symbol = "eps"
    is_noise = True

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """eps."""
        return eps

    def to_x0(self, raw: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """(x_t − sigma·eps) / alpha."""
        return subtract(raw, x_t, level)

    def gain(self, level: Level) -> Scalar:
        """sigma / alpha."""
        return level.sigma / level.alpha
