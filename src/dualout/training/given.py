"""Batches of images that somebody else's loader gives, with what the network is told of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.networks.trace import call
from dualout.training.noised import Bins, Noised

Batches = Iterable[Any]
"""Of images (B, C, …), or of pairs of images and {name: condition}."""


class Given(NamedTuple):
    """A batch of somebody's own, where the network is."""

    first: int
    """The number of its first image, from 0."""
    x0: Tensor
    """(B, C, …)."""
    conditions: dict[str, Any]

    def noised(self, bin: int | np.ndarray, bins: Bins) -> Noised:
        """At times of these bins, of all of them or of each, (B,)."""
        number = bin if isinstance(bin, int) else 0
        return bins.draw(bin, self.x0, self.numbers, number, self.conditions)

    @property
    def numbers(self) -> np.ndarray:
        """Of its images."""
        return self.first + np.arange(len(self.x0))


def first(given: Iterator[Given], count: int) -> Iterator[Given]:
    """Batches of so many images or more."""
    while count > 0 and (batch := next(given, None)):
        count -= len(batch.x0)
        yield batch


def read(denoiser: Denoiser, batches: Batches, name: str) -> Iterator[Given]:
    """Batches, one after the other; what cannot be used is refused by the number of its batch.

    Args:
        denoiser: whose network is called with the first batch of each shape.
        batches: given ones.
        name: of the argument.

    Raises:
        InputError: for what is no batch, for images that are not finite, or a network that cannot be called so.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        got = "one tensor: say images.split(64)" if isinstance(batches, Tensor) else type(batches).__name__
        raise InputError(f"{name} is an iterable of batches, such as a DataLoader; got {got}")
    device, middle = denoiser.times.device, denoiser.schedule.steps // 2
    seen, called = 0, set()
    for number, batch in enumerate(batches, 1):
        x0, conditions = _pair(batch, at := f"batch {number} of {name}")
        x0 = x0.to(device, torch.float32)
        conditions = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in conditions.items()}
        if not x0.isfinite().all():
            raise InputError(f"{at} has images with values that are not finite")
        shapes = {k: tuple(v.shape) for k, v in conditions.items() if isinstance(v, Tensor)}
        if (shape := (x0.shape, *shapes.items())) not in called:
            called.add(shape)
            try:
                call(denoiser.network, (x0, torch.full((len(x0),), middle, device=device), conditions))  # type: ignore[arg-type]
            except InputError as error:
                raise InputError(f"{at}: {error}; conditions: {shapes or 'none'}") from error
        yield Given(seen, x0, conditions)
        seen += len(x0)
    if not seen:
        raise InputError(f"{name} is empty; an iterator that was gone through before has nothing left")


def _pair(batch: Any, at: str) -> tuple[Tensor, dict[str, Any]]:
    """Images, and what the network is told of them."""
    x0, *more = batch if isinstance(batch, tuple | list) and batch else (batch,)
    if not isinstance(x0, Tensor) or len(more) > 1 or not all(isinstance(c, Mapping) for c in more):
        kinds = ", ".join(type(part).__name__ for part in (x0, *more))
        raise InputError(
            f"{at} is of {kinds}. A batch is a tensor of images, or (images, {{name: condition}}), say "
            '((x, {"class_labels": y}) for x, y in loader)'
        )
    if not x0.is_floating_point() or x0.ndim < 2 or not x0.numel():
        raise InputError(
            f"{at}: images are floats (B, C, …), in [−1, 1] if they are of pixels; got {x0.dtype} {tuple(x0.shape)}"
        )
    return x0, dict(more[0]) if more else {}
