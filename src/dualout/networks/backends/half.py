"""A network in half precision throughout, where a GPU would be waited for.

Autocast computes convolutions and matrix products in half precision and most of the rest in float32: weights are cast
in every call, and what goes between layers takes twice the bytes. A copy whose weights are half does neither.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dualout.denoiser import tensor_of
from dualout.networks.backends.base import Call, Plain
from dualout.networks.precision import Precision

NEAR = 2.0
"""How many times as far from float32 as autocast's output may be that of a copy in half precision throughout. Of
UNets it is 1.0 to 1.4 times in bf16."""


class Half(nn.Module):
    """A copy of a network with half-precision weights, called as `Plain` is, whatever autocast is around it.

    Args:
        network: is not changed; what is done to its weights later, the copy does not follow.
        names: of the conditions, in order.
        dtype: of the copy.
    """

    def __init__(self, network: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__()
        # not by a method of its own: that of diffusers' models warns of layers to be kept in float32, and has none
        self.network = nn.Module.to(copy.deepcopy(network), dtype)
        self.names, self.dtype = names, dtype

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """The network's output, in the number format of x."""
        told = {
            name: v.to(self.dtype) if v.is_floating_point() else v
            for name, v in zip(self.names, conditions, strict=True)
        }
        with torch.autocast(x.device.type, enabled=False):
            return tensor_of(self.network(x.to(self.dtype), t, **told)).to(x.dtype)


@torch.no_grad()
def plain_of(network: nn.Module, call: Call, precision: Precision) -> Plain | Half:
    """The network in half precision throughout, where that is asked for, possible and near enough; else as it is, for
    autocast.

    A network that makes float32 tensors of its own and lets them meet its weights is computed with autocast, and so is
    one that overflows, whose output is more than `NEAR` times as far from float32's, or of which diffusers says that
    layers are to be kept in float32.

    Args:
        network: in evaluation mode, on its device.
        call: an example.
        precision: what is asked for.
    """
    names = tuple(call.conditions)
    plain = Plain(network, names)
    kept = any(getattr(m, "_keep_in_fp32_modules", None) for m in network.modules())
    if precision.name == "fp32" or kept or any(p.dtype != torch.float32 for p in network.parameters()):
        return plain
    half = Half(network, names, precision.dtype)
    try:
        with precision.autocast():
            found, usual = half(*call.tensors), plain(*call.tensors)
    except RuntimeError:
        return plain
    expected = plain(*call.tensors)
    # written so that NaN is refused, too
    return half if _apart(found, expected) <= NEAR * _apart(usual, expected) else plain


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).square().mean().sqrt())
