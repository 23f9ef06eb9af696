"""What is measured, and where: networks with random weights, and random images."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dualout.data.dataset import Dataset
from dualout.networks import build

GPU = torch.cuda.is_available()
PLACE = torch.device("cuda", 0) if GPU else torch.device("cpu")
"""Where networks and tensors are; clocks follow (`timing`)."""


class Prepared(nn.Module):
    """A network that costs nothing: it returns a tensor that was made before."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.output


class Plain(nn.Module):
    """A UNet2DModel as (x_t, t) -> tensor; t may have no dimensions."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t).sample


def small(channels: int = 3, heads: int = 8) -> nn.Module:
    """S: 1.74 million parameters, 0.67 GFLOP an image of 3×32×32 forward, attention counted.

    Args:
        channels: of the output.
        heads: of attention. diffusers' default for its 64 channels is 8, of width 8; ours is 1.
    """
    unet = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=channels, layers_per_block=1, block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=64 // heads,
    )  # fmt: skip
    return Plain(unet).to(PLACE)


def cifar10(channels: int = 3, dropout: float = 0.0) -> nn.Module:
    """M: DDPM's UNet for CIFAR-10, 35.7 million parameters, 12.5 GFLOP an image forward, attention counted."""
    return Plain(build(f"ddpm-cifar10:dropout={dropout}", 3, 32, channels)).to(PLACE)


@torch.no_grad()
def operations(network: nn.Module, x: Tensor, **conditions: Tensor) -> int:
    """Floating-point operations of a forward pass of images; a multiplication and an addition are two."""
    t = torch.zeros(len(x), dtype=torch.long, device=x.device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x, t, **conditions)
    return counter.get_total_flops()


def images(count: int, seed: int = 0) -> Tensor:
    """(B, 3, 32, 32), uniform in [−1, 1]."""
    return (torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(PLACE)


def dataset(count: int = 1024) -> Dataset:
    """Images of 3×32×32, uint8, in memory."""
    return Dataset("random", np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
