"""Crops of scikit-learn's two photographs, a temple roof and a flower: real colour images in the package, no download.

china.jpg (by Y. Hasan) and flower.jpg (by V. N. Malyutina), 427×640 pixels each, Creative Commons Attribution. Two
pictures teach textures and edges, not the world: enough to see a colour model learn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from dualout.data.base import Reading, Source
from dualout.data.dataset import Dataset
from dualout.errors import InputError

STRIDE = 8
TEST_FROM = 512


@dataclass(frozen=True)
class Photos(Source):
    """Colour crops of 32×32, one every 8 pixels; the label is the photograph.

    `size` is the size of the crop: nothing is scaled. The test split is cut from the columns 512…639, the training
    split from 0…511: they have no pixel in common. "all" is both.
    """

    def read(self, reading: Reading) -> Dataset:
        """Uint8 (N, H, W, 3)."""
        from sklearn.datasets import load_sample_images

        found = load_sample_images()
        height, width = self.shape or (32, 32)
        crops, labels = [], []
        for label, photo in enumerate(found.images):
            for part in self._parts(photo):
                if part.shape[0] < height or part.shape[1] < width:
                    raise InputError(
                        f"photos: size {height}×{width} is larger than the part of the photographs that the split "
                        f"{self.split!r} is cut from ({part.shape[0]}×{part.shape[1]})"
                    )
                windows = sliding_window_view(part, (height, width), (0, 1))[::STRIDE, ::STRIDE]
                crops.append(windows.transpose(0, 1, 3, 4, 2).reshape(-1, height, width, 3))
                labels.append(np.full(len(crops[-1]), label))
        # of paths, which scikit-learn writes as the system does
        classes = tuple(re.split(r"[/\\]", name)[-1].partition(".")[0] for name in found.filenames)
        return Dataset("photos", np.concatenate(crops), "nhwc", None, torch.from_numpy(np.concatenate(labels)), classes)

    def _parts(self, photo: np.ndarray) -> list[np.ndarray]:
        parts = {"train": photo[:, :TEST_FROM], "test": photo[:, TEST_FROM:]}
        return list(parts.values()) if self.split == "all" else [parts[self.split]]
