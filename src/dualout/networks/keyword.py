"""Networks whose time is named, and not the second argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dualout.errors import InputError
from dualout.networks.adapter import Adapter


class Keyword(Adapter):
    """``network(x_t, timestep=t, **conditions)``: for diffusers' transformers, whose second argument is the text.

    Args:
        network: the network.
        time: its name for t.
        conditions: its names for conditions, where they are others: ``{"class_labels": "classes"}``.
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Any],
        time: str = "timestep",
        conditions: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(network)
        self.time, self.conditions = time, dict(conditions or {})
        names = [time, *self.conditions.values()]
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise InputError(f"time and conditions are the network's own names, each once; got {names}")

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"network": self.network, "time": self.time, "conditions": self.conditions}

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's output for noisy images (B, C, …) at time steps (B,)."""
        named = {self.conditions.get(name, name): value for name, value in conditions.items()}
        return self.network(x_t, **{self.time: t}, **named)
