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

    The mean and the sum of (x − mean)·(x − mean)ᵀ are kept, of which those of two sets give those of both (Chan et al.
    1979): however the images are divided among processes, merging in their order gives the same as one pass, to
    rounding, and features far from 0 lose nothing by that.

    Args:
        kept: how many images' features to keep, at most.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.limit = kept
        self.count = 0
        self._gathered: tuple[Tensor, Tensor] | None = None
        self._features: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Count in a batch of features, (B, D).

        Raises:
            InputError: when one is not finite, or they are no vectors of the length of those before.
        """
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = getattr(features, "shape", None)
            raise InputError(f"features are a tensor (B, D), got a {type(features).__name__} of shape {shape}")
        self._check_length(features.shape[1])
        x = double(features.detach())
        if not torch.isfinite(x).all():
            raise InputError(f"the features of images {self.count} to {self.count + len(x) - 1} hold NaN or infinity")
        if not len(x):
            return
        mean = x.mean(0)
        from_it = x - mean
        self._count_in(len(x), mean, from_it.T @ from_it)
        missing = self.limit - sum(map(len, self._features))
        if missing > 0:
            self._features.append(features[:missing].detach().float().cpu())

    def merge(self, other: Statistics) -> None:
        """Count in what was gathered elsewhere, as if its images came after these."""
        if other._gathered is None:
            return
        self._check_length(len(other._gathered[0]))
        self._count_in(other.count, *other._gathered)
        missing = self.limit - sum(map(len, self._features))
        self._features.append(other.features[: max(missing, 0)])

    def _check_length(self, length: int) -> None:
        if self._gathered is not None and length != len(self._gathered[0]):
            raise InputError(f"features of length {length} came after some of length {len(self._gathered[0])}")

    def _count_in(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._gathered is None:
            self._gathered = mean.clone(), scatter.clone()
        else:
            own_mean, own_scatter = self._gathered
            share = count / (self.count + count)
            apart = mean.to(own_mean.device) - own_mean
            own_scatter += scatter.to(own_scatter.device)
            own_scatter.addr_(apart, apart, alpha=self.count * share)
            own_mean += share * apart
        self.count += count
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
        if self.count < 2 or self._gathered is None:
            raise InputError(f"a covariance needs at least 2 images, got {self.count}")
        mean, scatter = self._gathered
        # not what further images are counted into
        return mean.cpu().clone(), ((scatter + scatter.T) / (2 * (self.count - 1))).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Everything, to be written down."""
        if self._gathered is None:
            raise InputError("no images have been counted")
        return {
            "count": torch.tensor(self.count), "limit": torch.tensor(self.limit),
            "mean": self._gathered[0], "scatter": self._gathered[1], "features": self.features,
        }  # fmt: skip

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Statistics:
        """What `tensors` wrote."""
        found = cls(int(tensors["limit"]))
        found.count = int(tensors["count"])
        found._gathered = tensors["mean"], tensors["scatter"]
        found._features = [tensors["features"]]
        return found
