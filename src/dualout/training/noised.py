"""Images with noise, at time steps of given bins of t: what new rows are solved with, and what opens a gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualout.data import pixels
from dualout.data.dataset import Dataset
from dualout.denoiser import Denoiser
from dualout.levels import Level
from dualout.randomness import mix, noise

_ORDER, _TIME, _NOISE = 0x6F72646572, 0x74, 0x6E


class Noised(NamedTuple):
    """A batch of images with noise, at time steps that are all of one bin, or each of its own."""

    bin: int | Tensor
    """The bin of t that all are of, or that each is of, (B,), on the processor."""
    x0: Tensor
    """(B, C, H, W)."""
    t: Tensor
    """(B,)."""
    noise: Tensor
    """(B, C, H, W)."""
    conditions: dict[str, Any]
    """What the network is told besides, by name."""

    def seen_by(self, denoiser: Denoiser) -> tuple[Tensor, Tensor, Level]:
        """The network's raw output for the noisy images, these images x_t, and their noise levels."""
        level = denoiser.schedule.level_for(self.x0, self.t)
        x_t = level.alpha * self.x0 + level.sigma * self.noise
        return denoiser.raw(x_t, self.t, level, **self.conditions), x_t, level


def bin_edges(steps: int, bins: int) -> list[int]:
    """The first t of each bin, and T."""
    return [round(b * steps / bins) for b in range(bins + 1)]


@dataclass(frozen=True)
class Bins:
    """Bins of t, and the seed of what is drawn in them."""

    steps: int
    """T."""
    count: int
    seed: int

    def draw(
        self, bin: int | np.ndarray, x0: Tensor, rows: np.ndarray, number: int, conditions: dict[str, Any]
    ) -> Noised:
        """Draw a time step of a bin, and noise, for each image of a batch.

        Args:
            bin: of all of them, or of each, (B,).
            x0: the images.
            rows: a number for each image, (B,).
            number: what else the draws depend on.
            conditions: what the network is told besides.
        """
        bounds = np.array(bin_edges(self.steps, self.count))
        low, high = bounds[bin], bounds[bin + 1]
        within = mix(self.seed, _TIME, number, rows) % np.asarray(high - low, dtype=np.uint64)
        t = torch.from_numpy(low + within.astype(np.int64)).to(x0.device)
        eps = noise(mix(self.seed, _NOISE, number, rows), x0.shape[1:], device=x0.device)
        return Noised(bin if isinstance(bin, int) else torch.from_numpy(bin), x0, t, eps, conditions)


class Stream:
    """Noised images of a dataset, the same ones each time: bin after bin, each of one bin of t.

    Args:
        dataset: the images.
        rows: which of them, in order.
        bins: of t.
        device: where they go.
        conditional: whether the network is told classes.
        each: every image in every bin; False takes the images in turn, each in one bin.
        batch_size: images at a time, at most: where each is in one bin, so few that no bin is left out.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        bins: Bins,
        device: torch.device,
        *,
        conditional: bool = False,
        each: bool = True,
        batch_size: int = 64,
    ) -> None:
        self.dataset, self.rows, self.bins, self.device = dataset, rows, bins, device
        self.conditional, self.each = conditional, each
        self.batch_size = batch_size if each else min(batch_size, max(1, len(rows) // bins.count))

    def __len__(self) -> int:
        blocks = -(-len(self.rows) // self.batch_size)
        return blocks * self.bins.count if self.each else blocks

    def __iter__(self) -> Iterator[Noised]:
        blocks = [self.rows[i : i + self.batch_size] for i in range(0, len(self.rows), self.batch_size)]
        if self.each:
            yield from (self._noised(b, rows, b) for b in range(self.bins.count) for rows in blocks)
        else:
            yield from (self._noised(k % self.bins.count, rows, k) for k, rows in enumerate(blocks))

    def _noised(self, bin: int, rows: np.ndarray, number: int) -> Noised:
        x0 = pixels.to_model(self.dataset.batch(rows)).to(self.device)
        conditions: dict[str, Any] = {}
        if self.conditional and self.dataset.labels is not None:
            conditions["class_labels"] = self.dataset.labels[torch.from_numpy(rows)].to(self.device)
        return self.bins.draw(bin, x0, rows, number, conditions)


def shuffled(count: int, seed: int) -> np.ndarray:
    """0 … count − 1 in an order that follows from the seed."""
    return np.argsort(mix(seed, _ORDER, np.arange(count)), kind="stable")
