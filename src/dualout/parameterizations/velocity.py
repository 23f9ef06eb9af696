"""The velocity is predicted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dualout.levels import Level, Scalar
from dualout.parameterizations.base import SingleOutput


@dataclass(frozen=True)
class Velocity(SingleOutput):
    """v = alpha·eps − sigma·x0; loss |v − v_θ|² (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""

    name = "velocity"
    aliases = ("v", "v_prediction")
    symbol = "v"

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """alpha·eps − sigma·x0."""
        return level.alpha * eps - level.sigma * x0

    def to_x0(self, raw: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """(alpha·x_t − sigma·v) / (alpha² + sigma²)."""
        power = level.alpha**2 + level.sigma**2
        return (level.alpha / power) * x_t - (level.sigma / power) * raw

    def gain(self, level: Level) -> Scalar:
        """sigma / (alpha² + sigma²)."""
        return level.sigma / (level.alpha**2 + level.sigma**2)
