"""What a model of classes is told of the images that it makes for a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dualout.data.dataset import Dataset


@dataclass(frozen=True, eq=False)
class Told:
    """A class for each image, so that a set of made images has as many of each class as the real ones have.

    Attributes:
        labels: classes in random order, int64 (N,); image number i is told that of number i modulo N.
        none: the number that stands for no class.
        source: where the classes are from, for the protocol.
    """

    labels: Tensor
    none: int
    source: str

    @classmethod
    def of(cls, classes: int | None, dataset: Dataset, rows: Sequence[int], device: torch.device) -> Told | None:
        """The classes of real images, or all in turn where they are not the model's.

        Args:
            classes: how many the model knows; None, when it is told nothing, gives None.
            dataset: the real images.
            rows: which of them.
            device: where the images are made.
        """
        if classes is None:
            return None
        own = dataset.labels is not None and len(dataset.classes) == classes
        labels = dataset.labels[list(rows)] if own else torch.arange(len(rows)) % classes  # type: ignore[index]
        # folders lie sorted by class, and a batch is to have all
        mixed = labels[torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))]
        return cls(mixed.to(device), classes, "of the real images" if own else "all in turn")

    def classes(self, numbers: range) -> dict[str, Tensor]:
        """Of images with these numbers."""
        return {"class_labels": self.labels[[i % len(self.labels) for i in numbers]]}

    def nothing(self, count: int) -> dict[str, Tensor]:
        """That so many images have no class."""
        return {"class_labels": torch.full((count,), self.none, device=self.labels.device)}
