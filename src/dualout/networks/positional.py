"""Networks that take their conditions by position, or under other names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dualout.errors import InputError
from dualout.networks.adapter import ConditionAdapter


class Positional(ConditionAdapter):
    """``network(x_t, t, y, …)``: conditions are passed on by position.

    Args:
        network: the network.
        conditions: their names, in the network's order: ``["class_labels"]`` for networks called as (x, t, y).
    """

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's output for noisy images (B, C, H, W) at time steps (B,)."""
        if conditions.keys() != set(self.conditions):
            raise InputError(
                f"this network takes the conditions {', '.join(self.conditions) or '(none)'}; "
                f"got {', '.join(conditions) or '(none)'}"
            )
        return self.network(x_t, t, *(conditions[name] for name in self.conditions))
