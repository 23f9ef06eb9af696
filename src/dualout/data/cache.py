"""Images decoded once: into memory, or into a file that later runs map.

A cache directory holds, for each set of images (its identity, shape and the way it is decoded, hashed to KEY):

    KEY.u8              the pixels, uint8 N×C×H×W, nothing else
    KEY.json            how many, and which files could not be read; written before KEY.u8 takes its name
    KEY.part, KEY.progress.json    both while they are being made: an interrupted run goes on from there
    KEY.lock            held by the one process that makes them; the others wait and then map the result

Pixels are appended by ordinary writes, which a full disk refuses with an error (a mapped file would end the process).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from dualout.data.base import Progress
from dualout.data.dataset import evenly
from dualout.data.decode import Unreadable
from dualout.errors import InputError
from dualout.files import explained, take_place, write_text
from dualout.machine import cores

IN_MEMORY = 2**31
"""How many bytes of pixels are decoded into memory where no cache directory is given."""
_VERSION = 2
_SECONDS_BETWEEN_SAVES = 5.0
_IMAGES_AT_ONCE = 1024
_HANDED_OVER = 16
_NAMED = 5


@dataclass(frozen=True)
class Job:
    """What to decode.

    Attributes:
        names: of the images, for messages.
        shape: of each, (C, H, W).
        image: gives image i, uint8 (C, H, W), or raises `Unreadable`.
        identity: a text that changes when the images do.
        whole: what they are together, for messages.
        strict: the share of unreadable images above which all are refused.
        progress: whom to tell.
    """

    names: Sequence[str]
    shape: tuple[int, int, int]
    image: Callable[[int], np.ndarray]
    identity: str
    whole: str
    strict: float
    progress: Progress | None = None

    @property
    def bytes_each(self) -> int:
        """C·H·W."""
        return int(np.prod(self.shape))

    @property
    def key(self) -> str:
        """The name that the result is kept under."""
        text = json.dumps([_VERSION, self.identity, self.shape])
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


@dataclass
class State:
    """How far it has got.

    Attributes:
        files: how many were seen.
        rows: how many of them were decoded.
        bad: number and reason of each of the others.
        passing: the numbers of those among them that may be readable another time.
    """

    files: int = 0
    rows: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    passing: list[int] = field(default_factory=list)

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, path: Path) -> State | None:
        """What `text` wrote to a file, or None where there is no such thing."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            bad, passing = [(int(i), str(why)) for i, why in found["bad"]], [int(i) for i in found["passing"]]
            return cls(int(found["files"]), int(found["rows"]), bad, passing)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def materialize(job: Job, cache: Path | None) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Decode all images.

    Returns:
        pixels: uint8 (M, C, H, W), of those that can be read, in order.
        bad: number and reason of the others.

    Raises:
        InputError: when more than the share `strict` of them cannot be read, or none can; when they are too many for
            memory and no cache directory is given; when the cache directory cannot be written.
    """
    if cache is None:
        _check_memory(job)
        return _in_memory(job)
    with explained(cache):
        cache.mkdir(parents=True, exist_ok=True)
        return _kept(job, cache)


def glimpse(job: Job, cache: Path | None, few: int) -> np.ndarray:
    """Decode some of the images, spread evenly: uint8 (M, C, H, W), of those that can be read. Nothing is kept.

    Raises:
        InputError: when none can be read; when all are too many for memory and no cache directory is given.
    """
    if cache is None:
        _check_memory(job)
    some = evenly(len(job.names), few).tolist()
    names = [job.names[i] for i in some]
    return _in_memory(replace(job, names=names, image=lambda i: job.image(some[i]), strict=1.0))[0]


def _check_memory(job: Job) -> None:
    if len(job.names) * job.bytes_each > IN_MEMORY:
        raise InputError(
            f"{job.whole}: decoded, these are {len(job.names) * job.bytes_each / 2**30:.1f} GiB, too much to "
            "keep in memory; give a directory for them with cache=DIRECTORY"
        )


def _in_memory(job: Job) -> tuple[np.ndarray, list[tuple[int, str]]]:
    pixels, state = np.empty((len(job.names), *job.shape), np.uint8), State()
    for rows, block in _blocks(job, state):
        pixels[rows : rows + len(block)] = block
    return pixels[: state.rows], state.bad


def _kept(job: Job, cache: Path) -> tuple[np.ndarray, list[tuple[int, str]]]:
    from filelock import FileLock

    pixels, notes = cache / f"{job.key}.u8", cache / f"{job.key}.json"
    state = _finished(job, pixels, notes)
    if state is None:
        with FileLock(cache / f"{job.key}.lock"):
            state = _finished(job, pixels, notes) or _make(job, pixels, notes)
    _check(job, state)
    return np.memmap(pixels, np.uint8, "r", shape=(state.rows, *job.shape)), state.bad


def _finished(job: Job, pixels: Path, notes: Path) -> State | None:
    state = State.read(notes)
    if state is None or state.files != len(job.names) or state.rows < 1 or not pixels.is_file():
        return None
    whole = pixels.stat().st_size == state.rows * job.bytes_each
    return state if whole and not any(_readable(job, i) for i in state.passing) else None


def _readable(job: Job, i: int) -> bool:
    try:
        job.image(i)
    except Unreadable:
        return False
    return True


def _make(job: Job, pixels: Path, notes: Path) -> State:
    part, saved = pixels.with_suffix(".part"), pixels.with_suffix(".progress.json")
    for left in pixels.parent.glob(f".{job.key}.*.tmp"):  # by a process that was killed while it wrote
        left.unlink(missing_ok=True)
    state = State.read(saved) or State()
    if not part.is_file() or part.stat().st_size < state.rows * job.bytes_each or state.files > len(job.names):
        state = State()
    with part.open("r+b" if part.exists() else "w+b") as file:
        file.truncate(state.rows * job.bytes_each)
        file.seek(0, os.SEEK_END)
        last = time.monotonic()
        for _, block in _blocks(job, state):
            file.write(block.data)
            if time.monotonic() - last > _SECONDS_BETWEEN_SAVES:
                _save(file, saved, state)
                last = time.monotonic()
        _save(file, saved, state)
    write_text(notes, state.text())
    take_place(part, pixels)
    saved.unlink(missing_ok=True)
    return state


def _save(file: IO[bytes], saved: Path, state: State) -> None:
    file.flush()
    os.fsync(file.fileno())
    write_text(saved, state.text())


def _blocks(job: Job, state: State) -> Iterator[tuple[int, np.ndarray]]:
    """Decode what `state` has not seen; yields (first row, pixels) with `state` brought up to date."""
    total, block = len(job.names), max(1, min(_IMAGES_AT_ONCE, 2**26 // job.bytes_each))

    def attempt(i: int) -> np.ndarray | Unreadable:
        try:
            return job.image(i)
        except Unreadable as error:
            return error

    def several(part: range) -> list[np.ndarray | Unreadable]:
        return [attempt(i) for i in part]

    with quiet(), ThreadPoolExecutor(workers()) as pool:
        while state.files < total:
            numbers = range(state.files, min(state.files + block, total))
            found = list(enumerate(chain.from_iterable(pool.map(several, _parts(numbers))), numbers.start))
            good = [result for _, result in found if not isinstance(result, Unreadable)]
            state.bad += [(i, str(error)) for i, error in found if isinstance(error, Unreadable)]
            state.passing += [i for i, error in found if isinstance(error, Unreadable) and error.passing]
            first, state.rows, state.files = state.rows, state.rows + len(good), numbers.stop
            if job.progress:
                job.progress("reading images", state.files, total)
            if len(state.bad) > job.strict * total:
                _check(job, state)
            if good:
                yield first, np.stack(good)
    _check(job, state)


def _parts(numbers: range) -> list[range]:
    """A few images for a thread at a time: handing over each alone costs more than a small one takes."""
    return [numbers[i : i + _HANDED_OVER] for i in range(0, len(numbers), _HANDED_OVER)]


def _check(job: Job, state: State) -> None:
    """Refuse too many unreadable images."""
    total = len(job.names)
    if state.rows and len(state.bad) <= job.strict * total:
        return
    seen = f"{state.files} of the {total}" if state.files < total else f"{total}"
    raise InputError(
        f"{job.whole}: {len(state.bad)} of {seen} images cannot be read ({listed_bad(job.names, state.bad)}). "
        + (
            f"Up to {job.strict:.4g} of them may be; mend or remove them, or allow more by :strict=0.1 after the data."
            if state.rows
            else "None can be used."
        )
    )


def listed_bad(names: Sequence[str], bad: list[tuple[int, str]]) -> str:
    """The first few unreadable images and why."""
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return "; ".join(f"{names[i]}: {why}" for i, why in bad[:_NAMED]) + more


def workers() -> int:
    """How many threads decode."""
    return min(cores(), 32)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings: what matters of them is found and named here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
