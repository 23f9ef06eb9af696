"""Networks that shape their output by the channels of their input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dualout.errors import InputError
from dualout.networks.adapter import Adapter, innermost
from dualout.networks.tokens import check_patch, unpacked
from dualout.networks.trace import watching


class Unshaped(Adapter):
    """A network that makes images of its tokens by itself, of as many channels as x_t has: they are made here.

    Args:
        network: the network.
        layer: its last layer, by name, which gives tokens (B, L, channels·patch²); a channel's pixels are next to each
            other.
        patch: the height and width of a patch, in pixels (of latents).
    """

    def __init__(self, network: nn.Module | Callable[..., Any], layer: str, patch: int) -> None:
        super().__init__(network)
        check_patch(patch)
        self.layer, self.patch = layer, patch
        self._last()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"network": self.network, "layer": self.layer, "patch": self.patch}

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The network's output, (B, channels, …), for noisy images (B, C, H, W) or (B, C, F, H, W) at steps (B,)."""
        given: list[Tensor] = []

        def note(_: str, y: Tensor) -> Tensor:
            given.append(y)
            # as many as it counts on
            return y[..., : x_t.shape[1] * self.patch**2]

        with watching({self.layer: self._last()}, note):
            self.network(x_t, t, **conditions)
        if len(given) != 1:
            raise InputError(
                f"layer {self.layer!r} is called {len(given)} times where this network makes its output once"
            )
        return unpacked(given[0], self.patch, x_t)

    def _last(self) -> nn.Module:
        network = innermost(self)
        try:
            return network.get_submodule(self.layer)
        except AttributeError as error:
            raise InputError(f"this {type(network).__name__} has no layer {self.layer!r}") from error
