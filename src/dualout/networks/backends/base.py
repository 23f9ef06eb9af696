"""What backends share: the check whether they can be used, and a batch of one size."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dualout.denoiser import tensor_of
from dualout.errors import InputError
from dualout.networks.precision import Precision
from dualout.registry import Registered
from dualout.samplers import Sampler
from dualout.samplers.base import Denoises


class Call(NamedTuple):
    """What a network is called with."""

    x: Tensor
    """Noisy images as the network takes them, (B, C, H, W)."""
    t: Tensor
    """Their time steps, (B,)."""
    conditions: dict[str, Tensor]
    """By name, each (B, …)."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All, in the order that `Plain` takes them."""
        return (self.x, self.t, *self.conditions.values())


@dataclass(frozen=True)
class Backend(Registered, ABC):
    """A way to compute a network without its gradient.

    Adding one is one class in one file of this package: the command line, `auto` and the tests then know it.
    """

    kind: ClassVar[str] = "backend"
    packages: ClassVar[tuple[str, ...]] = ()
    """What has to be installed, by the extra of the backend's own name."""
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """The kinds of device that it computes on."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    """The number formats that it computes in."""
    seconds: ClassVar[float] = 0.0
    """What preparing a network takes, roughly; `auto` does not begin what could not be repaid."""

    def check(self, precision: Precision) -> None:
        """Refuse what cannot be computed here.

        Raises:
            InputError: when a package is missing, or for a device or number format that is not the backend's.
        """
        device = precision.device.type
        if missing := [name for name in self.packages if find_spec(name) is None]:
            raise InputError(
                f"--backend {self.name} needs {' and '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} not installed: pip install 'dualout[{self.name}]'"
            )
        if device not in self.devices:
            raise InputError(
                f"--backend {self.name} computes on {' and '.join(self.devices)}, not on {device}: take --device "
                f"{self.devices[0]} or --backend eager"
            )
        if precision.name not in self.precisions:
            raise InputError(
                f"--backend {self.name} computes in {' and '.join(self.precisions)}, not in {precision.name}: take "
                f"--precision {self.precisions[0]} or --backend eager"
            )

    @abstractmethod
    def prepare(self, network: nn.Module, call: Call, precision: Precision) -> nn.Module:
        """The network as this backend computes it: called as the network is, (x_t, t, **conditions) -> tensor.

        Args:
            network: is not changed.
            call: the shapes that it will be called with.
            precision: of its products and convolutions; eager's autocast of that format is around every call.

        Raises:
            InputError: when the network cannot be translated.
        """

    def fuse(
        self, denoiser: Denoises, sampler: Sampler, noise: Tensor, conditions: dict[str, Any], steps: int
    ) -> Callable[..., Tensor] | None:
        """All of the sampler's steps but the network as functions of the backend: called as ``Sampler.sample`` is,
        (noise, draw, **conditions) -> images; None where it has none, or so few steps do not repay it.

        Args:
            denoiser: plain, guided or calibrated, of the network that was prepared.
            sampler: whose steps they are.
            noise: an example of what it will be called with, (B, C, H, W).
            conditions: that go with it.
            steps: how many, of such batches, are to come.

        Raises:
            InputError: when the steps cannot be translated.
        """
        return None


class Plain(nn.Module):
    """A network with all arguments by place, and a tensor as its result: what compilers and exporters take.

    Args:
        network: what is called.
        names: of the conditions, in order.
        single: float32 throughout, also where the weights were saved in half precision.
    """

    def __init__(self, network: nn.Module, names: tuple[str, ...], single: bool = False) -> None:
        super().__init__()
        half = any(p.is_floating_point() and p.dtype != torch.float32 for p in network.parameters())
        self.network = copy.deepcopy(network).float() if single and half else network
        self.names = names

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """The network's output."""
        return tensor_of(self.network(x, t, **dict(zip(self.names, conditions, strict=True))))


Piece = Callable[[Tensor], Tensor]
"""From a tensor with a row for each of a batch's to those of one piece."""


def in_pieces(compute: Callable[[Piece], Tensor], rows: int, count: int) -> Tensor:
    """A batch of any size by what was made for one size: nothing is translated anew, and a row is computed by the same
    code in every batch.

    Args:
        compute: makes the output of one piece, (rows, …), from what its argument cuts out of the batch's tensors; the
            last piece is filled up with copies of the last row.
        rows: that size.
        count: of the batch.

    Returns:
        the output, (count, …).
    """
    if count == rows:
        return compute(lambda whole: whole)
    made = [compute(partial(_piece, start, rows)) for start in range(0, count, rows)]
    return torch.cat(made)[:count]


def _piece(start: int, rows: int, of: Tensor) -> Tensor:
    own = of[start : start + rows]
    missing = rows - len(own)
    return own if missing == 0 else torch.cat([own, own[-1:].expand(missing, *own.shape[1:])])


class FixedBatch(nn.Module):
    """Computes batches of any size by a function that was made for one size.

    Args:
        run: tensors of `call`'s shapes -> the output, (B, …).
        call: whose batch size it is.
    """

    def __init__(self, run: Callable[..., Tensor], call: Call) -> None:
        super().__init__()
        self.run, self.rows, self.names = run, len(call.x), tuple(call.conditions)

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The network's output for noisy images (B, C, H, W) at time steps (B,)."""
        if tuple(conditions) != self.names:
            raise InputError(f"the network was prepared for the conditions {self.names}; got {tuple(conditions)}")
        tensors = (x_t, t, *conditions.values())
        return in_pieces(lambda piece: self.run(*map(piece, tensors)), self.rows, len(x_t))
