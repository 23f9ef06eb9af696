"""What adapters of other calling conventions share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualout.errors import InputError
from dualout.schedules import Schedule


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

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's output for noisy images (B, C, H, W) at time steps (B,)."""


class LevelAdapter(Adapter, ABC):
    """An adapter that goes by the noise level, of which it has tables: one number for each t.

    Args:
        network: the network.
        schedule: the noise levels that t counts; the denoiser's.
    """

    def __init__(self, network: nn.Module | Callable[..., Any], schedule: Schedule | dict[str, Any]) -> None:
        super().__init__(network)
        self.schedule = schedule if isinstance(schedule, Schedule) else Schedule.from_config(schedule)
        self._tables: dict[str, Tensor] = {}

    def tabulate(self, name: str, table: Tensor) -> None:
        """Keep a table (T,) as a buffer of that name, float32 and where the network is."""
        self._tables[name] = table.float()
        place = next((p.device for p in self.parameters()), torch.get_default_device())
        self.register_buffer(name, self._tables[name].to(place), persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LevelAdapter:
        super()._apply(fn, recurse)
        # they stay as precise as they are, whatever the network's precision; and to_empty leaves them without values
        for name, table in self._tables.items():
            self._buffers[name] = table.to(self.get_buffer(name).device)
        return self


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
