"""The pixels themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dualout.data.pixels import to_model
from dualout.errors import InputError
from dualout.evaluation.features.base import Features

MOST = 4096
"""The largest D: a covariance of 4096² float64 takes 128 MiB."""


@dataclass(frozen=True)
class Pixels(Features):
    """Pixels in [−1, 1], averaged in squares of `pool` × `pool`.

    No network can flatter or miss anything here; on the other hand nothing is known of what images show.
    """

    pool: int = 1

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise InputError(f"pixels are averaged in squares of pool × pool, pool >= 1; got {self.pool}")

    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Refuse sizes that `pool` does not divide, and more than 4096 numbers an image."""
        if size[0] % self.pool or size[1] % self.pool:
            raise InputError(f"pixels:pool={self.pool} does not divide images of {size[0]}×{size[1]}")
        count = channels * size[0] * size[1] // self.pool**2
        if count > MOST:
            raise InputError(
                f"{count} pixels an image are too many for a covariance matrix (at most {MOST}); average them, "
                f"with pixels:pool={2 * self.pool}, say"
            )

    def extract(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> (B, C·H·W / pool²)."""
        x = to_model(images)
        return (F.avg_pool2d(x, self.pool) if self.pool > 1 else x).flatten(1)
