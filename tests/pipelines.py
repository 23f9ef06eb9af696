"""What tests of DualOutputPipeline share: small ones, and what they make of one noise."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import Tensor

import dualout
from dualout import Denoiser, Dual
from dualout.export import DualOutputPipeline
from dualout.schedules import Linear, Schedule

# diffusers' tables are float32, and K = 5 steps go through them
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
SHAPE = (1, 8, 8)


def unet(out: int, classes: int | None = None) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=out, block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=classes,
    ).eval()  # fmt: skip


def denoiser_of(parameterization: Any = None, schedule: Schedule | None = None, classes: int | None = None) -> Denoiser:
    parameterization = parameterization or Dual()
    return Denoiser(unet(parameterization.channels(1), classes), parameterization, schedule or Linear()).eval()


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipe(denoiser: Denoiser, *arguments: Any, **options: Any) -> DualOutputPipeline:
    return quiet(DualOutputPipeline.from_denoiser(denoiser, *arguments, **options))


def start(count: int = 3) -> Tensor:
    return dualout.noise(range(count), SHAPE)


def out(pipeline: Any, **options: Any) -> Tensor:
    if "latents" not in options and "generator" not in options:
        options["latents"] = start()
    return pipeline(**{"num_inference_steps": 5, "output_type": "latent", **options}).images
