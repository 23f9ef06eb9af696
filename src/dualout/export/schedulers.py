"""Samplers and schedules in diffusers' words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dualout.errors import InputError
from dualout.networks.trained import of_signal
from dualout.parameterizations import CleanImage, Epsilon, Parameterization, Velocity
from dualout.parameterizations.learned_variance import base_of
from dualout.samplers import DDIM, DDPM, DPMSolver, Sampler, UniPC
from dualout.samplers.diffusers import NEARLY_ZERO, check_schedule, clip_settings, named_scheduler
from dualout.schedules import Cosine, Linear, ScaledLinear, Schedule

SPACINGS = ("leading", "trailing", "linspace")


def scheduler_for(sampler: Sampler, schedule: Schedule, parameterization: Parameterization) -> Any:
    """The scheduler of diffusers that does what a sampler does.

    By itself it visits the sampler's time steps with trailing spacing, DDIM and DDPM also with leading at a K that
    divides T; elsewhere diffusers has others, and `DualOutputPipeline` tells it the sampler's. DDIM's eta is an
    argument of the pipeline's call.

    Args:
        sampler: DDIM, DDPM, DPMSolver or UniPC.
        schedule: the noise levels.
        parameterization: whose own kind of output, where it has one, is what the scheduler asks for, so that diffusers'
            own pipelines can use a network with that output alone; clean images else.

    Raises:
        InputError: for another sampler or spacing, or a schedule that diffusers does not have.
    """
    if sampler.spacing not in SPACINGS:
        raise InputError(
            f"diffusers' schedulers have the spacings {', '.join(SPACINGS)}; the sampler {sampler.spec} has another"
        )
    name, settings = _class_and_settings(sampler)
    settings |= {"timestep_spacing": sampler.spacing, "prediction_type": prediction_type_of(parameterization)}
    return build(name, schedule, **settings)


def _class_and_settings(sampler: Sampler) -> tuple[str, dict[str, Any]]:
    match sampler:
        case DDIM():
            return "DDIMScheduler", clip_settings(sampler.clip)
        case DDPM(variance=variance):
            kinds = {"large": "fixed_large", "small": "fixed_small", "learned": "learned_range"}
            return "DDPMScheduler", {"variance_type": kinds[variance]} | clip_settings(sampler.clip)
        case DPMSolver(order=order, eta=0, reach=None):
            # their third order is the published one, whatever `published` says
            return "DPMSolverMultistepScheduler", {"solver_order": order, "final_sigmas_type": "zero"}
        case DPMSolver(order=1 | 2 as order, eta=1, reach=None):
            # their third order with noise does not converge: the coefficient of the second difference has a wrong sign
            settings = {"solver_order": order, "final_sigmas_type": "zero", "algorithm_type": "sde-dpmsolver++"}
            return "DPMSolverMultistepScheduler", settings
        case UniPC(order=order):
            return "UniPCMultistepScheduler", {"solver_order": order, "final_sigmas_type": "zero"}
    raise InputError(
        f"the sampler {sampler.spec} has no counterpart among diffusers' schedulers; ddim, ddpm, unipc and "
        "dpmsolver do, the last without reach, and with eta 0, or 1 with order 1 or 2"
    )


def prediction_type_of(parameterization: Parameterization) -> str:
    """The prediction type that a parameterization's network has by itself; clean images where it has none."""
    kinds = {Epsilon: "epsilon", CleanImage: "sample", Velocity: "v_prediction"}
    return kinds.get(type(base_of(parameterization)), "sample")


def build(name: str, schedule: Schedule, **settings: Any) -> Any:
    """A scheduler by its class name, with a schedule in diffusers' own words where it has them, else as a table.

    Raises:
        InputError: when there is no such class, or it cannot follow the schedule.
    """
    match schedule:
        case Linear(beta_start=start, beta_end=end):
            words = {"beta_schedule": "linear", "beta_start": start, "beta_end": end}
        case ScaledLinear(beta_start=start, beta_end=end):
            words = {"beta_schedule": "scaled_linear", "beta_start": start, "beta_end": end}
        case Cosine(offset=0.008, beta_max=0.999):
            words = {"beta_schedule": "squaredcos_cap_v2"}
        case _:
            return named_scheduler(name, schedule, **settings)
    # the class is looked up, and the schedule checked, where the table is made
    cls = type(named_scheduler(name, schedule))
    return check_schedule(cls(num_train_timesteps=schedule.steps, **words, **settings), schedule)


def schedule_of(scheduler: Any) -> Schedule:
    """The noise schedule that a scheduler of diffusers was made with.

    Raises:
        InputError: when it has no table of it.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise InputError(
            f"{type(scheduler).__name__} has no table of alphas_cumprod to read a schedule from; give schedule="
        )
    config = scheduler.config
    words = {k: config[k] for k in ("beta_start", "beta_end") if k in config}
    kinds = {"linear": Linear, "scaled_linear": ScaledLinear}
    if config.get("trained_betas") is None and config.get("beta_schedule") in kinds:
        known = kinds[config["beta_schedule"]](config["num_train_timesteps"], **words)
        if _same(known, table):
            return known
    if _same(cosine := Cosine(len(table)), table):
        return cosine
    signal = table.double()
    if signal[-1] == NEARLY_ZERO:
        # it may be larger than the one before
        signal = torch.cat([signal[:-1], signal.new_zeros(1)])
    return of_signal(signal)


def _same(schedule: Schedule, table: Sequence[float]) -> bool:
    signal = torch.as_tensor(table).double()
    return schedule.steps == len(signal) and torch.allclose(schedule.levels.alpha**2, signal, rtol=1e-4, atol=1e-9)
