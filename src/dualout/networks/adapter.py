"""What adapters of other calling conventions share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
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

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's output for noisy images (B, C, H, W) at time steps (B,)."""


def innermost(network: Any) -> Any:
    """The network itself, behind its adapters."""
    while isinstance(network, Adapter):
        network = network.network
    return network


def tensor_of(output: Any) -> Tensor:
    """What a network gives, out of the object or tuple it comes in.

    Raises:
        InputError: when it gives something else than a tensor.
    """
    output = next(iter(output), None) if isinstance(output, tuple) else getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise InputError(
            f"a network returns a tensor, a tuple that begins with one, or has .sample; got {type(output)}"
        )
    return output
