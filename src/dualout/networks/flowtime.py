"""Networks of rectified flow, which are told where they are on the straight line between image and noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualout.denoiser import tensor_of
from dualout.errors import InputError
from dualout.networks.adapter import LevelAdapter
from dualout.schedules import Schedule


class FlowTime(LevelAdapter):
    """``network(x_t, scale · s)`` with x_t = (1 − s)·x0 + s·eps; it gives eps − x0, which `Flow` reads.

    Args:
        network: the network.
        schedule: the noise levels that t counts, with alpha + sigma = 1; the denoiser's.
        scale: what the network is told at pure noise: 1000 for Stable Diffusion 3 and Wan, 1 for Flux.
        backwards: the network's time runs from noise to image: it is told scale · (1 − s), and gives x0 − eps.
    """

    told: Tensor

    def __init__(
        self,
        network: nn.Module | Callable[..., Any],
        schedule: Schedule | dict[str, Any],
        scale: float = 1000.0,
        backwards: bool = False,
    ) -> None:
        super().__init__(network, schedule)
        self.scale, self.backwards = float(scale), backwards
        alpha, sigma = self.schedule.levels
        if not torch.allclose(alpha + sigma, torch.ones_like(alpha)):
            raise InputError(
                "a network of rectified flow has noise levels on the straight line between image and noise, alpha + "
                f"sigma = 1: say RectifiedFlow(shift=…); got {self.schedule.name}"
            )
        self.tabulate("told", self.scale * (alpha if backwards else sigma).float())

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        written = {"schedule": self.schedule.config(), "scale": self.scale, "backwards": self.backwards}
        return {"network": self.network} | written

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's output for noisy images (B, C, …) at time steps (B,)."""
        output = self.network(x_t, self.told[t], **conditions)
        if not self.backwards:
            return output
        flow, rest = tensor_of(output).tensor_split([x_t.shape[1]], 1)
        return torch.cat([-flow, rest], 1)
