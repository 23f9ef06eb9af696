"""Where networks make their output channels, and how these lie in the rows of that layer: one class an architecture.

An architecture that is not here is traced (`dualout.networks.trace`), or its layer is named by the user.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dualout.errors import InputError
from dualout.networks.wide import layers_of, rows_of
from dualout.registry import Registered


@dataclass(frozen=True, kw_only=True)
class Output(Registered, ABC):
    """The last layer of an architecture."""

    kind: ClassVar[str] = "output layer"
    classes: ClassVar[tuple[str, ...]] = ()
    """The networks it is for, as package.Class; those derived from them too."""
    same: ClassVar[tuple[str, ...]] = ()
    """Classes of layers, as package.Class, that compute just what those of torch.nn do from which they derive."""
    layer: str
    """The layer's name in the network."""
    each: int = 1
    """How many rows of it a channel has: those of a patch, or p² before a pixel shuffle."""
    beside: tuple[str, ...] = ()
    """Layers with as many rows, whose results are added to its own."""
    past: tuple[str, ...] = ()
    """Convolutions afterwards that mix the channels, and are added to them: the new ones go past."""

    @classmethod
    def of(cls, network: Any) -> Self:
        """The entry for one network, where its layer's name or its rows a channel depend on that."""
        return cls()  # pyright: ignore[reportCallIssue]  # entries that are not told it have a default

    @abstractmethod
    def rows(self, channels: int, each: int) -> Tensor:
        """The layer's rows that make each channel: (channels, each), of `channels · each` rows."""

    def channels(self, network: nn.Module) -> int:
        """How many channels the network has now."""
        return rows_of(network.get_submodule(self.layer)) // self.each

    def record(self, network: Any, channels: int) -> None:
        """Write down the new number of channels wherever the network keeps it, so that it can be saved and rebuilt."""
        if "out_channels" in vars(network):
            network.out_channels = channels
        if hasattr(network, "register_to_config") and "out_channels" in network.config:
            network.register_to_config(out_channels=channels)

    def check(self, network: Any) -> None:
        """Refuse variants of the architecture that cannot be widened.

        Raises:
            InputError: for those.
        """


@dataclass(frozen=True, kw_only=True)
class Plain(Output):
    """A channel's rows lie together, mostly one row; also for layers that were named or traced."""

    def rows(self, channels: int, each: int) -> Tensor:
        """(channels, each): one after the other."""
        return torch.arange(channels * each, device="cpu").view(channels, each)


@dataclass(frozen=True, kw_only=True)
class Interleaved(Output):
    """Transformers end with a linear map to patches, a pixel's channels next to each other; also where it was named or
    traced."""

    def rows(self, channels: int, each: int) -> Tensor:
        """(channels, each): the channel runs fastest."""
        return torch.arange(channels * each, device="cpu").view(each, channels).T


@dataclass(frozen=True, kw_only=True)
class ConvOut(Plain):
    """diffusers' UNets end with a convolution."""

    classes = (
        "diffusers.UNet2DModel",
        "diffusers.UNet2DConditionModel",
        "diffusers.UNet3DConditionModel",
        "diffusers.UNetSpatioTemporalConditionModel",
    )
    layer: str = "conv_out"

    def check(self, network: Any) -> None:
        """Refuse UNets that add an image of 3 channels to their output."""
        if any(hasattr(block, "skip_conv") for block in network.up_blocks):
            raise InputError(
                f"this {type(network).__name__} has skip blocks, which add up 3-channel images to its output: it "
                "cannot be widened"
            )


@dataclass(frozen=True, kw_only=True)
class Line(Plain):
    """diffusers' UNet1DModel ends with a convolution, or with a residual block whose skip is a convolution too."""

    classes = ("diffusers.UNet1DModel",)
    layer: str = ""

    @classmethod
    def of(cls, network: Any) -> Self:
        """The last convolution of this network's output block, or of its last block."""
        if network.config.out_block_type is not None:
            return cls(layer="out_block.final_conv1d_2")
        block = f"up_blocks.{len(network.up_blocks) - 1}.resnets.2"
        return cls(layer=f"{block}.conv_2", beside=(f"{block}.conv_skip",))

    def check(self, network: Any) -> None:
        """Refuse networks that do not give images, or normalize or add up their channels at the end."""
        out, last = network.config.out_block_type, network.config.up_block_types[-1]
        if out not in (None, "OutConv1DBlock"):
            raise InputError(f"this UNet1DModel ends with a {out}, whose output is no signal: it cannot be widened")
        if out is None and last != "UpBlock1DNoSkip":
            raise InputError(
                f"this UNet1DModel ends with a {last}, which does more with its channels than convolve them: it cannot "
                "be widened; those that end with UpBlock1DNoSkip or OutConv1DBlock can"
            )
        if out is None and not all(name in layers_of(network) for name in (self.layer, *self.beside)):
            raise InputError(
                "this UNet1DModel adds its last block's input to its output channel by channel: it cannot be widened"
            )


def output_of(network: nn.Module) -> Output | None:
    """The entry for a network's class, or None."""
    names = set(map(named, type(network).__mro__))
    return next((kind.of(network) for kind in Output.kinds().values() if names & set(kind.classes)), None)


def named(cls: type) -> str:
    """package.Class."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
