"""Batches for training, made in the background: which images they hold is a function of the seed and the step alone.

Step s of batch size B sees the global samples s·B … s·B + B − 1, and process r of W their r-th part of B / W: the
number of processes does not change what a step sees, and any step can be started from.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dualout.data import order, pixels
from dualout.data.dataset import Dataset
from dualout.errors import InputError

_BLOCK = 8192


@dataclass(frozen=True)
class Batch:
    """What one process sees in one step.

    Attributes:
        step: of training, from 0.
        images: (B/W, C, H, W), float32 in [−1, 1], or uint8.
        labels: LongTensor (B/W,), or None.
        samples: the global sample indices g, int64 (B/W,): a sample's time step and noise are functions of its g.
        rows: which images of the dataset these are, int64 (B/W,).
    """

    step: int
    images: Tensor
    labels: Tensor | None
    samples: np.ndarray
    rows: np.ndarray


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int = 0,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world: int = 1,
    flip: bool = False,
    floats: bool = True,
    prefetch: int = 4,
    workers: int = 1,
) -> Generator[Batch, None, None]:
    """The batches of steps start, start + 1, … (stop − 1).

    Args:
        dataset: what to show.
        batch_size: B, over all processes.
        seed: of the order and the flips.
        start: the first step.
        stop: the step after the last; None never ends.
        rank: which process this is.
        world: how many there are, W.
        flip: mirror half of the samples left to right.
        floats: give float32 in [−1, 1]; otherwise uint8, a quarter of the bytes to move, for `pixels.to_model` there.
        prefetch: how many batches are made ahead; 0 makes each when it is asked for.
        workers: how many threads make them.

    Raises:
        InputError: when the batch cannot be shared out evenly, or latents are to be mirrored.
    """
    if batch_size < 1 or world < 1 or batch_size % world:
        raise InputError(f"a batch is a positive multiple of the number of processes, got {batch_size} for {world}")
    if not 0 <= rank < world or start < 0 or prefetch < 0 or workers < 1:
        raise ValueError(
            "Must have 0 <= rank < world, start >= 0, prefetch >= 0 and workers >= 1, "
            f"got rank={rank}, world={world}, start={start}, prefetch={prefetch}, workers={workers}"
        )
    if flip and dataset.latents:
        raise InputError("latents cannot be mirrored: the latent of a mirrored image is another one; turn flip off")
    maker = _Maker(dataset, batch_size, seed, rank, world, flip, floats)
    return _ahead(maker, start, stop, prefetch, workers)


def _ahead(maker: _Maker, start: int, stop: int | None, prefetch: int, workers: int) -> Generator[Batch, None, None]:
    step = start
    if not prefetch:
        while stop is None or step < stop:
            yield maker(step)
            step += 1
        return
    # at the interpreter's end threads have ended already, and globals may be gone
    ending = sys.is_finalizing
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    coming = deque()
    try:
        while True:
            while len(coming) < prefetch and (stop is None or step < stop):
                coming.append(pool.submit(maker, step))
                step += 1
            if not coming:
                return
            yield coming.popleft().result()
    finally:
        if not ending():
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Maker:
    """Makes the batch of any step."""

    dataset: Dataset
    batch_size: int
    seed: int
    rank: int
    world: int
    flip: bool
    floats: bool

    def __post_init__(self) -> None:
        self.steps = max(1, _BLOCK // self.batch_size)
        self.block: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __call__(self, step: int) -> Batch:
        mine = self.batch_size // self.world
        samples = np.arange(mine, dtype=np.int64) + step * self.batch_size + self.rank * mine
        rows = self._order(step)[self.rank * mine : (self.rank + 1) * mine]
        images = self.dataset.gather(rows)
        if self.flip:
            mirrored = order.flips(self.seed, samples)
            images[mirrored] = images[mirrored][..., ::-1]
        tensor = torch.from_numpy(pixels.floats(images) if self.floats else images)
        labels = None if self.dataset.labels is None else self.dataset.labels[torch.from_numpy(rows)]
        return Batch(step, tensor, labels, samples, rows)

    def _order(self, step: int) -> np.ndarray:
        """The images of a step, from the order of many steps, which costs little more than that of one."""
        number, offset = divmod(step, self.steps)
        known, images = self.block
        if known != number:
            count = self.steps * self.batch_size
            images = order.indices(self.seed, len(self.dataset), number * count, count)
            self.block = (number, images)
        return images[offset * self.batch_size : (offset + 1) * self.batch_size]
