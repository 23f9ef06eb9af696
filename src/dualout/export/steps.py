"""What a scheduler of diffusers looks at, step by step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.levels import Level
from dualout.prediction import Prediction
from dualout.samplers.diffusers import check_schedule
from dualout.samplers.spacing import space
from dualout.schedules import Schedule

_OWN = ("model_output", "timestep", "sample")
_OWN_SIGMAS = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas"
)  # fmt: skip
"""Options with which a scheduler puts its time steps at places of its own."""
_COUNTERPARTS = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""Schedulers that have a sampler of this package beside them."""
_NO_IMAGES = ("1D", "3D", "Motion", "Temporal", "Video")
"""What is in the names of diffusers' networks of signals and videos."""
_STRIDES = ("DDIMScheduler", "DDIMParallelScheduler")
"""Schedulers whose step goes T // K on."""
_ANCESTRAL = ("DDPMScheduler", "DDPMParallelScheduler")
"""Schedulers that add noise to the last step, where that does not begin at t = 0."""
_TABLES = ("UniPCMultistepScheduler", "DEISMultistepScheduler")
"""Schedulers that have a table of noise levels beside the time steps, and take neither."""


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
        if batch_size not in (1, len(latents)) or latents.ndim < 3 or latents.shape[1] != channels:
            raise InputError(
                f"latents are (B, {channels}, H, W), of signals (B, {channels}, L) and of videos (B, {channels}, F, H, "
                f"W), with B the batch_size; got {tuple(latents.shape)} and batch_size {batch_size}"
            )
        return latents.to(device, torch.float32)
    if any(part in type(unet).__name__ for part in _NO_IMAGES):
        raise InputError(f"a {type(unet).__name__} makes no images: give latents, the first noise, in its shape")
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

    Schedulers that take no time steps have them put where their own would be, and the noise levels of their table with
    them (`stepped` leads DDIM's from one to the next).

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
    own = any(scheduler.config.get(key) for key in _OWN_SIGMAS)
    if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters and not own:
        scheduler.set_timesteps(timesteps=list(times), device=device)
    elif name in _STRIDES + _TABLES and not own:
        scheduler.timesteps = torch.tensor(list(times), device=scheduler.timesteps.device)
        if name in _TABLES:
            signal = scheduler.alphas_cumprod[list(times)]
            scheduler.sigmas[:-1] = ((1 - signal) / signal).sqrt()
    if scheduler.timesteps.tolist() != list(times):
        raise InputError(
            f"these are to be the time steps {list(times)}, and {name} takes {scheduler.timesteps.tolist()}; take the "
            "scheduler of the sampler that the pipeline or its calibration was made for"
        )


def times_of(scheduler: Any, schedule: Schedule, steps: int, spacing: str | None) -> list[int] | None:
    """The time steps that a sampler of this spacing visits, for its counterpart among diffusers' schedulers.

    None where the scheduler has been told another spacing since, or is of another kind: then they are its own.
    """
    config = scheduler.config
    own = config.get("steps_offset") or any(config.get(key) for key in _OWN_SIGMAS)
    if type(scheduler).__name__ not in _COUNTERPARTS or config.get("timestep_spacing") != spacing or own:
        return None
    return space(spacing, schedule, steps) if spacing and 1 <= steps <= schedule.steps else None


def stepped(scheduler: Any, output: Tensor, k: int, times: Sequence[int], x: Tensor, **extra: Any) -> Tensor:
    """The images after a scheduler's k-th step.

    Args:
        scheduler: whose step it is.
        output: the prediction as it takes it (`samplers.diffusers.model_output`).
        k: which step.
        times: all of its time steps.
        x: the scheduler's images before, (B, C, H, W).
        extra: other arguments of its `step`.

    Raises:
        InputError: for a scheduler that does not take its own prediction type.
    """
    try:
        with _next(scheduler, k, times):
            made = scheduler.step(output, scheduler.timesteps[k], x, **extra)
    except (ValueError, NotImplementedError) as error:
        if "prediction_type" not in str(error):
            raise
        name, kind = type(scheduler).__name__, scheduler.config.prediction_type
        raise InputError(
            f"{name} takes no prediction_type {kind!r}, which it has from the scheduler before it; the same prediction "
            f"as noise: {name}.from_config(pipeline.scheduler.config, prediction_type='epsilon')"
        ) from error
    # the mean of the last step is the clean image; DDPM's adds noise to it where it does not begin at t = 0
    ancestral = type(scheduler).__name__ in _ANCESTRAL and k + 1 == len(times)
    return made.pred_original_sample if ancestral else made.prev_sample


@contextmanager
def _next(scheduler: Any, k: int, times: Sequence[int]) -> Iterator[None]:
    """Within, the step of a scheduler of DDIM's kind goes from its k-th time step to the next that is looked at.

    T // K on is elsewhere, unless K divides T and the spacing is even from there on: images would be taken to one noise
    level and read as if at another. A step that would pass t = 0 goes to `final_alpha_cumprod`; in a single step of
    T all do, and it is the level wanted.
    """
    if type(scheduler).__name__ not in _STRIDES:
        yield
        return
    kept = scheduler.num_inference_steps, scheduler.final_alpha_cumprod
    scheduler.num_inference_steps = 1
    if k + 1 < len(times):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[times[k + 1]]
    try:
        yield
    finally:
        scheduler.num_inference_steps, scheduler.final_alpha_cumprod = kept


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
