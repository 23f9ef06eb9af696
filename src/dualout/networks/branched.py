"""A last layer that gives each of a network's outputs a block of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualout.errors import InputError


class BranchedConv2d(nn.Module):
    """Convolutions of one input, each behind a residual block of its own: y_i = conv_i(h + silu(W_i·h)).

    In dual output the two predictions share everything up to the last convolution. Here each has a 1×1 convolution
    more, by which it can turn the shared features its own way.

    Args:
        in_channels: of the input, (B, in_channels, H, W).
        groups: how many channels each output has; they lie one after the other, (B, sum(groups), H, W).
        kernel_size: of the last convolutions, which keep the image's size.
    """

    stands_in: ClassVar[bool] = True
    """A checkpoint names it beside the network's class and arguments, which do not tell of it."""

    def __init__(self, in_channels: int, groups: Sequence[int], kernel_size: int = 3) -> None:
        super().__init__()
        if not groups or not all(isinstance(g, int) and g > 0 for g in groups) or kernel_size % 2 == 0:
            raise InputError(
                f"groups are channels, 1 or more each, and kernel_size is odd; got {groups}, {kernel_size}"
            )
        self.in_channels, self.groups, self.kernel_size = in_channels, list(groups), kernel_size
        self.blocks = nn.ModuleList(nn.Conv2d(in_channels, in_channels, 1) for _ in groups)
        self.outputs = nn.ModuleList(nn.Conv2d(in_channels, g, kernel_size, padding=kernel_size // 2) for g in groups)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"in_channels": self.in_channels, "groups": self.groups, "kernel_size": self.kernel_size}

    def forward(self, h: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, sum(groups), H, W)."""
        pairs = zip(self.blocks, self.outputs, strict=True)
        return torch.cat([output(h + F.silu(block(h))) for block, output in pairs], 1)
