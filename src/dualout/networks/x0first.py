"""Dual-output networks that give the clean image before the noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualout.denoiser import tensor_of
from dualout.errors import InputError
from dualout.networks.adapter import Adapter


class X0First(Adapter):
    """A network of ``[x0 (C), eps (C), …]``, as the authors' code has them, gives ``[eps (C), x0 (C), …]``.

    What comes after, the logit of the ratio, stays: it weights x0 there too (yanivbenny/dual_diffusion).

    Args:
        network: the network.
    """

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"network": self.network}

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The network's output for noisy images (B, C, …) at time steps (B,), in dualout's order."""
        raw, channels = tensor_of(self.network(x_t, t, **conditions)), x_t.shape[1]
        if raw.shape[1] < 2 * channels:
            raise InputError(
                f"a network of x0 and eps of {channels}-channel images has {2 * channels} output channels or more; "
                f"got {raw.shape[1]}"
            )
        x0, eps, rest = raw.tensor_split([channels, 2 * channels], 1)
        return torch.cat([eps, x0, rest], 1)
