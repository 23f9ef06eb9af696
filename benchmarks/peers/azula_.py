"""azula: a denoiser around the network, its DDIM sampler, and the loop of its tutorials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from machine import installed
from torch import Tensor, nn

NAME = "azula"
_library: Any = None


def load() -> None:
    global _library
    import azula.denoise
    import azula.noise
    import azula.sample

    _library = azula


def version() -> str:
    return installed(NAME) or "?"


def _denoiser(network: nn.Module) -> Any:
    return _library.denoise.KarrasDenoiser(network, _library.noise.VPSchedule())


def samplers(network: nn.Module, noise: Tensor, steps: int) -> dict[str, Callable[[], Any]]:
    sampler = _library.sample.DDIMSampler(_denoiser(network), steps=steps, silent=True, device=noise.device)
    return {"azula": lambda: sampler(noise)}


def trainers(network: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    """The tutorials' loop: no clipping, no average."""
    denoiser = _denoiser(network)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)

    def step() -> None:
        loss = denoiser.loss(images, torch.rand((len(images),), device=images.device)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.detach()

    return {"azula": step}
