"""What a scheduler of diffusers says of how its network was trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualout.errors import InputError, unknown
from dualout.parameterizations import CleanImage, Epsilon, Parameterization, Velocity
from dualout.schedules import Cosine, FromBetas, Linear, ScaledLinear, Schedule

_IN_PYTHON = (
    "In Python, dualout.training.upgrade.upgrade takes any denoiser: Denoiser(network, Flow(), RectifiedFlow()) for "
    "rectified flow, with Karras() and EDM() for EDM, and adapters of dualout.networks for what the network is told"
)
_DISTILLED = ("LCMScheduler", "TCDScheduler")
"""Of consistency models (arXiv 2310.04378, 2402.19159): the networks give ε of where their path ends, which at high
noise is an image, where least squares gives the mean of all."""


def trained_by(config: Mapping[str, Any]) -> tuple[Parameterization, Schedule]:
    """What a diffusers scheduler's configuration says of the training.

    Raises:
        InputError: for a prediction type or a noise schedule that is not known, a scheduler that counts its noise
            otherwise than by β, or one of distilled networks.
    """
    config = with_defaults(config)
    if (name := config.get("_class_name")) in _DISTILLED:
        raise InputError(
            f"{name} samples networks that were distilled into consistency models: these predict where a sampling path "
            "ends, and not the mean of the images that x_t may come from, to which least squares would blur them. "
            "Upgrade the network that was distilled; if this is none, put the scheduler of its training in this one's "
            "place, say pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)"
        )
    _check_betas(config)
    kinds = {"epsilon": Epsilon, "sample": CleanImage, "v_prediction": Velocity}
    prediction = config.get("prediction_type", "epsilon")
    if str(prediction) not in kinds:
        raise unknown("prediction_type of the scheduler", prediction, kinds)
    schedule = _schedule(config)
    if config.get("rescale_betas_zero_snr"):
        if prediction == "epsilon":
            raise InputError(
                "the scheduler has prediction_type 'epsilon' and rescale_betas_zero_snr: at its last time step x_t is "
                "noise alone, and ε says nothing of an image there. Networks of v_prediction and sample are read; "
                'where this one was trained without it, say "rescale_betas_zero_snr": false in scheduler_config.json'
            )
        schedule = _without_signal(schedule)
    return kinds[prediction](), schedule


def bounded_otherwise(config: Mapping[str, Any]) -> str | None:
    """What a scheduler of this configuration does to predicted clean images, where that is not done here, in words."""
    config = with_defaults(config)
    if config.get("thresholding"):
        ratio, most = config.get("dynamic_thresholding_ratio"), config.get("sample_max_value")
        return f"has thresholding (dynamic_thresholding_ratio {ratio}, sample_max_value {most})"
    if config.get("clip_sample") and config.get("clip_sample_range", 1.0) != 1.0:
        return f"clips x0 to ±{config['clip_sample_range']} (clip_sample_range)"
    return None


def _schedule(config: Mapping[str, Any]) -> Schedule:
    if config.get("trained_betas") is not None:
        return FromBetas(config["trained_betas"])
    steps: Any = config.get("num_train_timesteps", 1000)
    steps = int(steps) if isinstance(steps, float) and steps.is_integer() else steps
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 2e-2)
    known = {
        "linear": lambda: Linear(steps, start, end),
        "scaled_linear": lambda: ScaledLinear(steps, start, end),
        "squaredcos_cap_v2": lambda: Cosine(steps),
    }
    kind = config.get("beta_schedule", "linear")
    if str(kind) not in known:
        raise unknown("beta_schedule of the scheduler", kind, known)
    return known[kind]()


def _without_signal(schedule: Schedule) -> FromBetas:
    """The schedule stretched so that at its last step nothing is left of the image, and the first stays what it is.

    Lin et al. 2023, arXiv 2305.08891, algorithm 1.
    """
    first, last = schedule.levels.alpha[[0, -1]]
    return of_signal(((schedule.levels.alpha - last) * (first / (first - last))) ** 2)


def of_signal(signal: Tensor) -> FromBetas:
    """The schedule of a table of ᾱ, (T,), float64.

    A last ᾱ of 0 (zero terminal SNR) becomes 2⁻¹² of the one before: alpha is then some 1e-6, and can be divided by,
    and what is read as x0 or v is the same to 1e-4.
    """
    signal = torch.cat([signal[:-1], signal[-1:] if signal[-1] > 0 else signal[-2:-1] * 2.0**-12])
    return FromBetas(1 - signal / torch.cat([signal.new_ones(1), signal[:-1]]))


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of diffusers leaves out is as in its class, and not alike in all: older files hold less."""
    return {k: p.default for k, p in _arguments(config).items() if p.default is not p.empty} | dict(config)


def _arguments(config: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    """Those of its class; none where diffusers has no such class any more, or lacks what it needs."""
    import diffusers

    cls = getattr(diffusers, str(config.get("_class_name")), None)
    return inspect.signature(cls).parameters if isinstance(cls, type) and not hasattr(cls, "_backends") else {}


def _check_betas(config: Mapping[str, Any]) -> None:
    """Refuse schedulers of rectified flow, EDM, consistency models and the like, which say of ε and β nothing."""
    name, reason, known = config.get("_class_name", "the scheduler"), None, _arguments(config)
    # one that was made of another's configuration keeps what it does not use of that
    used = not known or "beta_schedule" in known
    if not used or (config.get("beta_schedule") is None and config.get("trained_betas") is None):
        reason = "has no beta_schedule: the network was trained with noise of another kind"
    elif config.get("timestep_type") == "continuous":
        reason = 'has timestep_type "continuous": the network is told ln(σ) / 4 instead of the time step'
    elif config.get("snr_shift_scale", 1) != 1:
        reason = "has snr_shift_scale, another noise schedule than that of its betas"
    elif config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        reason = "is of rectified flow (use_flow_sigmas, flow_prediction), whose noise is not that of its betas"
    if reason:
        raise InputError(f"{name} {reason}. {_IN_PYTHON}")
