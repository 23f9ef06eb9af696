"""UNets for small images, whose depth follows the images."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dualout.errors import InputError
from dualout.networks.backbones.base import Backbone, Size

SMALLEST = 4
"""Images are not halved below this many pixels a side."""
LARGEST = 32
"""The coarsest level, the one with attention, has at most this many pixels a side."""


@dataclass(frozen=True, kw_only=True)
class UNet(Backbone, ABC):
    """diffusers' UNet2DModel with attention at its coarsest level only.

    As many levels as the image can be halved, up to one for each multiplier.

    Attributes:
        width: channels of the finest level.
        multipliers: channels of each level, in widths, finest first.
        layers: residual blocks a level on the way down; one more on the way up.
        dropout: the share of activations that training drops.
        branches: whether the first output and what comes after it have a block of their own before their
            convolution, for less than 1% of the operations (`dualout.networks.branched`).
    """

    width: int = 32
    multipliers: tuple[float, ...] = (1, 2, 4)
    layers: int = 1
    dropout: float = 0.0
    branches: bool = False

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        if self.layers < 1:
            raise InputError(f"layers is 1 or more; got {self.layers}")
        if self.width < 4 or self.width % 2:
            raise InputError(f"width is an even number of channels, 4 or more; got {self.width}")
        channels = [self.width * m for m in self.multipliers]
        if not channels or any(c != int(c) or c < 1 for c in channels):
            raise InputError(
                "width · multipliers are the channels of the levels, whole numbers; "
                f"got {self.width} · {self.multipliers}"
            )

    def description(self, image_channels: int, size: Size, out_channels: int, classes: int | None) -> dict[str, Any]:
        """UNet2DModel, as deep as the images allow."""
        levels = halvings(size, len(self.multipliers) - 1) + 1
        check_coarsest(self.name, size, levels, len(self.multipliers))
        channels = [int(self.width * m) for m in self.multipliers[:levels]]
        network = unet(
            channels,
            attention={levels - 1},
            layers_per_block=self.layers,
            dropout=self.dropout,
            norm_num_groups=norm_groups(channels),
            **inputs_and_outputs(image_channels, size, out_channels, classes),
        )
        return network | (
            {"layers": {"conv_out": branched(channels[0], image_channels, out_channels)}} if self.branches else {}
        )


@dataclass(frozen=True, kw_only=True)
class Tiny(UNet):
    """About 0.4 million parameters, for images of 8×8: a step of 128 of them takes 0.15 s on one CPU core."""

    width: int = 24
    multipliers: tuple[float, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Small(UNet):
    """About 1.6 million parameters, for images of 28 to 32 pixels: a step of 64 takes 1.3 s on one CPU core."""

    width: int = 32
    multipliers: tuple[float, ...] = (1, 1.5, 3)


def unet(
    channels: Sequence[int], attention: Collection[int], plain: str = "DownBlock2D", **arguments: Any
) -> dict[str, Any]:
    """diffusers' UNet2DModel with these channels a level, finest first, and attention at the levels of these indices.

    The other levels are of the kind `plain`. Attention has one head unless `arguments` say otherwise (DDPM, and several
    times faster on a CPU than many narrow ones).
    """
    down = ["AttnDownBlock2D" if level in attention else plain for level in range(len(channels))]
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    shape = {"block_out_channels": list(channels), "down_block_types": down, "up_block_types": up}
    return {"class": "diffusers.UNet2DModel", "arguments": shape | {"attention_head_dim": None} | arguments}


def branched(width: int, image_channels: int, out_channels: int) -> dict[str, Any]:
    """The last layer with a block for the first `image_channels`, and one for the rest: second output and ratio."""
    rest = out_channels - image_channels
    groups = [image_channels, rest] if rest > 0 else [out_channels]
    return {
        "class": "dualout.networks.branched.BranchedConv2d",
        "arguments": {"in_channels": width, "groups": groups},
    }


def inputs_and_outputs(image_channels: int, size: Size, out_channels: int, classes: int | None) -> dict[str, Any]:
    """UNet2DModel's arguments for what goes in and what comes out."""
    return {
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "in_channels": image_channels,
        "out_channels": out_channels,
        "num_class_embeds": None if classes is None else classes + 1,
    }


def norm_groups(channels: Sequence[int], most: int = 32, each: int = 4) -> int:
    """The most groups that divide all levels' channels, with `each` channels a group or more."""
    shared, fewest = math.gcd(*channels), min(channels)
    return max(g for g in range(1, most + 1) if shared % g == 0 and (g == 1 or fewest // g >= each))


def halvings(size: Size, most: int) -> int:
    """How often both sides can be halved, with no less than SMALLEST pixels left."""
    count = 0
    while count < most and all(s % 2 ** (count + 1) == 0 and s >> (count + 1) >= SMALLEST for s in size):
        count += 1
    return count


def check_coarsest(name: str, size: Size, levels: int, most: int) -> None:
    """Refuse sizes whose coarsest level would still be too large for attention."""
    if max(size) >> (levels - 1) > LARGEST:
        unit = 2 ** (most - 1)
        fits = [min(max(unit, round(s / unit) * unit), unit * LARGEST) for s in size]
        raise InputError(
            f"network {name!r} cannot halve images of {size[0]}×{size[1]} to {LARGEST} pixels or less; sides are "
            f"multiples of {unit} up to {unit * LARGEST}: resize to, say, {fits[0]}×{fits[1]}"
        )


def check_halvings(name: str, size: Size, levels: int) -> None:
    """Refuse sizes that do not give whole pixels on every one of so many levels."""
    unit = 2 ** (levels - 1)
    if any(s % unit for s in size):
        fits = [max(unit, round(s / unit) * unit) for s in size]
        raise InputError(
            f"network {name!r} halves images {levels - 1} times: sides are multiples of {unit}, "
            f"got {size[0]}×{size[1]}; resize to, say, {fits[0]}×{fits[1]}, or use the network 'small'"
        )


def check_dropout(dropout: float) -> None:
    """Refuse what is no share."""
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is a share, from 0 to below 1; got {dropout}")
