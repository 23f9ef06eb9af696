"""What adapters of other calling conventions share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dualout.errors import InputError


class Adapter(nn.Module, ABC):
    """A network called in its own way, behind the call ``(x_t, t, **conditions)``.

    Args:
        network: a module, or any callable.
    """

    def __init__(self, network: nn.Module | Callable[..., Any]) -> None:
        super().__init__()
        if not callable(network):
            raise InputError(f"{type(self).__name__} adapts a network, a module or callable; got {network!r}")
        self.network = network

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Adapter:
        own = {name: self.get_buffer(name) for name in self._non_persistent_buffers_set}
        super()._apply(fn, recurse)
        # what the network is told of noise and time stays as precise as it is, whatever the network's precision
        for name, table in own.items():
            if not table.is_meta:
                self._buffers[name] = table.to(self.get_buffer(name).device)
        return self

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's output for noisy images (B, C, H, W) at time steps (B,)."""


class ConditionAdapter(Adapter, ABC):
    """An adapter that passes on some of the conditions in a way of its own.

    Args:
        network: the network.
        conditions: their names, in order.
    """

    def __init__(self, network: nn.Module | Callable[..., Any], conditions: Sequence[str] = ()) -> None:
        super().__init__(network)
        if isinstance(conditions, str) or not all(isinstance(name, str) and name for name in conditions):
            say = conditions if isinstance(conditions, str) and conditions else "class_labels"
            raise InputError(f"conditions is a list of names, say [{say!r}]; got {conditions!r}")
        self.conditions = list(conditions)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"network": self.network, "conditions": self.conditions}


def innermost(network: Any) -> Any:
    """The network itself, behind its adapters and torch.compile's wrapping."""
    while isinstance(network := getattr(network, "_orig_mod", network), Adapter):
        network = network.network
    return network


def config_of(network: Any) -> dict[str, Any]:
    """The constructor's arguments of the network itself, where it has them, as diffusers' models do."""
    return dict(getattr(innermost(network), "config", {}))
