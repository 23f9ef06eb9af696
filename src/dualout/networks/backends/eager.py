"""torch, operation by operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from dualout.networks.backends.base import Backend, Call
from dualout.networks.precision import Precision


@dataclass(frozen=True)
class Eager(Backend):
    """The network as it is."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps", "xpu")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")

    def prepare(self, network: nn.Module, call: Call, precision: Precision) -> nn.Module:
        """The same network."""
        return network
