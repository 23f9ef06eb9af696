"""A small convolutional network with fixed random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualout.data.pixels import to_model
from dualout.errors import InputError
from dualout.evaluation.features.base import NetworkFeatures


class RandomConvolutions(nn.Module):
    """Layers of 3×3 convolutions, each halving the image; the features are every layer's means over the pixels.

    Random filters respond to edges and textures of all scales; what they measure owes nothing to any training set.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ParameterList()
        for before, after in zip((channels, *widths), widths, strict=False):
            # He et al. 2015: the variance that keeps rectified activations of one size through the layers
            weight = torch.randn(after, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
            self.layers.append(nn.Parameter(weight))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> (B, sum of the widths)."""
        x, found = to_model(images), []
        for k, weight in enumerate(self.layers):
            stride = 1 if k == 0 or min(x.shape[2:]) < 2 else 2
            x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight, stride=stride))
            found.append(x.mean((2, 3)))
        return torch.cat(found, 1)


@dataclass(frozen=True)
class Random(NetworkFeatures):
    """A fixed random network: a cheap second opinion for images of any size and any number of channels."""

    seed: int = 0
    width: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 256:
            raise InputError(f"features 'random' have a width from 1 to 256, got {self.width}")

    def build(self) -> nn.Module:
        """The layers, which wait for the first images to know their channels."""
        return _ByChannels(self.widths, self.seed)

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of filters in each layer."""
        return self.width, 2 * self.width, 4 * self.width

    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Every shape will do."""

    def details(self) -> dict[str, Any]:
        """The layers, and where their numbers come from."""
        return {"widths": list(self.widths), "weights": "torch.randn on the CPU from the seed, He's variance"}


class _ByChannels(nn.Module):
    def __init__(self, widths: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.widths, self.seed = widths, seed
        self.networks = nn.ModuleDict()

    def forward(self, images: Tensor) -> Tensor:
        key = str(images.shape[1])
        if key not in self.networks:
            self.networks[key] = RandomConvolutions(images.shape[1], self.widths, self.seed).to(images.device)
        return self.networks[key](images)
