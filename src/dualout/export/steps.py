"""What a scheduler of diffusers looks at, step by step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.prediction import Prediction
from dualout.samplers.diffusers import check_schedule
from dualout.schedules import Level, Schedule

_OWN = ("model_output", "timestep", "sample")


def check_scheduler(scheduler: Any, schedule: Schedule) -> None:
    """Refuse schedulers that the pipeline's loop cannot serve.

    Raises:
        InputError: for another noise schedule or prediction type, or a `step` that needs more than a prediction.
    """
    check_schedule(scheduler, schedule)
    name = type(scheduler).__name__
    needs = [
        p.name
        for p in inspect.signature(scheduler.step).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in _OWN
    ]
    if needs:
        raise InputError(f"{name} needs {', '.join(needs)} at each step, which this pipeline does not have")
    if scheduler.config.get("use_flow_sigmas"):
        raise InputError(
            f"{name} has use_flow_sigmas, another noise schedule than the one it was made with; switch it off"
        )


def first_noise(
    unet: Any,
    batch_size: int,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: Tensor | None,
    size: tuple[int | None, int | None],
    device: torch.device,
) -> Tensor:
    """Standard normal noise of the network's size, (B, C, H, W); float32, whatever its precision.

    Args:
        unet: the network.
        batch_size: B.
        generator: one for all images, or a list with one an image.
        latents: the noise itself, if it is given.
        size: height and width, where the network does not say.
        device: where it goes.

    Raises:
        InputError: for numbers that do not agree.
    """
    from diffusers.utils.torch_utils import randn_tensor

    channels, own = unet.config.in_channels, unet.config.sample_size
    if latents is not None:
        if batch_size not in (1, len(latents)) or latents.ndim != 4 or latents.shape[1] != channels:
            raise InputError(
                f"latents are (B, {channels}, H, W), with B the batch_size; got {tuple(latents.shape)} and batch_size "
                f"{batch_size}"
            )
        return latents.to(device, torch.float32)
    height, width = (g or o for g, o in zip(size, own if isinstance(own, list | tuple) else (own, own), strict=True))
    if height is None or width is None:
        raise InputError("the network does not say how large its images are: give height and width")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is a whole number, 1 or more; got {batch_size!r}")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise InputError(f"{len(generator)} generators for {batch_size} images: a list has one an image")
    return randn_tensor((batch_size, channels, height, width), generator=generator, device=device, dtype=torch.float32)


def set_times(scheduler: Any, steps: int, times: Sequence[int] | None, device: Any) -> None:
    """Make a scheduler ready for K steps, or for these time steps exactly.

    Raises:
        InputError: when it cannot take as many, or not these.
    """
    name = type(scheduler).__name__
    if not 1 <= steps <= scheduler.config.num_train_timesteps:
        raise InputError(
            f"num_inference_steps is a number from 1 to {scheduler.config.num_train_timesteps}, the length of the "
            f"schedule; got {steps}"
        )
    scheduler.set_timesteps(steps, device=device)
    if times is None or scheduler.timesteps.tolist() == list(times):
        return
    if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=list(times), device=device)
    if scheduler.timesteps.tolist() != list(times):
        raise InputError(
            f"the calibration is for the time steps {list(times)}, and {name} takes {scheduler.timesteps.tolist()}; "
            "take the scheduler of the sampler it was made for"
        )


def look(denoiser: Any, scheduler: Any, k: int, t: float, x_t: Tensor, **conditions: Any) -> Prediction:
    """What a denoiser makes of the images of a scheduler's k-th step, at its time step t.

    Where the scheduler is at one of the schedule's own levels, that is the denoiser's call. Some go between them, with
    a fractional time step and a noise level of their own; a plain denoiser can be read there, too.

    Raises:
        InputError: there, for a denoiser that is guided or calibrated.
    """
    sigma = _sigma(scheduler, k)
    if t == round(t):
        level = denoiser.schedule.scalars(round(t))
        # what float32 leaves of 1 + σ²
        if sigma is None or math.isclose(sigma**2, (level.sigma / level.alpha) ** 2, rel_tol=2e-3, abs_tol=5e-7):
            return denoiser(x_t, round(t), **conditions)
    if sigma is None or not isinstance(denoiser, Denoiser):
        raise InputError(
            f"{type(scheduler).__name__} looks at t = {t:g}, between the schedule's levels, where this pipeline can "
            'neither guide nor calibrate; take its timestep_spacing "trailing" or "leading", and none of its own sigmas'
        )
    alpha = (1 + sigma**2) ** -0.5
    level = Level(alpha, sigma * alpha)
    time = torch.full((len(x_t),), t, device=x_t.device)
    return denoiser.parameterization.read(denoiser.raw(x_t, time, level, **conditions), x_t, level)


def _sigma(scheduler: Any, k: int) -> float | None:
    """Noise over signal at the k-th step, of schedulers that count in it."""
    # those whose images are x0 + σ·eps divide by √(1 + σ²), between their second looks as well
    alpha = float(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), scheduler.timesteps[k]))
    if alpha != 1:
        return math.sqrt(alpha**-2 - 1)
    table = getattr(scheduler, "sigmas", None)
    return None if table is None else float(table[k])
