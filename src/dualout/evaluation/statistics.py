"""What is gathered of the features of a set of images, batch by batch, in memory that does not grow with the set."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from dualout.errors import InputError
from dualout.networks.device import double

KEPT = 10_000
"""How many images' features are kept for the metrics that compare images one by one (KID, precision, recall)."""


class Statistics:
    """The mean and the covariance of features (float64), and the features of the first images.

    Sums of x and of x·xᵀ are kept, so that those of two sets merge by addition: however the images are divided among
    processes, merging in their order gives the same as one pass, to rounding.

    Args:
        kept: how many images' features to keep, at most.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.limit = kept
        self.count = 0
        self._sums: tuple[Tensor, Tensor] | None = None
        self._features: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Count in a batch of features, (B, D).

        Raises:
            InputError: when one is not finite, or they are no vectors of the length of those before.
        """
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = getattr(features, "shape", None)
            raise InputError(f"features are a tensor (B, D), got a {type(features).__name__} of shape {shape}")
        if self._sums is not None and features.shape[1] != len(self._sums[0]):
            raise InputError(f"features of length {features.shape[1]} came after some of length {len(self._sums[0])}")
        x = double(features.detach())
        if not torch.isfinite(x).all():
            raise InputError(f"the features of images {self.count} to {self.count + len(x) - 1} hold NaN or infinity")
        if self._sums is None:
            self._sums = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        total, outer = self._sums
        total += x.sum(0)
        outer.addmm_(x.T, x)
        missing = self.limit - sum(map(len, self._features))
        if missing > 0:
            self._features.append(features[:missing].detach().float().cpu())
        self.count += len(x)
        self.__dict__.pop("moments", None)

    def merge(self, other: Statistics) -> None:
        """Count in what was gathered elsewhere, as if its images came after these."""
        if other._sums is None:
            return
        if self._sums is None:
            self._sums = other._sums[0].clone(), other._sums[1].clone()
        else:
            for own, added in zip(self._sums, other._sums, strict=True):
                own += added.to(own.device)
        missing = self.limit - sum(map(len, self._features))
        self._features.append(other.features[: max(missing, 0)])
        self.count += other.count
        self.__dict__.pop("moments", None)

    @property
    def features(self) -> Tensor:
        """The features that were kept, float32 (at most `kept`, D)."""
        if len(self._features) != 1:
            self._features = [torch.cat(self._features)] if self._features else [torch.zeros(0, 0)]
        return self._features[0]

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean (D,) and the unbiased covariance (D, D), float64 on the CPU."""
        if self.count < 2 or self._sums is None:
            raise InputError(f"a covariance needs at least 2 images, got {self.count}")
        total, outer = (s.cpu() for s in self._sums)
        mean = total / self.count
        covariance = (outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean, (covariance + covariance.T) / 2

    def tensors(self) -> dict[str, Tensor]:
        """Everything, to be written down."""
        if self._sums is None:
            raise InputError("no images have been counted")
        return {
            "count": torch.tensor(self.count), "limit": torch.tensor(self.limit),
            "total": self._sums[0], "outer": self._sums[1], "features": self.features,
        }  # fmt: skip

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Statistics:
        """What `tensors` wrote."""
        found = cls(int(tensors["limit"]))
        found.count = int(tensors["count"])
        found._sums = tensors["total"], tensors["outer"]
        found._features = [tensors["features"]]
        return found
