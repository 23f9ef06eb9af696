"""The interface of every network that has a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from dualout.registry import Registered

Size = tuple[int, int]
"""Height and width, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Backbone(Registered, ABC):
    """An architecture, up to the images it is for."""

    kind: ClassVar[str] = "network"

    @abstractmethod
    def description(self, image_channels: int, size: Size, out_channels: int, classes: int | None) -> dict[str, Any]:
        """The network's class and its constructor's arguments, JSON values: ``{"class": …, "arguments": {…}}``.

        The class is one that checkpoints may name: of diffusers ("diffusers.UNet2DModel") or of `dualout.networks`.

        Args:
            image_channels: C, of the noisy images that go in.
            size: their height and width.
            out_channels: what comes out; `Parameterization.channels(C)`.
            classes: how many classes the network is told, or None. One index more, the last, stands for "no class".

        Raises:
            InputError: when images of this size do not fit.
        """
