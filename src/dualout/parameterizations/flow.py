"""The direction from image to noise is predicted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dualout.levels import Level, Scalar
from dualout.parameterizations.base import SingleOutput


@dataclass(frozen=True)
class Flow(SingleOutput):
    """u = eps − x0; loss |u − u_θ|² (rectified flow, Liu et al. 2022, arXiv 2209.03003, equation 1)."""

    name = "flow"
    symbol = "u"

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """eps − x0."""
        return eps - x0

    def to_x0(self, raw: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """(x_t − sigma·u) / (alpha + sigma)."""
        return (x_t - level.sigma * raw) / (level.alpha + level.sigma)

    def gain(self, level: Level) -> Scalar:
        """sigma / (alpha + sigma)."""
        return level.sigma / (level.alpha + level.sigma)
