"""The UNets of IDDPM and ADM, which learn the variance too.

IDDPM: Nichol & Dhariwal 2021, arXiv 2102.09672, appendix A. ADM: Dhariwal & Nichol 2021, arXiv 2105.05233, appendix I.
Time scales and shifts what each residual block normalizes, attention is at several resolutions and, in ADM, blocks
halve and double the images themselves. Parameter counts with 3 channels and their variance, with dual output's 7 and
the variance, and with the classes that they are told:

| | classes | 6 | 10 |
|---|---|---|---|
| iddpm-cifar10 | | 52,546,438 | 52,551,050 |
| adm-imagenet64 | 1000 | 295,904,454 | 295,911,370 |
| adm-imagenet128 | 1000 | 421,529,606 | 421,538,826 |

`build` adds one class more, for "no class": 768 and 1,024 parameters beside these.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

from dualout.errors import InputError
from dualout.networks.backbones.base import Backbone, Size
from dualout.networks.backbones.unet import check_dropout, check_halvings, inputs_and_outputs, unet


@dataclass(frozen=True, kw_only=True)
class IDDPM(Backbone, ABC):
    """A UNet of this family, at the size it was made for or another that can be halved as often.

    Attributes:
        dropout: the share of activations that training drops.
    """

    channels: ClassVar[tuple[int, ...]]
    """Channels of each level, finest first."""
    attention: ClassVar[frozenset[int]]
    """The levels with attention."""
    layers: ClassVar[int]
    """Residual blocks a level on the way down; one more on the way up."""
    resample: ClassVar[str]
    """How levels are joined: by convolutions (conv) or by residual blocks (resnet)."""
    head_width: ClassVar[int | None]
    """Channels of an attention head; None leaves one head a layer."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_dropout(self.dropout)

    def description(self, image_channels: int, size: Size, out_channels: int, classes: int | None) -> dict[str, Any]:
        """UNet2DModel as in the original code."""
        check_halvings(self.name, size, len(self.channels))
        network = unet(
            self.channels,
            attention=self.attention,
            plain="ResnetDownsampleBlock2D" if self.resample == "resnet" else "DownBlock2D",
            layers_per_block=self.layers,
            dropout=self.dropout,
            attention_head_dim=self.head_width,
            # diffusers leaves out the norm before the middle's attention unless it is told
            attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            downsample_type=self.resample,
            upsample_type=self.resample,
            **inputs_and_outputs(image_channels, size, out_channels, classes),
        )
        return self.adapted(network)

    def adapted(self, network: dict[str, Any]) -> dict[str, Any]:
        """What is around the UNet2DModel: nothing, where it can say all."""
        return network


@dataclass(frozen=True, kw_only=True)
class IDDPMCIFAR10(IDDPM):
    """IDDPM's network for CIFAR-10, 3×32×32; it has four heads, all of 64 channels.

    Attributes:
        time_scale: what t is multiplied with: the original counts every schedule's steps to 1000, so with its T = 4000
            it is 0.25.
    """

    name = "iddpm-cifar10"
    channels = (128, 256, 256, 256)
    attention = frozenset({1, 2})
    layers = 3
    resample = "conv"
    head_width = 64
    dropout: float = 0.3
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.time_scale > 0:
            raise InputError(f"time_scale is a number above 0; got {self.time_scale}")

    def adapted(self, network: dict[str, Any]) -> dict[str, Any]:
        """A scale of time, where there is one."""
        if self.time_scale == 1:
            return network
        return {
            "class": "dualout.networks.scaled.ScaledTime",
            "arguments": {"network": network, "scale": self.time_scale},
        }


@dataclass(frozen=True, kw_only=True)
class ADMImageNet64(IDDPM):
    """ADM's network for ImageNet, 3×64×64; its heads are of 64 channels."""

    name = "adm-imagenet64"
    channels = (192, 384, 576, 768)
    attention = frozenset({1, 2, 3})
    layers = 3
    resample = "resnet"
    head_width = 64
    dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class ADMImageNet128(IDDPM):
    """ADM's network for ImageNet, 3×128×128; it has four heads at every width."""

    name = "adm-imagenet128"
    channels = (256, 256, 512, 768, 1024)
    attention = frozenset({2, 3, 4})
    layers = 2
    resample = "resnet"
    head_width = None

    def adapted(self, network: dict[str, Any]) -> dict[str, Any]:
        """Attention split into four."""
        return {"class": "dualout.networks.heads.Heads", "arguments": {"network": network, "heads": 4}}
