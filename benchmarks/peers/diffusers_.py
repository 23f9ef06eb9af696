"""Hugging Face diffusers: its pipelines, and the step of its unconditional training example."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "diffusers"


def load() -> None:
    """It is one of our own dependencies."""


def version() -> str:
    return diffusers.__version__


class _Unet(nn.Module):
    """A network with what pipelines ask of a UNet2DModel."""

    def __init__(self, network: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.network = network
        self.config = SimpleNamespace(sample_size=noise.shape[-1], in_channels=noise.shape[1])
        self.dtype, self.device = noise.dtype, noise.device

    def forward(self, sample: Tensor, timestep: Any) -> Any:
        return SimpleNamespace(sample=self.network(sample, timestep))


def samplers(network: nn.Module, noise: Tensor, steps: int) -> dict[str, Callable[[], Any]]:
    """Both pipelines, up to the tensor of images."""

    def pipeline(kind: Any, scheduler: Any) -> Callable[[], Any]:
        # a pipeline takes only classes of diffusers when it is made
        made = kind(diffusers.UNet2DModel(sample_size=8, block_out_channels=(32, 32, 32, 32)), scheduler)
        made.unet = _Unet(network, noise)
        made.set_progress_bar_config(disable=True)
        return lambda: made(batch_size=len(noise), num_inference_steps=steps, output_type="pt").images

    return {
        "DDIMPipeline": pipeline(DDIMPipeline, DDIMScheduler()),
        "DDPMPipeline": pipeline(DDPMPipeline, DDPMScheduler()),
    }


def trainers(network: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    """The step of examples/unconditional_image_generation, with --use_ema as its README calls it."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    ema = EMAModel(
        network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75,
    )  # fmt: skip
    ema.to(accelerator.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10_000)
    model, optimizer, rate = accelerator.prepare(network, optimizer, rate)

    def step() -> None:
        noise = torch.randn(images.shape, device=images.device)
        t = torch.randint(0, 1000, (len(images),), device=images.device).long()
        noisy = scheduler.add_noise(images, noise, t)  # type: ignore[arg-type]
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(noisy, t).float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        ema.step(model.parameters())
        loss.detach().item()

    return {"diffusers' example": step}
