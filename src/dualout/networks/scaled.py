"""Networks that count time otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dualout.networks.adapter import Adapter


class ScaledTime(Adapter):
    """``network(x_t, scale · t + shift)``: time is a float, in float32 whatever the network's precision.

    Args:
        network: the network.
        scale: 1/T for networks that see t/T.
        shift: 1/T with that for (t + 1)/T.
    """

    def __init__(self, network: nn.Module | Callable[..., Any], scale: float, shift: float = 0.0) -> None:
        super().__init__(network)
        self.scale, self.shift = float(scale), float(shift)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"network": self.network, "scale": self.scale, "shift": self.shift}

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's output for noisy images (B, C, H, W) at time steps (B,)."""
        return self.network(x_t, t.float() * self.scale + self.shift, **conditions)
