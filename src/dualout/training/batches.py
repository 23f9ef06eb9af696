"""Batches with all that is random in them, made ahead of the step that needs them."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualout.data import loader, order
from dualout.training import draws

if TYPE_CHECKING:
    from dualout.data.dataset import Dataset
    from dualout.training.config import TrainConfig

AHEAD = 3
"""How many batches are ready."""


class Batch(NamedTuple):
    """One process's part of a batch, B images."""

    samples: np.ndarray
    """The number of each sample, counted over the whole run, (B,)."""
    images: Tensor
    """(B, C, H, W), float32 in [−1, 1], or uint8."""
    t: Tensor
    """The time step of each, (B,)."""
    noise: Tensor
    """(B, C, H, W)."""
    conditions: dict[str, Tensor]
    """What the network is told besides: ``class_labels`` (B,), where the highest number stands for no class."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """With each of its tensors changed."""
        conditions = {k: change(v) for k, v in self.conditions.items()}
        return Batch(self.samples, change(self.images), change(self.t), change(self.noise), conditions)

    def to(self, device: torch.device) -> Batch:
        """On a device."""
        # Apple's GPUs would still be reading when the processor has made something else of that memory
        ahead = device.type != "mps"
        return self.map(lambda v: v.to(device, non_blocking=ahead))

    def pinned(self) -> Batch:
        """In memory that a GPU copies from without waiting."""
        return self.map(Tensor.pin_memory)

    def cut(self, start: int, stop: int) -> Batch:
        """Of the images start … stop − 1."""
        return self._replace(samples=self.samples[start:stop]).map(lambda v: v[start:stop])


class Batches:
    """The batches of a run, from any step on.

    Args:
        dataset: the images.
        config: of the training.
        times: T.
        rank: which of the processes this is.
        processes: how many there are.
        cuda: whether they go to a GPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: TrainConfig,
        times: int,
        *,
        rank: int = 0,
        processes: int = 1,
        cuda: bool = False,
    ) -> None:
        self.dataset, self.config, self.times = dataset, config, times
        self.rank, self.processes, self.cuda = rank, processes, cuda

    def after(self, step: int) -> Generator[list[Batch], None, None]:
        """The batches of steps step + 1, step + 2 … `config.steps`, each in `config.accumulate` parts."""
        config = self.config
        shown = loader.Loader(
            self.dataset,
            config.batch_size,
            seed=config.seed,
            flip=config.flip,
            # a GPU is sent a quarter of the bytes
            floats=not self.cuda,
            rank=self.rank,
            world=self.processes,
        )
        loaded = shown.batches(step, config.steps, workers=config.workers)
        # as in the loader: then threads have ended already, and globals may be gone
        ending = sys.is_finalizing
        pool = ThreadPoolExecutor(1, thread_name_prefix="noise")
        coming = deque(pool.submit(lambda: self._prepared(next(loaded, None))) for _ in range(AHEAD))
        try:
            while (parts := coming.popleft().result()) is not None:
                coming.append(pool.submit(lambda: self._prepared(next(loaded, None))))
                yield parts
        finally:
            if not ending():
                pool.shutdown(wait=True, cancel_futures=True)
            loaded.close()

    def _prepared(self, batch: loader.Batch | None) -> list[Batch] | None:
        if batch is None:
            return None
        seed, samples = self.config.seed, batch.samples
        whole = Batch(
            samples,
            batch.images,
            torch.from_numpy(draws.times(seed, samples, self.times)),
            draws.noise(seed, samples, tuple(batch.images.shape[1:])),
            self._conditions(batch),
        )
        size = len(samples) // self.config.accumulate
        parts = [whole.cut(start, start + size) for start in range(0, size * self.config.accumulate, size)]
        return [part.pinned() for part in parts] if self.cuda else parts

    def _conditions(self, batch: loader.Batch) -> dict[str, Tensor]:
        if not self.config.conditional or batch.labels is None:
            return {}
        hidden = torch.from_numpy(draws.withheld(self.config.seed, batch.samples, self.config.label_dropout))
        return {"class_labels": torch.where(hidden, len(self.dataset.classes), batch.labels)}


def images_of(step: int, dataset: Dataset, config: TrainConfig) -> list[int]:
    """Which images of the dataset are in the batch of this step, counted from 1, over all processes."""
    size = config.batch_size
    return order.indices(config.seed, len(dataset), (step - 1) * size, size).tolist()
