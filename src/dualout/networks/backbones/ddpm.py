"""The UNets of DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B), of which the paper's experiments start.

Five residual-block levels or fewer, one attention level at 16×16, padding as in the original, so that its published
weights fit. Parameter counts with 3 outputs and with dual output's 7:

| | 3 | 7 |
|---|---|---|
| ddpm-cifar10 | 35,746,307 | 35,750,919 |
| ddpm-celeba64 | 78,700,803 | 78,705,415 |
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

from dualout.networks.backbones.base import Backbone, Size
from dualout.networks.backbones.unet import check_dropout, check_halvings, inputs_and_outputs, unet


@dataclass(frozen=True, kw_only=True)
class DDPM(Backbone, ABC):
    """One of DDPM's UNets, at the size it was made for or another that can be halved as often.

    Attributes:
        dropout: the share of activations that training drops.
    """

    channels: ClassVar[tuple[int, ...]]
    """Channels of each level, finest first."""
    attention: ClassVar[int]
    """The level with attention: the one of 16×16."""
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_dropout(self.dropout)

    def description(self, image_channels: int, size: Size, out_channels: int, classes: int | None) -> dict[str, Any]:
        """UNet2DModel as in the original code."""
        check_halvings(self.name, size, len(self.channels))
        return unet(
            self.channels,
            attention={self.attention},
            layers_per_block=2,
            dropout=self.dropout,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            **inputs_and_outputs(image_channels, size, out_channels, classes),
        )


@dataclass(frozen=True, kw_only=True)
class CIFAR10(DDPM):
    """The network for CIFAR-10, 3×32×32."""

    name = "ddpm-cifar10"
    channels = (128, 256, 256, 256)
    attention = 1


@dataclass(frozen=True, kw_only=True)
class CelebA64(DDPM):
    """The network for CelebA, 3×64×64 (of DDIM, Song et al. 2021, arXiv 2010.02502)."""

    name = "ddpm-celeba64"
    channels = (128, 256, 256, 256, 512)
    attention = 2
