"""Networks that take and give a list of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualout.errors import InputError
from dualout.networks.adapter import ConditionAdapter


class Listed(ConditionAdapter):
    """``network([image, …], t, **conditions)`` with images (C, 1, H, W), as Z-Image has them; gives a list of as many.

    Args:
        network: the network.
        conditions: those that are lists too: a tensor with a row an image becomes one.
    """

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The network's output for noisy images (B, C, H, W) at time steps (B,)."""
        lists = {name: list(conditions[name]) for name in self.conditions if name in conditions}
        output = self.network(list(x_t.unsqueeze(2)), t, **(conditions | lists))
        images = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if not isinstance(images, list) or len(images) != len(x_t):
            got = f"{len(images)} of them" if isinstance(images, list) else type(images).__name__
            raise InputError(f"a network of lists gives a list of {len(x_t)} images; got {got}")
        return torch.stack(images).squeeze(2)
