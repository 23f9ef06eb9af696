"""Group normalization that leaves its input's layout as it is, for training steps that are compiled on a GPU.

There torch's `group_norm` makes its input contiguous before anything else, also when it is compiled. In a network whose
convolutions have channels last, each normalization then hands on images laid out otherwise, and the backward passes of
the convolutions, which keep them, copy them. Written out, in operations that the compiler fuses, it hands on what came.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WrittenOut(nn.GroupNorm):
    """Group normalization (Wu & He 2018, arXiv 1803.08494, equations 1 to 4), written out where it is compiled."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, …), normalized over each of the groups of channels; in float32 under autocast, as torch's is."""
        if not torch.compiler.is_compiling():
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32)).unflatten(1, (self.num_groups, -1))
        variance, mean = torch.var_mean(x, dim=tuple(range(2, x.ndim)), correction=0, keepdim=True)
        x = ((x - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        if self.affine:
            a_channel = (1, -1, *[1] * (input.ndim - 2))
            x = x * self.weight.view(a_channel) + self.bias.view(a_channel)
        return x if torch.is_autocast_enabled(input.device.type) else x.to(input.dtype)


def write_out(network: nn.Module) -> None:
    """Let a network's group normalizations be `WrittenOut` from now on; weights and names stay what they are.

    One that is of a class of its own stays as it is, since it may do something else.
    """
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = WrittenOut
