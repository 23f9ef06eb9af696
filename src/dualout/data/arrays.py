"""Arrays that someone has made already: a .npy file, or a .npz of `images` and perhaps `labels`.

OpenAI's sample files (arr_0, arr_1) are read too. What lies uncompressed in the file is mapped, not loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from dualout.data.base import Reading, Source, check_holdout, class_labels, held_out, looked_for
from dualout.data.dataset import LAYOUTS, Dataset
from dualout.data.npfiles import npy_array, npz_array, npz_arrays
from dualout.errors import InputError, unknown

_CHANNELS = (1, 3)
_CHECKED_BYTES = 2**26
_BLACK = 1 / 255
"""Below which something is black. Images of which nothing is are perhaps in [−1, 1], and all brighter than grey."""


@dataclass(frozen=True)
class Arrays(Source):
    """Images N×H×W, N×H×W×C or N×C×H×W, uint8 or floating.

    Floating images are in [0, 1], or in [−1, 1] where any value is negative; with other ranges `values` must be given.
    They are checked and become 0…255.

    Attributes:
        path: the file.
        layout: "nhw", "nhwc" or "nchw"; None finds out, where one side only can be 1 or 3 channels. Of three sides the
            last must be none then: N×H×3 would be one image too.
        values: the values of black and white of floating images; what lies outside is clipped.
        latents: the arrays are no pictures but floats for a model to learn as they are (N×C×H×W where `layout` does not
            say otherwise): nothing is scaled or clipped.
        images: the name of the images in a .npz.
        labels: the name of the labels in a .npz.
        holdout: the share of images that make the test split, chosen by a hash of their number.
    """

    place: ClassVar[str] = "path"

    path: str
    layout: str | None = None
    values: tuple[float, float] | None = None
    latents: bool = False
    images: str = "images"
    labels: str = "labels"
    holdout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_holdout(self.holdout)
        if self.layout is not None and self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        if self.values is not None and not (
            isinstance(self.values, tuple)
            and len(self.values) == 2
            and np.isfinite(self.values).all()
            and self.values[0] != self.values[1]
        ):
            raise InputError(f"values are those of black and white, as in values=[0+1], got {self.values!r}")

    def read(self, reading: Reading) -> Dataset:
        """The arrays as they lie in the file."""
        path = Path(self.path).expanduser()
        if not path.is_file():
            missing = f"no file at {self.path}{looked_for(self.path)}"
            raise InputError(f"{self.path} is no file" if path.exists() else missing)
        images, values, unread = self._npz(path) if path.suffix == ".npz" else (npy_array(path), None, [])
        if not images.size:
            raise InputError(f"{self.path} holds no images: an array of shape {images.shape}")
        layout, (scale, notes) = self._found_layout(images), self._scale(images)
        labels, classes = None, ()
        if values is not None:
            labels = class_labels(values, len(images), self.path)
            classes = tuple(str(c) for c in range(int(labels.max()) + 1))
        rows = held_out(len(images), self.holdout, self.split)
        if labels is not None:
            labels = torch.from_numpy(labels if rows is None else labels[rows])
        if unread and labels is None:
            notes.append(
                f"there are no classes: {self.path} has no array {self.labels!r}, but {', '.join(unread)}; name "
                f"one by labels={unread[0]}"
            )
        return Dataset("arrays", images, layout, rows, labels, classes, scale, tuple(notes))

    def _npz(self, path: Path) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
        """Images, labels, and the names of the other arrays."""
        members = npz_arrays(path)
        names = {"images": self.images, "labels": self.labels}
        if (self.images, self.labels) == ("images", "labels") and "images" not in members and "arr_0" in members:
            names = {"images": "arr_0", "labels": "arr_1"}
        if names["images"] not in members:
            raise InputError(
                f"{self.path} has no array {names['images']!r}, but {', '.join(members) or 'none at all'}; "
                "name it by images=…"
            )
        if self.labels != "labels" and self.labels not in members:
            raise InputError(f"{self.path} has no array {self.labels!r}, but {', '.join(members)}")
        labels = npz_array(path, members[names["labels"]]) if names["labels"] in members else None
        unread = [name for name in members if name not in names.values()]
        return npz_array(path, members[names["images"]]), labels, unread

    def _found_layout(self, images: np.ndarray) -> str:
        shape = images.shape
        if self.layout is not None:
            if len(self.layout) != images.ndim:
                raise InputError(f"{self.path}: layout={self.layout} does not fit an array of shape {shape}")
            return self.layout
        if images.ndim == 3:
            if shape[2] in _CHANNELS and not self.latents:
                rows = "×".join(map(str, shape[1:]))
                one = "×".join(map(str, (1, *shape)))
                raise InputError(
                    f"{self.path}: the shape {shape} may be {shape[0]} grey images of {rows}, or one image of "
                    f"{shape[2]} channel{'s' * (shape[2] > 1)}; say layout=nhw for the first, and give the other as an "
                    f"array of {one}"
                )
            return "nhw"
        if images.ndim != 4:
            raise InputError(f"{self.path} holds an array of shape {shape}; images are N×H×W, N×H×W×C or N×C×H×W")
        if self.latents:
            return "nchw"
        first, last = shape[1] in _CHANNELS, shape[3] in _CHANNELS
        if first == last:
            what = "may be either" if first else "shows no side of 1 or 3 channels"
            raise InputError(f"{self.path}: the shape {shape} {what}; say layout=nhwc or layout=nchw")
        return "nchw" if first else "nhwc"

    def _scale(self, images: np.ndarray) -> tuple[tuple[float, float] | None, list[str]]:
        """The values of black and white, None for uint8 and for latents, and a note where they are a guess."""
        if images.dtype == np.uint8 and not self.latents:
            if self.values is not None:
                raise InputError(f"{self.path} holds uint8, 0 is black and 255 white; leave values out")
            return None, []
        if images.dtype.kind != "f":
            need = "latents are floating" if self.latents else "images are uint8 (0…255) or floating"
            raise InputError(f"{self.path} holds values of type {images.dtype}; {need}: convert them")
        low, high = self._extent(images)
        if self.latents:
            return None, []
        if self.values is not None:
            return (float(self.values[0]), float(self.values[1])), []
        if low >= 0 and high <= 1:
            dark = low < _BLACK
            note = (
                f"{self.path} holds values from {low:.3g} to {high:.3g}, read with 0 for black and 1 for white; where "
                "−1 is black, say values=[-1+1]"
            )
            return (0.0, 1.0), [] if dark else [note]
        if low >= -1 and high <= 1:
            return (-1.0, 1.0), []
        raise InputError(
            f"{self.path} holds floating values from {low:.6g} to {high:.6g}. Images are in [0, 1] or [−1, 1]; for "
            "another range say which values are black and white, such as values=[0+255]; if these are no "
            "pictures, latents=true"
        )

    def _extent(self, images: np.ndarray) -> tuple[float, float]:
        """The least and the largest value, over all of the file; NaN and infinities are refused."""
        each = max(1, _CHECKED_BYTES // max(1, images[:1].nbytes))
        lows, highs = [], []
        for start in range(0, len(images), each):
            block = images[start : start + each]
            low, high = float(block.min()), float(block.max())
            if not (np.isfinite(low) and np.isfinite(high)):
                bad = start + int(np.argmin(np.isfinite(block).all(axis=tuple(range(1, block.ndim)))))
                raise InputError(f"{self.path} holds NaN or infinite values, the first in image {bad}")
            lows.append(low)
            highs.append(high)
        return min(lows), max(highs)
