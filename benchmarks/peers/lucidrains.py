"""denoising-diffusion-pytorch: GaussianDiffusion, and the step of its Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from machine import installed
from torch import Tensor, nn

NAME = "denoising-diffusion-pytorch"
_library: Any = None


def load() -> None:
    global _library
    import denoising_diffusion_pytorch.denoising_diffusion_pytorch as library

    # its progress bar cannot be switched off
    library.tqdm = lambda iterable, **_: iterable
    _library = library


def version() -> str:
    return installed(NAME) or "?"


class _Model(nn.Module):
    """A network with what GaussianDiffusion asks of its Unet."""

    self_condition = False

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network, self.channels, self.out_dim = network, channels, channels

    def forward(self, x: Tensor, t: Tensor, x_self_cond: None = None) -> Tensor:
        return self.network(x, t)


def _diffusion(network: nn.Module, images: Tensor, **options: Any) -> Any:
    return _library.GaussianDiffusion(
        _Model(network, images.shape[1]), image_size=images.shape[-1], objective="pred_noise", beta_schedule="linear",
        **options,
    ).to(images.device)  # fmt: skip


def samplers(network: nn.Module, noise: Tensor, steps: int) -> dict[str, Callable[[], Any]]:
    diffusion = _diffusion(network, noise, sampling_timesteps=steps)
    return {"denoising-diffusion-pytorch": lambda: diffusion.sample(len(noise))}


def trainers(network: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    """What Trainer.train does in a step; the Trainer itself wants a folder of images."""
    from accelerate import Accelerator
    from ema_pytorch import EMA

    accelerator = Accelerator()
    diffusion = _diffusion(network, images, auto_normalize=False)
    ema = EMA(diffusion, beta=0.995, update_every=10)
    model, optimizer = accelerator.prepare(
        diffusion, torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    )

    def step() -> None:
        with accelerator.autocast():
            loss = model(images)
            loss.item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return {"denoising-diffusion-pytorch": step}
