"""The interface of every feature network."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualout.checkpoint import content_hash
from dualout.errors import InputError
from dualout.registry import Registered


@dataclass(frozen=True)
class Features(Registered, ABC):
    """Turns images into vectors whose distribution is compared.

    Letters: B images, C channels, H×W pixels, D features.
    """

    kind: ClassVar[str] = "features"

    def __call__(self, images: Tensor) -> Tensor:
        """The features of images.

        Args:
            images: uint8, (B, C, H, W).

        Returns:
            float32, (B, D), on the images' device.

        Raises:
            InputError: when these features do not take such images.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise InputError(f"features are of uint8 images (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
        self.check(images.shape[1], (images.shape[2], images.shape[3]))
        with torch.no_grad():
            features = self.extract(images).float()
        if features.ndim != 2 or len(features) != len(images):
            raise InputError(
                f"features {self.name!r} are a vector an image, (B, D): got {tuple(features.shape)} of {len(images)} "
                "images; flatten(1) makes vectors of maps"
            )
        return features

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> (B, D)."""

    @abstractmethod
    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Refuse images of a shape that these features do not take, and say what is missing on this machine.

        Raises:
            InputError: in both cases.
        """

    def details(self) -> dict[str, Any]:
        """What identifies the features besides the fields: version, hash of weights, preprocessing; JSON values.

        Statistics of real images are kept under it: features that change, while this does not, get old statistics.
        """
        return {}

    def protocol(self) -> dict[str, Any]:
        """What is written down with every score: all that must be equal for two scores to be comparable."""
        return self.config() | self.details()

    @property
    def fingerprint(self) -> str:
        """A hash of `protocol`, by which reference statistics are cached."""
        return hashlib.sha256(json.dumps(self.protocol(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class NetworkFeatures(Features, ABC):
    """Features that a torch module computes."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The network with its weights, which maps uint8 (B, C, H, W) to (B, D)."""

    @cached_property
    def network(self) -> nn.Module:
        """The network, built on first use."""
        return self.build().eval().requires_grad_(False)

    @cached_property
    def _digest(self) -> str:
        return content_hash(repr(self.network), self.network.state_dict())

    def details(self) -> dict[str, Any]:
        """A hash of the layers and their weights."""
        return {"sha256": self._digest}

    def extract(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> (B, D)."""
        return self.network.to(images.device)(images)


def in_colour(images: Tensor) -> Tensor:
    """Grey images with their channel repeated three times; colour images as they are."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def check_colour(name: str, channels: int) -> None:
    """Refuse images that are neither grey nor colour."""
    if channels not in (1, 3):
        raise InputError(f"features {name!r} are of grey or colour images (1 or 3 channels), these have {channels}")
