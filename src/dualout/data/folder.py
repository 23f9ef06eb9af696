"""A folder of image files: your own pictures, or any dataset that comes as files.

Sub-folders are classes, as in torchvision's ImageFolder. If the folder has a sub-folder ``train`` (and ``test``), those
are the splits, and the classes lie below them.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dualout.data import decode
from dualout.data.base import Names, Pictures, Reading, Source, check_holdout, held_out, looked_for
from dualout.data.dataset import evenly
from dualout.data.index import Index, indexed, shown
from dualout.errors import InputError, some

if TYPE_CHECKING:
    from PIL.Image import Image


_GLIMPSED, _BEGINNING = 16, 2**17


@dataclass(frozen=True)
class Folder(Source):
    """All image files below a folder.

    Labels are the names of the sub-folders in which images lie (the first below the folder, or below ``train`` and
    ``test``), sorted; there are none unless every image lies in one.

    Attributes:
        path: the folder.
        holdout: the share of images that make the test split, chosen by a hash of each file's name, so that it stays
            the same when files are added; for folders without ``train``.
    """

    place: ClassVar[str] = "path"

    path: str
    holdout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_holdout(self.holdout)

    def read(self, reading: Reading) -> Pictures:
        """The files; they are decoded later."""
        root = self._root()
        index = indexed(root, reading.cache, reading.progress)
        if not index.names:
            raise InputError(f"{self.path} holds no images{_held(index)}; images end in {', '.join(decode.suffixes())}")
        has_splits = any(name.startswith("train/") for name in index.names)
        tops = [name.partition("/")[0] for name in index.names]
        rows = self._own_split(tops) if has_splits else self._hashed(index)
        names = [index.names[i] for i in rows.tolist()]
        # of both splits, so that a class has the same number in each
        known = [n for n, top in zip(index.names, tops, strict=True) if not has_splits or top in ("train", "test")]
        labels, classes = _classes(names, known, depth=int(has_splits))
        empty = _empty(index, classes, depth=int(has_splits))
        return Pictures(
            names=Names(len(names), lambda i: shown(names[i])),
            open=partial(_open, root, names),
            labels=labels,
            classes=classes,
            identity=f"folder {index.digest(rows)} {_glimpse(root, names)}",
            whole=f"the folder {self.path}",
            notes=(*_left_out(index, self.strict), *(_outside(tops) if has_splits else _loose(names)), *empty),
        )

    def _root(self) -> Path:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist" + looked_for(self.path)
            raise InputError(f"the folder {self.path} {what}")
        return root

    def _own_split(self, tops: list[str]) -> np.ndarray:
        if self.holdout:
            raise InputError(f"{self.path} has its own split in the sub-folder train; leave holdout out")
        wanted = ("train", "test") if self.split == "all" else (self.split,)
        rows = np.flatnonzero([top in wanted for top in tops])
        if not len(rows):
            raise InputError(f"{self.path} has images in train, but none in {self.split}")
        return rows

    def _hashed(self, index: Index) -> np.ndarray:
        names = index.names
        rows = held_out(
            len(names), self.holdout, self.split, lambda: np.array([_hash(name) < self.holdout for name in names])
        )
        return np.arange(len(names)) if rows is None else rows


def _open(root: Path, names: list[str], i: int) -> Image:
    path = os.path.join(root, names[i])
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise decode.Unreadable("not a regular file")  # opening a pipe would wait for ever
    except OSError as error:
        raise decode.Unreadable(error.strerror or str(error), passing=True) from error
    return decode.opened(path)


def _glimpse(root: Path, names: list[str]) -> str:
    """A hash of the beginnings of some of the files: those of two folders may have the same names, sizes and times."""
    state = hashlib.blake2b(digest_size=16)
    for i in evenly(len(names), _GLIMPSED):
        path = os.path.join(root, names[i])
        try:
            if stat.S_ISREG(os.stat(path).st_mode):
                with open(path, "rb") as file:
                    state.update(file.read(_BEGINNING))
        except OSError as error:
            state.update(str(error.errno).encode())
    return state.hexdigest()


def _left_out(index: Index, share: float) -> tuple[str, ...]:
    """A note on files that end otherwise than images do, where they are more than a share of all."""
    others = sum(index.others.values())
    if others <= share * (others + len(index.names)):
        return ()
    return (f"files that do not end as images do are left out: {_kinds(index)}",)


def _loose(names: list[str]) -> tuple[str, ...]:
    """A note on images beside sub-folders, which keep those from being classes."""
    loose = [name for name in names if "/" not in name]
    if not loose or len(loose) == len(names):
        return ()
    return (f"{len(loose)} images lie in no sub-folder ({some([shown(n) for n in loose])}), so there are no classes",)


def _outside(tops: list[str]) -> tuple[str, ...]:
    """A note on images beside ``train`` and ``test``: "train" may be the name of a class."""
    outside = Counter(top for top in tops if top not in ("train", "test"))
    if not outside:
        return ()
    where = some([shown(top) for top in sorted(outside)])
    return (
        f"{sum(outside.values())} images lie outside train and test ({where}) and are left out: a sub-folder train "
        "makes a split. Where it is a class, give it another name",
    )


def _empty(index: Index, classes: tuple[str, ...], depth: int) -> tuple[str, ...]:
    """A note on sub-folders beside classes that hold no images: they have no number among the classes."""
    paths = [below.split("/") for below in index.directories if below.count("/") == depth]
    beside = {shown(path[depth]) for path in paths if path[0] and (not depth or path[0] in ("train", "test"))}
    empty = sorted(beside - {*classes})
    if not (empty and classes):
        return ()
    return (f"{len(empty)} of {len(beside)} sub-folders hold no images, and are no classes: {some(empty)}",)


def _classes(names: list[str], known: list[str], depth: int) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The label of each of `names`, by the folder at `depth`; the classes are those of `known`."""
    if not all(name.count("/") > depth for name in known):
        return None, ()
    classes = sorted({name.split("/", depth + 1)[depth] for name in known})
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name.split("/", depth + 1)[depth]] for name in names], np.int64)
    return labels, tuple(map(shown, classes))


def _hash(name: str) -> float:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _held(index: Index) -> str:
    if not index.others:
        below = len(index.directories) - 1
        return f" (it is empty{f', and so are its {below} sub-folders' if below else ''})"
    return f" (it holds {_kinds(index)})"


def _kinds(index: Index) -> str:
    kinds = sorted(index.others.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} files with {ending}" for ending, count in kinds[:5])
