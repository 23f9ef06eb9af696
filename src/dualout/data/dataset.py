"""Images that are accessed by index."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dualout.data import pixels
from dualout.errors import InputError, unknown

LAYOUTS = ("nhw", "nhwc", "nchw")
_HASHED_BYTES = 2**26


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """N images of one shape, in memory or mapped from a file.

    Letters: N images, B of them, C channels, H×W pixels.

    Attributes:
        name: the spec it came from.
        stored: the pixels as they lie in memory or on disk, of shape `layout`.
        layout: "nhw", "nhwc" or "nchw".
        rows: which of `stored` belong to this dataset; None is all.
        labels: the class of each image, LongTensor (N,), or None.
        classes: the names of the classes.
        scale: for floating `stored` pixels, the values of black and white; None says that they are latents, which are
            given as they are.
        notes: what the user should know: which files were left out, and why.

    Raises:
        InputError: for arrays that are not as said here.
    """

    name: str
    stored: np.ndarray
    layout: str = "nchw"
    rows: np.ndarray | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    scale: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stored = self.stored
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        if not isinstance(stored, np.ndarray) or stored.ndim != len(self.layout):
            raise InputError(
                f"{self.name}: images are a numpy array, here of the layout {self.layout!r}, one of "
                f"{', '.join(LAYOUTS)}; got a {type(stored).__name__} of shape {tuple(getattr(stored, 'shape', ()))}"
            )
        if stored.dtype != np.uint8 and stored.dtype.kind != "f":
            raise InputError(f"{self.name}: images are uint8 or floats, latents are floats; got {stored.dtype}")
        if self.scale is not None and self.scale[0] == self.scale[1]:
            raise InputError(f"{self.name}: scale is the values of black and of white, got {self.scale}")
        if self.rows is not None:
            self._check_rows(self.rows)
        if self.labels is not None:
            self._check_labels(self.labels)

    def _check_rows(self, rows: np.ndarray) -> None:
        number = isinstance(rows, np.ndarray) and rows.ndim == 1 and rows.dtype.kind in "iu"
        if not number or (len(rows) and not 0 <= rows.min() <= rows.max() < len(self.stored)):
            raise InputError(
                f"{self.name}: rows are an array of images' numbers, integers from 0 to {len(self.stored) - 1}; a mask "
                f"is for select; got {rows!r}"
            )

    def _check_labels(self, labels: Tensor) -> None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.long or labels.shape != (len(self),):
            raise InputError(
                f"{self.name}: labels are a LongTensor, one for each of the {len(self)} images; got a "
                f"{type(labels).__name__} of {getattr(labels, 'dtype', 'no type')} and shape {tuple(np.shape(labels))}"
            )
        if self.classes and len(labels):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(self.classes):
                raise InputError(f"{self.name}: labels count {len(self.classes)} classes from 0, got {low} to {high}")

    def __len__(self) -> int:
        return len(self.stored) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        """Image number `index`, uint8 (C, H, W)."""
        return self.batch([index])[0]

    def __repr__(self) -> str:
        kind = ("latent" if self.latents else "image") + "s" * (len(self) != 1)
        classes = f", {len(self.classes)} class{'es' * (len(self.classes) != 1)}" if self.labels is not None else ""
        return f"{self.name}: {len(self):,} {kind} {'×'.join(map(str, self.shape))}{classes}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        sizes = dict(zip(self.layout, self.stored.shape, strict=True))
        return sizes.get("c", 1), sizes["h"], sizes["w"]

    @property
    def channels(self) -> int:
        """C: 1 grey, 3 colour."""
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.shape[1:]

    @property
    def latents(self) -> bool:
        """Whether these are floats that are no grey levels: given as float32, never scaled, clipped or mirrored."""
        return self.stored.dtype != np.uint8 and self.scale is None

    @property
    def empty_classes(self) -> list[int]:
        """The classes, by number, of which there is no image: labels that count from 1 leave class 0 empty."""
        there = set() if self.labels is None else set(self.labels.unique().tolist())
        return [c for c in range(len(self.classes)) if c not in there]

    def batch(self, indices: np.ndarray | Tensor | Sequence[int]) -> Tensor:
        """The images with these numbers, uint8 (B, C, H, W); float32 for latents.

        Raises:
            IndexError: for a number outside −N … N − 1; those below 0 count from the end.
            InputError: for what are no whole numbers, say a mask.
        """
        numbers = np.asarray(indices).reshape(-1)
        if numbers.size and numbers.dtype.kind not in "iu":
            raise InputError(f"{self.name}: images have whole numbers; a mask is for select; got {indices!r}")
        return torch.from_numpy(self.gather(numbers.astype(np.int64)))

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """`batch` for arrays: int64 (B,) -> uint8 (B, C, H, W), which the caller owns."""
        rows = indices if self.rows is None else self.rows[indices]
        # take copies an image at a time, but it would first copy the whole of an array in another order
        found = np.take(self.stored, rows, axis=0) if self.stored.flags.c_contiguous else self.stored[rows]
        if self.layout == "nhw":
            found = found[:, None]
        elif self.layout == "nhwc":
            found = found.transpose(0, 3, 1, 2)
        if self.scale is not None:
            found = pixels.quantized(found, *self.scale)
        return np.ascontiguousarray(found, dtype=np.float32 if self.latents else np.uint8)

    def select(self, indices: np.ndarray | Tensor | Sequence[int]) -> Dataset:
        """The dataset of these images alone, in this order; nothing is copied."""
        chosen = np.arange(len(self))[np.asarray(indices)]
        rows = chosen if self.rows is None else self.rows[chosen]
        labels = None if self.labels is None else self.labels[torch.from_numpy(chosen)]
        return replace(self, rows=rows, labels=labels)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what a model is shown: number, shape, labels and pixels, wherever they come from.

        Up to 64 MiB of pixels are read; of larger sets, as many images as that, spread evenly.
        """
        some = evenly(len(self), max(64, _HASHED_BYTES // int(np.prod(self.shape))))
        state = hashlib.blake2b(repr((len(self), self.shape, self.latents, self.classes)).encode(), digest_size=16)
        if self.labels is not None:
            state.update(self.labels.numpy().tobytes())
        for start in range(0, len(some), 256):
            state.update(self.gather(some[start : start + 256]).tobytes())
        return state.hexdigest()


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of the numbers 0 … count − 1, from the first to the last at even distances, int64."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def check_dataset(dataset: object) -> None:
    """Refuse other kinds of data sets, of which nothing is known that training and comparing need.

    Raises:
        InputError: saying how one of these is made.
    """
    if not isinstance(dataset, Dataset):
        raise InputError(
            "images come as a dualout.data.Dataset, say Dataset('mine', array, 'nhwc') of a uint8 array, or "
            f"dualout.data.load('folder:PATH'); got a {type(dataset).__name__}"
        )
