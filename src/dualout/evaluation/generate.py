"""Images to disk: a shard at a time, in memory that does not grow with their number, and going on where it stopped.

    for done in generate(sampling, 50_000, "out", store="npz"):
        print(done)

Every file is written aside and renamed, so that whatever is there is whole. A directory that was begun with another
request is refused; a shard that is there is not made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from dualout.errors import InputError, unknown
from dualout.evaluation.sampling import Sampling
from dualout.evaluation.stores import STORES, Store
from dualout.files import alone


def generate(
    sampling: Sampling,
    images: int,
    out: str | Path,
    *,
    store: str = "png",
    batch_size: int = 64,
    part: tuple[int, int] = (0, 1),
) -> Iterator[int]:
    """Make images 0 … images − 1 and write them, with protocol.json.

    Args:
        sampling: how image i is made.
        images: how many.
        out: a directory: new, empty, or begun before with the same request.
        store: "png", a file an image (000000.png …), or "npz", one images.npz with `images` uint8 (N, H, W) or
            (N, H, W, C), or float32 (N, C, H, W) where they are latents, and `labels` where there are classes.
        batch_size: how many at a time.
        part: (p, of): this process is the p-th of so many, counted from 0, and makes every of-th shard.

    Yields:
        how many of this process's images there are: first, how many there were, then after each batch.

    Raises:
        InputError: before anything is made, when `out` holds something else, or another process makes images in it; or
            when it cannot be written, or an image is not finite. Where no image was made, nothing is left behind.
    """
    for name, value in (("images", images), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"--{name} is a whole number, 1 or more; got {value}")
    if store not in STORES:
        raise unknown("format", store, STORES)
    destination = STORES[store](Path(out).expanduser(), sampling, images, batch_size)
    with _withdrawn(destination):
        destination.begin(part[1])
    # of processes that share the work, the first speaks for all; where another makes images there, nothing is withdrawn
    with nullcontext() if part[0] else alone(destination.directory, "making images"), _withdrawn(destination):
        yield from _made(destination, part)


def _made(destination: Store, part: tuple[int, int]) -> Iterator[int]:
    batch_size = destination.batch_size
    blocks = list(destination.blocks())[part[0] :: part[1]]
    todo = [destination.missing(block) for block in blocks]
    done = sum(map(len, blocks)) - sum(map(len, todo))
    yield done
    left = sum(-(-len(missing) // batch_size) for missing in todo)
    if left:
        destination.prepare(left)
    for missing in todo:
        made: list[Tensor] = []
        for start in range(0, len(missing), batch_size):
            made.append(destination.sampling.images(missing[start : start + batch_size]))
            if start + batch_size >= len(missing):
                destination.write(missing, torch.cat(made))
            done += len(made[-1])
            yield done
    destination.finish()


@contextmanager
def _withdrawn(destination: Store) -> Iterator[None]:
    """Leave nothing behind where images cannot be made."""
    try:
        yield
    except (InputError, MemoryError, RuntimeError):
        destination.withdraw()
        raise
