"""Batches for training, made in the background: which images they hold is a function of the seed and the step alone.

Step s of batch size B sees the global samples s·B … s·B + B − 1, and process r of W their r-th part of B / W: the
number of processes does not change what a step sees, and any step can be started from.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass

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


@dataclass
class Loader:
    """Gives the batch of any step.

    Args:
        dataset: what to show.
        batch_size: B, over all processes.
        seed: of the order and the flips.
        flip: mirror half of the samples left to right.
        floats: give float32 in [−1, 1]; otherwise uint8, a quarter of the bytes to move, for `pixels.to_model` there.
        rank: which process this is.
        world: how many there are, W.

    Raises:
        InputError: when the batch cannot be shared out evenly, or latents are to be mirrored.
    """

    dataset: Dataset
    batch_size: int
    _: KW_ONLY
    seed: int = 0
    flip: bool = False
    floats: bool = True
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        size, rank, world = self.batch_size, self.rank, self.world
        if size < 1 or world < 1 or size % world:
            raise InputError(f"a batch is a positive multiple of the number of processes, got {size} for {world}")
        if not 0 <= rank < world:
            raise ValueError(f"Must have 0 <= rank < world, got rank={rank}, world={world}")
        if self.flip and self.dataset.latents:
            raise InputError("latents cannot be mirrored: the latent of a mirrored image is another one; turn flip off")
        self._steps = max(1, _BLOCK // size)
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def batches(
        self, start: int = 0, stop: int | None = None, *, prefetch: int = 4, workers: int = 1
    ) -> Generator[Batch, None, None]:
        """The batches of steps start, start + 1, … (stop − 1).

        Args:
            start: the first step.
            stop: the step after the last; None never ends.
            prefetch: how many batches are made ahead; 0 makes each when it is asked for.
            workers: how many threads make them.
        """
        if start < 0 or prefetch < 0 or workers < 1:
            raise ValueError(
                "Must have start >= 0, prefetch >= 0 and workers >= 1, "
                f"got start={start}, prefetch={prefetch}, workers={workers}"
            )
        return _ahead(self.batch, start, stop, prefetch, workers)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
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
        number, offset = divmod(step, self._steps)
        known, images = self._block
        if known != number:
            count = self._steps * self.batch_size
            images = order.indices(self.seed, len(self.dataset), number * count, count)
            self._block = (number, images)
        return images[offset * self.batch_size : (offset + 1) * self.batch_size]


def _ahead(
    made: Callable[[int], Batch], start: int, stop: int | None, prefetch: int, workers: int
) -> Generator[Batch, None, None]:
    step = start
    if not prefetch:
        while stop is None or step < stop:
            yield made(step)
            step += 1
        return
    # at the interpreter's end threads have ended already, and globals may be gone
    ending = sys.is_finalizing
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    coming = deque()
    try:
        while True:
            while len(coming) < prefetch and (stop is None or step < stop):
                coming.append(pool.submit(made, step))
                step += 1
            if not coming:
                return
            yield coming.popleft().result()
    finally:
        if not ending():
            pool.shutdown(wait=True, cancel_futures=True)
