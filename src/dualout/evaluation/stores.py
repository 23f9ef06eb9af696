"""Where images are written, and read back: a file each, or an archive that is put together from shards.

Every file is written aside and renamed, so that whatever is there is whole. A directory that was begun with another
request is refused.
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dualout.errors import InputError
from dualout.evaluation.protocol import differences, listed
from dualout.evaluation.sampling import Sampling
from dualout.files import atomically, explained, holding, read_json, refuse_others, sweep, write_json

PROTOCOL = "protocol.json"
_END_OF_PNG = b"IEND\xaeB`\x82"


class Store(ABC):
    """Where images go.

    Args:
        directory: their directory.
        sampling: what makes them.
        images: how many there will be.
        batch_size: how many are made at a time.
    """

    kind: ClassVar[str]

    def __init__(self, directory: Path, sampling: Sampling, images: int, batch_size: int) -> None:
        self.directory, self.sampling, self.images, self.batch_size = directory, sampling, images, batch_size
        self.shape, self.dtype = sampling.model.image, sampling.model.output.dtype
        self.shard = self.shard_size()
        self._begun = self._new = False

    @abstractmethod
    def shard_size(self) -> int:
        """How many images are written together, and at most lost when writing is interrupted."""

    def begin(self, processes: int = 1) -> None:
        """Make the directory, or see that it was begun with the same request; so many processes write there now."""
        self.check()
        path = self.directory / PROTOCOL
        wanted = {"format": self.kind, "images": self.images} | self.request() | self.sampling.protocol()
        if path.exists():
            if found := differences(read_json(path, then="; give another --out"), wanted):
                raise InputError(
                    f"--out {self.directory} holds images of another request: {listed(found)}. Give another --out, or "
                    "remove that directory"
                )
        else:
            instead = "images go to a new or empty directory, or to one that this command made before"
            refuse_others(self.directory, instead)
            self._begun, self._new = processes == 1, not self.directory.exists()
            with explained(path):
                self.directory.mkdir(parents=True, exist_ok=True)
            # what is chosen by measurement is chosen before it is written down
            self.prepare(-(-self.images // (self.batch_size * processes)))
            write_json(path, wanted | self.sampling.computed())
        sweep(self.directory)

    def prepare(self, batches: int) -> None:
        """Get ready to make so many batches."""
        self.sampling.prepare(min(self.batch_size, self.images), batches * self.sampling.sampler.evaluations)

    def withdraw(self) -> None:
        """Undo what `begin` made, where nothing was written since: it would stand in the way of another request."""
        if not self._begun or any(p.is_file() for p in self.directory.rglob("*") if p.name != PROTOCOL):
            return
        (self.directory / PROTOCOL).unlink(missing_ok=True)
        for empty in [self.directory / "shards", *([self.directory] if self._new else [])]:
            if empty.is_dir():
                empty.rmdir()

    def check(self) -> None:
        """Refuse images that cannot be written so."""
        return

    def request(self) -> dict[str, Any]:
        """What else must be equal to go on."""
        return {}

    def blocks(self) -> Iterator[range]:
        """The numbers of the images of each shard."""
        for start in range(0, self.images, self.shard):
            yield range(start, min(start + self.shard, self.images))

    @abstractmethod
    def missing(self, block: range) -> list[int]:
        """The numbers of a shard's images that are still to be made."""

    @abstractmethod
    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Write images, (B, C, H, W)."""

    @abstractmethod
    def finish(self) -> None:
        """Once all are there: put together what belongs together."""


class Png(Store):
    """A file an image."""

    kind = "png"

    def shard_size(self) -> int:
        """Every batch is written as it is made."""
        return self.batch_size

    def check(self) -> None:
        """Only grey and colour pictures."""
        if self.dtype != np.uint8:
            raise InputError(
                "the model makes latents, which are no pictures: --format npz writes them as they are, and --decode "
                "makes pictures of them, by the autoencoder in a directory or on the Hub"
            )
        if self.shape[0] not in (1, 3):
            raise InputError(
                f"a PNG holds grey or colour images, these have {self.shape[0]} channels: take --format npz"
            )

    def missing(self, block: range) -> list[int]:
        """Those without a file that is whole to its end."""
        return [i for i in block if not _whole_png(png_path(self.directory, i))]

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """One file each."""
        from PIL import Image

        for index, image in zip(indices, images, strict=True):
            # not flushed to disk one by one, which takes longer than to make it: `missing` looks for its end
            with atomically(png_path(self.directory, index), durable=False) as aside:
                Image.fromarray(_arranged(image[None])[0]).save(aside, "png")

    def finish(self) -> None:
        """Nothing: the files are the result."""


class Npz(Store):
    """One file for all, put together from shards."""

    kind = "npz"
    file: ClassVar[str] = "images.npz"
    most: ClassVar[int] = 512

    def shard_size(self) -> int:
        """512 images, or as many as 64 MiB hold, whatever the batch: the shards are the same when it changes."""
        return max(1, min(self.most, 2**26 // (int(np.prod(self.shape)) * self.dtype.itemsize)))

    @property
    def shards(self) -> Path:
        """The directory of the shards, while there are some."""
        return self.directory / "shards"

    def path(self, block: range) -> Path:
        """The file of a shard."""
        return self.shards / f"{block.start:08d}.npy"

    def request(self) -> dict[str, Any]:
        """Shards of another size are not these shards."""
        return {"shard": self.shard}

    def missing(self, block: range) -> list[int]:
        """All, or none where the shard, or the end result, is there."""
        there = _whole_npz(self.directory / self.file) or self._rows(block) == len(block)
        return [] if there else list(block)

    def _rows(self, block: range) -> int:
        if not self.path(block).exists():
            return 0
        try:
            return len(np.load(self.path(block), mmap_mode="r"))
        except (OSError, ValueError, EOFError):
            # not as it was written: it is made again
            return 0

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """One shard."""
        path = self.path(range(indices[0], indices[-1] + 1))
        with explained(path):
            self.shards.mkdir(exist_ok=True)
        array = _arranged(images)
        with atomically(path) as aside, aside.open("wb") as file:
            # not by np.save, whose error on a full disk tells how much was written, and not why
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)

    def finish(self) -> None:
        """Put the shards together, one in memory at a time, and remove them."""
        # of processes that end at once, one does it, and removes what the other would read
        with explained(self.shards), suppress(FileNotFoundError), holding(self.shards):
            self._finish(self.directory / self.file, list(self.blocks()))

    def _finish(self, whole: Path, blocks: Sequence[range]) -> None:
        if not _whole_npz(whole):
            if any(self._rows(block) != len(block) for block in blocks):
                # another process has not yet made its own; it will do this
                return
            with atomically(whole) as aside, zipfile.ZipFile(aside, "w") as archive:
                self._put_together(archive, blocks)
        with explained(self.shards):
            for block in blocks:
                self.path(block).unlink(missing_ok=True)
            if self.shards.is_dir() and not any(self.shards.iterdir()):
                self.shards.rmdir()

    def _put_together(self, archive: zipfile.ZipFile, blocks: Sequence[range]) -> None:
        shape = (self.images, *_arranged(torch.empty(1, *self.shape, dtype=getattr(torch, self.dtype.name))).shape[1:])
        with archive.open("images.npy", "w", force_zip64=True) as file:
            header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(file, header)
            for block in blocks:
                file.write(np.load(self.path(block)).tobytes())
        if (labels := self.sampling.labels) is not None:
            every = np.resize(np.array(labels, dtype=np.int64), self.images)
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, every)


STORES: dict[str, type[Store]] = {store.kind: store for store in (Png, Npz)}


def stored(out: str | Path, count: int) -> Tensor:
    """The first images of a directory, uint8 (B, C, H, W), as many of them as are there; latents are float32."""
    directory = Path(out).expanduser()
    if (directory / Npz.file).exists():
        array = _first_of_npz(directory / Npz.file, count)
    else:
        paths = [path for i in range(count) if (path := png_path(directory, i)).exists()]
        array = np.stack([_read_png(path) for path in paths]) if paths else np.empty((0, 1, 1), np.uint8)
    images = torch.from_numpy(array)
    if images.is_floating_point():
        return images
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)


def _arranged(images: Tensor) -> np.ndarray:
    """uint8 (B, C, H, W) -> (B, H, W) for grey, (B, H, W, C) otherwise; latents as they are."""
    array = images.numpy()
    if images.is_floating_point():
        return np.ascontiguousarray(array)
    return np.ascontiguousarray(array[:, 0] if array.shape[1] == 1 else array.transpose(0, 2, 3, 1))


def png_path(directory: Path, index: int) -> Path:
    """The file of image number `index`."""
    return directory / f"{index:06d}.png"


def _whole_png(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-len(_END_OF_PNG), 2)
            return file.read() == _END_OF_PNG
    except OSError:
        return False


def _read_png(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        # of Pillow's other formats one starts a program
        with Image.open(path, formats=("PNG",)) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is damaged: {error}; remove it, and give the same command again") from error


def _whole_npz(path: Path) -> bool:
    """Whether an archive is there, with its list of members, which comes last."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "images.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _first_of_npz(path: Path, count: int) -> np.ndarray:
    """The first images of an archive, without reading the others."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
            shape = (min(count, shape[0]), *shape[1:])
            return np.frombuffer(bytearray(file.read(int(np.prod(shape)) * dtype.itemsize)), dtype).reshape(shape)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged: {error}; remove it, and give the same command again") from error
