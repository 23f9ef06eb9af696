"""k-diffusion: its wrapper of eps-networks over discrete steps, Euler's sampler (which is DDIM), its training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from machine import installed
from torch import Tensor, nn

from dualout.schedules import Linear

NAME = "k-diffusion"
_library: Any = None


def load() -> None:
    global _library
    import k_diffusion

    _library = k_diffusion


def version() -> str:
    return installed(NAME) or "?"


def _wrapped(network: nn.Module) -> Any:
    signal = Linear().level(torch.arange(1000)).alpha.float() ** 2
    return _library.external.DiscreteEpsDDPMDenoiser(network, signal, quantize=True)


def samplers(network: nn.Module, noise: Tensor, steps: int) -> dict[str, Callable[[], Any]]:
    model = _wrapped(network).to(noise.device)
    sigmas = model.get_sigmas(steps)
    return {"k-diffusion": lambda: _library.sampling.sample_euler(model, noise * sigmas[0], sigmas, disable=True)}


def trainers(network: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    """train.py's step: AdamW, no clipping, the average by its own function."""
    model = _wrapped(network).to(images.device)
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), eps=1e-6, weight_decay=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        sigma = model.t_to_sigma(torch.randint(0, 1000, (len(images),), device=images.device))
        loss = model.loss(images, torch.randn_like(images), sigma).mean()
        loss.backward()
        optimizer.step()
        _library.utils.ema_update(model, averaged, 0.9999)
        loss.item()

    return {"k-diffusion": step}
