"""What image files a folder holds: listed once, and kept.

Listing a million files takes seconds on a local disk and minutes on a shared one, so the list is kept in the cache
directory. It is used again as long as no directory below the folder has changed (adding, removing, renaming a file
changes its directory's time) and 2,000 files spread over the list have kept size and time; all are compared where there
are no more than that.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dualout.data import decode
from dualout.data.base import Progress
from dualout.data.dataset import evenly
from dualout.errors import InputError
from dualout.files import atomically, explained

_VERSION = 1
_COMPARED = 2000
_CLOCK_TICK = 2 * 10**9
"""Nanoseconds within which a file system may give two changes the same time."""


@dataclass(frozen=True)
class Index:
    """The image files below a folder.

    Attributes:
        names: paths below the folder, with '/', sorted.
        sizes: in bytes, int64 (N,).
        times: of the last change in nanoseconds, int64 (N,).
        directories: path below the folder -> time of its last change.
        others: how many files of each ending were left out.
        listed: when, in nanoseconds.
    """

    names: list[str]
    sizes: np.ndarray
    times: np.ndarray
    directories: dict[str, int]
    others: dict[str, int]
    listed: int

    def digest(self, rows: np.ndarray) -> str:
        """A hash of names, sizes and times of some of the files."""
        state = hashlib.blake2b(digest_size=16)
        state.update("\0".join(self.names[i] for i in rows.tolist()).encode("utf-8", "surrogateescape"))
        state.update(self.sizes[rows].tobytes())
        state.update(self.times[rows].tobytes())
        return state.hexdigest()


def indexed(root: Path, cache: Path | None, progress: Progress | None = None) -> Index:
    """The index of a folder, from the cache directory if it is there and still right.

    Raises:
        InputError: when the folder cannot be read, or the cache directory not be written.
    """
    if cache is None:
        return scan(root, progress)
    key = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=12).hexdigest()
    kept = cache / f"index-{key}.npz"
    index = _load(kept)
    if index is None or not _unchanged(root, index):
        index = scan(root, progress)
        with explained(cache):
            cache.mkdir(parents=True, exist_ok=True)
        _store(kept, index)
    return index


def scan(root: Path, progress: Progress | None = None) -> Index:
    """List the image files below a folder; hidden files and folders are left out.

    Links are followed, each directory is entered once (by its own name if it has one below `root`), so that links which
    lead back do no harm.

    Raises:
        InputError: when a directory cannot be read.
    """
    endings, listed = decode.suffixes(), time.time_ns()
    files: list[tuple[str, int, int]] = []
    directories: dict[str, int] = {}
    others: Counter[str] = Counter()
    entered: set[tuple[int, int]] = set()
    real, linked = [""], []
    while real or linked:
        below = real.pop() if real else linked.pop()
        try:
            state = os.stat(root / below)
            if (state.st_dev, state.st_ino) in entered:
                continue
            entered.add((state.st_dev, state.st_ino))
            directories[below] = state.st_mtime_ns
            with os.scandir(root / below) as entries:
                for entry in entries:
                    name = f"{below}/{entry.name}" if below else entry.name
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    if _is_directory(entry):
                        (linked if entry.is_symlink() else real).append(name)
                    elif entry.name.lower().endswith(endings):
                        files.append((name, *_size_and_time(entry)))
                        if progress and len(files) % 1000 == 0:
                            progress("listing files", len(files), 0)
                    else:
                        others[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1
        except OSError as error:
            raise InputError(f"{shown(str(root / below))} cannot be read: {error.strerror or error}") from error
        linked.sort(reverse=True)
    files.sort()
    return Index(
        [name for name, _, _ in files],
        np.array([size for _, size, _ in files], np.int64),
        np.array([changed for _, _, changed in files], np.int64),
        directories,
        dict(others),
        listed,
    )


def shown(name: str) -> str:
    """A file name as text that can be printed; bytes that are no UTF-8 become �."""
    return os.fsencode(name).decode("utf-8", "replace")


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    """(−1, 0) for a link that leads nowhere, and for what is no file (a pipe would wait for ever)."""
    try:
        return (entry.stat().st_size, entry.stat().st_mtime_ns) if entry.is_file() else (-1, 0)
    except OSError:
        return -1, 0


def _unchanged(root: Path, index: Index) -> bool:
    try:
        for below, changed in index.directories.items():
            # a change within the same tick of the clock as the listing would not show
            if os.stat(root / below).st_mtime_ns != changed or changed > index.listed - _CLOCK_TICK:
                return False
        for i in evenly(len(index.names), _COMPARED):
            state = os.stat(root / index.names[i])
            if (state.st_size, state.st_mtime_ns) != (index.sizes[i], index.times[i]):
                return False
    except OSError:
        return False
    return True


def _store(path: Path, index: Index) -> None:
    with atomically(path) as aside, aside.open("wb") as file:
        np.savez(
            file, version=_VERSION, listed=index.listed, sizes=index.sizes, times=index.times,
            names=_packed(index.names),
            directories=_packed(list(index.directories)), changed=np.array(list(index.directories.values()), np.int64),
            others=_packed(list(index.others)), counts=np.array(list(index.others.values()), np.int64),
        )  # fmt: skip


def _load(path: Path) -> Index | None:
    try:
        with np.load(path) as kept:
            if int(kept["version"]) != _VERSION:
                return None
            return Index(
                _unpacked(kept["names"]), kept["sizes"], kept["times"],
                dict(zip(_unpacked(kept["directories"]), kept["changed"].tolist(), strict=True)),
                dict(zip(_unpacked(kept["others"]), kept["counts"].tolist(), strict=True)),
                int(kept["listed"]),
            )  # fmt: skip
    except Exception:  # whatever is not an index of this version is made anew
        return None


def _packed(names: list[str]) -> np.ndarray:
    return np.frombuffer("".join(f"{name}\0" for name in names).encode("utf-8", "surrogateescape"), np.uint8)


def _unpacked(packed: np.ndarray) -> list[str]:
    return packed.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
