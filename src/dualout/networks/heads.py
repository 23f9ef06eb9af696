"""UNets whose attention has the same number of heads at every width."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dualout.errors import InputError
from dualout.networks.adapter import Adapter


class Heads(Adapter):
    """``network(x_t, t)`` with its attention split into `heads` heads, whatever the width of a level.

    diffusers' UNet2DModel has one `attention_head_dim` for all levels; with several widths it cannot have four heads at
    each, as ADM's network for ImageNet-128 has. How many heads there are changes no weight.

    Args:
        network: a UNet2DModel of one head a layer (``attention_head_dim=None``), or another module of diffusers'
            attention layers; they are changed in it.
        heads: how many.
    """

    def __init__(self, network: nn.Module, heads: int) -> None:
        super().__init__(network)
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
            raise InputError(f"heads is a whole number, 1 or more; got {heads!r}")
        self.heads = heads
        layers = _attention(network)
        if not layers:
            raise InputError(f"this {type(network).__name__} has none of diffusers' attention layers, so no heads")
        for layer in layers:
            if layer.inner_dim % heads or layer.inner_kv_dim != layer.inner_dim:
                raise InputError(f"attention of {layer.inner_dim} channels cannot be split into {heads} equal heads")
        for layer in layers:
            layer.heads = layer.sliceable_head_dim = heads
            layer.scale = (layer.inner_dim // heads) ** -0.5 if layer.scale_qk else 1.0

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"network": self.network, "heads": self.heads}

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's output for noisy images (B, C, H, W) at time steps (B,)."""
        return self.network(x_t, t, **conditions)


def _attention(network: Any) -> list[Any]:
    from diffusers.models.attention_processor import Attention

    if not isinstance(network, nn.Module):
        raise InputError(f"only a torch.nn.Module has attention layers; got {network!r}")
    return [module for module in network.modules() if isinstance(module, Attention)]
