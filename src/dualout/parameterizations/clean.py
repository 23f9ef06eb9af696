"""The clean image is predicted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dualout.levels import Level, Scalar
from dualout.parameterizations.base import SingleOutput


@dataclass(frozen=True)
class CleanImage(SingleOutput):
    """x0 = x0_θ; loss |x0 − x0_θ|² (DDPM, Ho et al. 2020, section 3.2)."""

    name = "x0"
    aliases = ("clean", "sample")
    symbol = "x0"

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """x0."""
        return x0

    def to_x0(self, raw: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """The output as it is."""
        return raw

    def gain(self, level: Level) -> Scalar:
        """1."""
        return 1.0
