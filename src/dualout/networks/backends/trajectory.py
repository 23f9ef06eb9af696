"""All steps of a sampler, made ready for one shape of noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from dualout.errors import InputError
from dualout.networks.backends.base import Piece, in_pieces
from dualout.randomness import Draw


class FixedTrajectory(ABC):
    """Makes images as a sampler does, any number of them by what was made for one shape.

    Args:
        noise: an example, (B, C, H, W).
    """

    def __init__(self, noise: Tensor) -> None:
        self.rows, self.alike = len(noise), _alike(noise)

    @torch.no_grad()
    def sample(self, noise: Tensor, draw: Draw | None = None, **conditions: Any) -> Tensor:
        """Make images; arguments are those of `Sampler.sample`.

        Raises:
            InputError: for noise of another shape, type or device than the example.
        """
        if _alike(noise) != self.alike:
            raise InputError(f"the steps were made for {self.alike}, and this noise is {_alike(noise)}")
        noise = noise.contiguous()

        def batch(piece: Piece) -> Tensor:
            told = {name: piece(v) if isinstance(v, Tensor) and v.ndim else v for name, v in conditions.items()}
            return self._batch(piece(noise), _drawn(draw, piece), told)

        return in_pieces(batch, self.rows, len(noise))

    @abstractmethod
    def _batch(self, noise: Tensor, draw: Draw | None, conditions: dict[str, Any]) -> Tensor:
        """Images from noise of the example's shape."""


def _drawn(draw: Draw | None, piece: Piece) -> Draw | None:
    """The fresh noise of a piece."""
    return None if draw is None else lambda k: piece(draw(k))


def _alike(noise: Tensor) -> str:
    """What noise of any number of images has in common with that which the steps are made for."""
    return f"{tuple(noise.shape[1:])} of {noise.dtype} on {noise.device}"
