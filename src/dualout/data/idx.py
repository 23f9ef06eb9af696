"""The MNIST family's files: MNIST, Fashion-MNIST, KMNIST, EMNIST, as their authors publish them.

IDX, by Y. LeCun: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian
32-bit number, then the values. Debian's package dataset-fashion-mnist puts Fashion-MNIST's under
/usr/share/datasets/fashion-mnist.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import torch

from dualout.data.base import Reading, Source, class_labels
from dualout.data.dataset import Dataset
from dualout.errors import InputError
from dualout.machine import memory

_DEFLATED = 1032
"""At most so many bytes come of one."""
_TRAIN, _TEST = ("train",), ("t10k", "test")


@dataclass(frozen=True)
class Idx(Source):
    """Images (and labels, where there are any) of ``*train-images*`` and ``*t10k-images*``, gzipped or not.

    Attributes:
        path: the folder with the files.
        prefix: how their names begin, where a folder has several sets (``emnist-letters``).
    """

    place: ClassVar[str] = "path"

    path: str
    prefix: str = ""

    def read(self, reading: Reading) -> Dataset:
        """Uint8 (N, H, W), or (N, H, W, C) from files of four dimensions; mapped where it is one uncompressed file."""
        wanted = {"train": [_TRAIN], "test": [_TEST], "all": [_TRAIN, _TEST]}[self.split]
        images, labels = [], []
        for words in wanted:
            file = self._file(words, "images")
            if file is None:
                if self.split == "all":
                    continue
                raise InputError(f"{self.path} has no {self.split} images: {self._expected(words)}")
            images.append(_images(file))
            beside = self._file(words, "labels")
            labels.append(None if beside is None else class_labels(_values(beside), len(images[-1]), str(file)))
        if not images:
            raise InputError(f"{self.path} has no idx files: {self._expected(_TRAIN)}")
        if len({i.shape[1:] for i in images}) > 1:
            raise InputError(f"{self.path}: train and test images differ in shape, {[i.shape[1:] for i in images]}")
        stored = images[0] if len(images) == 1 else np.concatenate(images)
        named = all(found is not None for found in labels)
        together = torch.from_numpy(np.concatenate([found for found in labels if found is not None])) if named else None
        classes = () if together is None else tuple(str(c) for c in range(int(together.max()) + 1))
        return Dataset("idx", stored, "nhw" if stored.ndim == 3 else "nhwc", None, together, classes)

    def _expected(self, words: tuple[str, ...]) -> str:
        names = self._names()
        some = f"it holds {', '.join(names[:6])}{', …' if len(names) > 6 else ''}" if names else "it is empty"
        return f"a file such as {self.prefix or ''}{words[0]}-images-idx3-ubyte or ….gz is expected; {some}"

    def _names(self) -> list[str]:
        folder = Path(self.path).expanduser()
        try:
            return sorted(p.name for p in folder.iterdir())
        except OSError as error:
            raise InputError(f"{self.path} is no folder that can be read: {error.strerror or error}") from error

    def _file(self, words: tuple[str, ...], what: str) -> Path | None:
        found = [
            name for name in self._names()
            if name.startswith(self.prefix) and what in name and "idx" in name and any(w in name for w in words)
        ]  # fmt: skip
        plain = [name for name in found if not name.endswith(".gz")]
        # the same file may lie there both gzipped and not
        found = plain + [name for name in found if name.removesuffix(".gz") not in plain and name not in plain]
        if len(found) > 1:
            raise InputError(f"{self.path} has several sets ({', '.join(found)}): choose by prefix=…")
        return Path(self.path).expanduser() / found[0] if found else None


def _images(file: Path) -> np.ndarray:
    values = _values(file)
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise InputError(f"{file} holds an array of shape {values.shape}, not images (N, H, W)")
    return values


def _values(file: Path) -> np.ndarray:
    """The array in an idx file: mapped, or unpacked into memory."""
    packed = file.suffix == ".gz"
    try:
        with gzip.open(file) if packed else file.open("rb") as stream:
            shape = _header(file, stream)
            count = prod(shape)
            if not packed and count and file.stat().st_size - stream.tell() == count:
                return np.memmap(file, np.uint8, "r", stream.tell(), shape)
            # what a header tells of beyond what deflate can hold in a file is damage, and said below
            if (most := memory()) and most < count <= _DEFLATED * file.stat().st_size:
                raise InputError(
                    f"{file} tells of {count / 2**30:.1f} GiB of values {shape}, this machine has {most / 2**30:.1f}"
                    + ("; unpack it, then it is mapped from the file" if packed else "")
                )
            # no more is read than the header tells of, in pieces: neither may be trusted
            data = bytearray()
            while len(data) <= count and (piece := stream.read(min(2**24, count + 1 - len(data)))):
                data += piece
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise InputError(f"{file} cannot be read: {error or type(error).__name__}") from error
    if len(data) != count:
        has = "more" if len(data) > count else len(data)
        raise InputError(f"{file} is damaged: its header tells of {count} values {shape}, it has {has}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _header(file: Path, stream: gzip.GzipFile | BinaryIO) -> tuple[int, ...]:
    """The shape of the array."""
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or not 1 <= head[3] <= 4:
        raise InputError(f"{file} is no idx file: it begins with {head.hex(' ') or 'nothing'}")
    if head[2] != 8:
        raise InputError(f"{file} holds values of idx type {head[2]:#04x}; only unsigned bytes (0x08) are images")
    sides = stream.read(4 * head[3])
    if len(sides) < 4 * head[3]:
        raise InputError(f"{file} is damaged: it ends within its header")
    return tuple(np.frombuffer(sides, ">u4").tolist())
