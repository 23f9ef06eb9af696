"""Networks that take the noise level instead of the time step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dualout.levels import per_image
from dualout.networks.adapter import LevelAdapter
from dualout.schedules import Schedule


class SigmaConditioned(LevelAdapter):
    """``network(x, σ)`` with σ = sigma / alpha, the noise per signal.

    Args:
        network: the network.
        schedule: the noise levels that t counts; the denoiser's.
        log: the network takes c_noise = ln(σ) / 4 instead (EDM, Karras et al. 2022, arXiv 2206.00364, table 1).
        exploding: the network sees x_t / alpha = x0 + σ·eps, the noisy image of variance-exploding schedules, instead
            of x_t.
    """

    levels: Tensor
    signal: Tensor

    def __init__(
        self,
        network: nn.Module | Callable[..., Any],
        schedule: Schedule | dict[str, Any],
        log: bool = False,
        exploding: bool = False,
    ) -> None:
        super().__init__(network, schedule)
        self.log, self.exploding = log, exploding
        alpha, sigma = self.schedule.levels
        self.tabulate("levels", (sigma / alpha).log() / 4 if log else sigma / alpha)
        self.tabulate("signal", alpha)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        written = {"schedule": self.schedule.config(), "log": self.log, "exploding": self.exploding}
        return {"network": self.network} | written

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's output for noisy images (B, C, H, W) at time steps (B,)."""
        if self.exploding:
            x_t = x_t / per_image(self.signal[t].to(x_t.dtype), x_t)
        return self.network(x_t, self.levels[t], **conditions)
