"""Random numbers that depend on what they are for and on nothing else.

Image i is made from seed i: not from the batch it is in, the process that makes it, or what was made before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualout.errors import InputError

Draw = Callable[[int], Tensor]
"""The fresh noise of step k, (B, C, H, W)."""


def mix(seed: int, *values: int | np.ndarray) -> np.ndarray:
    """Hash a seed with further integers (or arrays of them) into seeds of 64 bits, by splitmix64's finalizer.

    Neighbouring inputs give unrelated outputs, so that (seed, step, index) can be numbers counted from 0.
    """
    with np.errstate(over="ignore"):
        state = _finalize(np.asarray(int(seed) % 2**64, dtype=np.uint64))
        for value in values:
            state = _finalize(state + np.asarray(value).astype(np.uint64) * np.uint64(0xD1342543DE82EF95))
    return state


def check_seed(seed: int) -> None:
    """Refuse a seed of everything that torch's and numpy's generators do not take; seeds of single images are any.

    Raises:
        InputError: for one below 0, or of more than 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed is a whole number from 0 to {2**64 - 1}; got {seed}")


def _finalize(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def noise(
    seeds: Sequence[int] | np.ndarray | Tensor,
    shape: Sequence[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, one seed an image.

    Args:
        seeds: B integers of any sign; those that are equal modulo 2⁶⁴ are the same, -1 and 2⁶⁴ − 1.
        shape: the shape of one image, (C, H, W).
        device: where the result goes, None is torch's default device; it is drawn on the CPU, so that every device gets
            the same numbers.
        dtype: of the result; it is drawn in float32 (float64 when that is asked for).

    Returns:
        noise of shape (B, C, H, W).

    Raises:
        InputError: for seeds that are not a list of integers, or a shape that is not one of integers above 0.
    """
    seeds, shape = _whole(seeds), _shape_of(shape)
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty((len(seeds), *shape), dtype=drawn, device="cpu")
    generator = torch.Generator("cpu")
    for row, seed in zip(out, seeds, strict=True):
        generator.manual_seed(seed % 2**64)
        torch.randn(row.shape, generator=generator, out=row, dtype=drawn, device="cpu")
    return out.to(device=torch.get_default_device() if device is None else device, dtype=dtype)


def _whole(seeds: Iterable[Any]) -> list[int]:
    try:
        return [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise InputError(f"seeds are whole numbers, one an image, say range(16); got {seeds!r}") from error


def _shape_of(shape: Iterable[Any]) -> tuple[int, ...]:
    try:
        sides = tuple(operator.index(side) for side in shape)
    except TypeError:
        sides = (0,)
    if not all(side > 0 for side in sides):
        raise InputError(f"shape is that of one image, (C, H, W); got {shape!r}")
    return sides


class SeededDraw:
    """The fresh noise of every step of a stochastic sampler, one seed an image.

    Args:
        seeds: B integers, those that made the first noise, taken as `noise` takes them.
        shape: the shape of one image, (C, H, W).

    Raises:
        InputError: as `noise`.
    """

    def __init__(
        self,
        seeds: Sequence[int] | np.ndarray | Tensor,
        shape: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.seeds, self.shape, self.device, self.dtype = _whole(seeds), _shape_of(shape), device, dtype

    def at(self, k: int) -> np.ndarray:
        """The B seeds of step k."""
        return np.array([mix(seed, k + 1) for seed in self.seeds], dtype=np.uint64)

    def __call__(self, k: int) -> Tensor:
        """The fresh noise of step k, (B, C, H, W)."""
        return noise(self.at(k), self.shape, device=self.device, dtype=self.dtype)
