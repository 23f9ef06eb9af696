"""Networks whose images have their channels at another side than the second, or more channels than are noised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualout.denoiser import tensor_of
from dualout.errors import InputError
from dualout.networks.adapter import Adapter, ConditionAdapter


class ChannelsAt(Adapter):
    """A network whose images and output have their channels at another side: (B, F, C, H, W) at 2, (B, …, C) at -1.

    Args:
        network: the network.
        side: which of its images' sides the channels are.
    """

    def __init__(self, network: nn.Module | Callable[..., Any], side: int) -> None:
        super().__init__(network)
        if not isinstance(side, int) or isinstance(side, bool) or side == 0:
            raise InputError(f"side is a whole number, 2 for images (B, F, C, H, W) and -1 for (B, …, C); got {side!r}")
        self.side = side

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"network": self.network, "side": self.side}

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The network's output, (B, channels, …), for noisy images (B, C, …) at time steps (B,)."""
        if not -x_t.ndim < self.side < x_t.ndim:
            raise InputError(f"images of shape {tuple(x_t.shape)} have no side {self.side} for their channels")
        # networks look at their images' memory, too
        there = x_t.movedim(1, self.side).contiguous()
        return tensor_of(self.network(there, t, **conditions)).movedim(self.side, 1)


class Concatenated(ConditionAdapter):
    """A network that sees other images beside the noisy ones, as more channels: a first frame, a mask, what to edit.

    They are conditions of the denoiser, (B, its channels, …) of the same size, and follow x_t in the order named.

    Args:
        network: the network.
        conditions: what their conditions are called: ``["image_latents"]``, ``["mask", "masked_image_latents"]``.
    """

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's output for noisy images (B, C, …) at time steps (B,)."""
        beside = [conditions.pop(name, None) for name in self.conditions]
        sides = (x_t.shape[0], *x_t.shape[2:])
        for name, images in zip(self.conditions, beside, strict=True):
            if not isinstance(images, Tensor) or (*images.shape[:1], *images.shape[2:]) != sides:
                came = tuple(images.shape) if isinstance(images, Tensor) else images
                raise InputError(
                    f"this network sees {name} beside x_t, images of its shape {tuple(x_t.shape)} but for the number "
                    f"of channels; got {came}"
                )
        return self.network(torch.cat([x_t, *(images.to(x_t) for images in beside)], 1), t, **conditions)
