"""denoising-diffusion-pytorch's UNets: ``network(x, time, x_self_cond)``.

They are called as (x_t, t) as they are; those of its classifier-free guidance take the class by name,
``Keyword(network, "time", {"class_labels": "classes"})``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dualout.networks.output import Plain


@dataclass(frozen=True, kw_only=True)
class Lucidrains(Plain):
    """A 1×1 convolution."""

    classes = ("denoising_diffusion_pytorch.Unet", "denoising_diffusion_pytorch.Unet1D")
    layer: str = "final_conv"

    def record(self, network: Any, channels: int) -> None:
        """They count their outputs in `out_dim`."""
        network.out_dim = channels
