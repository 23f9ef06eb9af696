"""scikit-learn's handwritten digits: 1,797 real images of 8×8, in the package, no download.

From E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI machine learning repository, 1998): the
test set of 13 writers' digits, counts 0…16 of ink in 4×4 blocks. Small enough to train on while one waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dualout.data.base import Reading, Source
from dualout.data.dataset import Dataset

TEST_EVERY = 6


@dataclass(frozen=True)
class Digits(Source):
    """1,797 grey 8×8 digits in 10 classes; 0…16 becomes 0…255 by round(255·v / 16), half to even.

    The test split is every sixth image of each digit (296 images), so that every writer and digit is in both.
    """

    def read(self, reading: Reading) -> Dataset:
        """Uint8 (N, 8, 8)."""
        from sklearn.datasets import load_digits

        ink, target = load_digits(return_X_y=True)
        images, labels = np.rint(ink.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), target.astype(np.int64)
        rows = None
        if self.split != "all":
            test = np.zeros(len(labels), bool)
            for digit in range(10):
                test[np.flatnonzero(labels == digit)[TEST_EVERY - 1 :: TEST_EVERY]] = True
            rows = np.flatnonzero(test if self.split == "test" else ~test)
            labels = labels[rows]
        return Dataset("digits", images, "nhw", rows, torch.from_numpy(labels), tuple(map(str, range(10))))
