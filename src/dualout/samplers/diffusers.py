"""Any scheduler of diffusers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dualout.errors import InputError, unknown
from dualout.prediction import Prediction
from dualout.randomness import SeededDraw
from dualout.samplers.base import Sampler, Step
from dualout.samplers.ipndm import LEAST
from dualout.schedules import Schedule


class _Stage(NamedTuple):
    scheduler: Any
    t: Any
    scale: float
    """What the scheduler's images are multiplied with to be x_t; 1 unless they are x0 + (sigma/alpha)·eps."""
    scale_next: float
    arguments: frozenset[str]
    """Of the scheduler's `step`."""


@dataclass(frozen=True)
class FromDiffusers(Sampler):
    """A scheduler of diffusers as a sampler.

    A scheduler with a setting `clip_sample` clips by itself, as it is set, and one with dynamic `thresholding` too; for
    the others x0 is clipped before it is handed over, as eps, x0 or v, whichever its `prediction_type` asks for; with
    `variance_type="learned_range"`, a learned variance goes with it. Schedulers with two evaluations a step (Heun,
    KDPM2) or between the discrete time steps are refused. A scheduler's own behaviour is kept: DDIM's goes T // K on,
    wherever the next of its time steps is, and DDPM's, with a large variance, leaves noise in the images unless the
    last time step is 0.

    Attributes:
        scheduler: a scheduler, whose noise schedule must be the denoiser's; or the name of one of diffusers' classes,
            which is built with the denoiser's schedule and its own defaults. It is copied, never changed.
        spacing: None leaves the time steps to the scheduler. Anything else is given to it: as time steps where its
            class takes them, and else as its setting `timestep_spacing`, where that says the same.
    """

    name = "diffusers"
    plans_keep = False  # schedulers count their steps

    scheduler: Any = "DDIMScheduler"
    steps: int = field(default=20, kw_only=True)
    spacing: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.spacing is None:
            object.__setattr__(self, "spacing", _OwnTimes(self.scheduler))
        super().__post_init__()

    @property
    def stochastic(self) -> bool:
        """Whether steps may add fresh noise."""
        return True

    @property
    def reads_variance(self) -> bool:
        """Whether steps use the variance that a network learned."""
        return not isinstance(self.scheduler, str) and reads_variance(self.scheduler)

    def fields(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        own = isinstance(self.spacing, _OwnTimes)
        return super().fields() | ({"spacing": None} if own else {})

    def plan(self, schedule: Schedule, times: Sequence[int]) -> list[_Stage]:
        """One scheduler, made ready, and its time step at each step."""
        own = isinstance(self.spacing, _OwnTimes)
        scheduler = _ready(self.scheduler, schedule, self.steps, None if own else times, self.spacing)
        if isinstance(self.scheduler, str) and clips_itself(type(scheduler)):
            scheduler.register_to_config(**clip_settings(self.clip))
        rescaled = float(scheduler.init_noise_sigma) != 1
        scales = [schedule.scalars(t).alpha if rescaled else 1.0 for t in times]
        arguments = frozenset(inspect.signature(scheduler.step).parameters)
        return [
            _Stage(scheduler, t, scale, scale_next, arguments)
            for t, scale, scale_next in zip(scheduler.timesteps, scales, [*scales[1:], 1.0], strict=True)
        ]

    def advance(self, step: Step) -> Tensor:
        """The images after a step."""
        scheduler, t, scale, scale_next, arguments = step.plan
        x_t = step.prediction.x_t
        state = x_t if scale == 1 else x_t / scale
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(state, t)  # some count their steps here
        output = model_output(step.prediction, scheduler, self.clip)
        with _drawn(step, arguments) as noise:
            x_next = scheduler.step(output, t, state, **noise).prev_sample
        return x_next if scale_next == 1 else x_next * scale_next


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
NEARLY_ZERO = 2.0**-24
"""What some schedulers have in the place of a last ᾱ of 0 (rescale_betas_zero_snr), and read the network by."""
_NEVER_CLIP = ("TCDScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
"""Have the settings `clip_sample` or `thresholding`, and read neither."""
_SETTINGS = ("trailing", "leading", "linspace")
"""What `timestep_spacing` may be."""


def model_output(p: Prediction, scheduler: Any, clip: tuple[float, float] | None) -> Tensor:
    """A prediction as the `model_output` that a scheduler of diffusers steps from.

    Args:
        p: the prediction.
        scheduler: whose `prediction_type` says which output it takes.
        clip: the range of x0, for schedulers that have no setting `clip_sample` themselves, and no `thresholding`.

    Returns:
        eps, x0 or v, (B, C, H, W); (B, 2C, H, W) with the learned variance, where the scheduler uses it.

    Raises:
        InputError: for another prediction type, or where there is no learned variance.
    """
    if clip is not None and not clips_itself(type(scheduler)) and not _thresholds(scheduler):
        p = Prediction(p.x_t, p.level, p.x0.clamp(*clip), p.parts)
    match check_type(scheduler):
        case "epsilon":
            output = p.eps
        case "sample":
            output = p.x0
        case _:
            output = p.level.alpha * p.eps - p.level.sigma * p.x0
    if not reads_variance(scheduler):
        return output
    if "variance" not in p.parts:
        raise InputError(
            f"{type(scheduler).__name__} has variance_type 'learned_range', which needs a network that learned its "
            "variance (dualout.LearnedVariance), and this did not; take 'fixed_small' or 'fixed_large'"
        )
    return torch.cat([output, 2 * p.parts["variance"] - 1], 1)


@cache
def clips_itself(scheduler: type) -> bool:
    """Whether a class of schedulers goes by a setting `clip_sample`; from_config leaves others' in every config."""
    return "clip_sample" in inspect.signature(scheduler).parameters and scheduler.__name__ not in _NEVER_CLIP


def _thresholds(scheduler: Any) -> bool:
    """Whether a scheduler bounds each image by a quantile of its own, of which clipping would leave nothing."""
    unread = type(scheduler).__name__ in _NEVER_CLIP
    return bool(scheduler.config.get("thresholding")) and hasattr(scheduler, "_threshold_sample") and not unread


def clip_settings(clip: tuple[float, float] | None) -> dict[str, Any]:
    """The settings with which a scheduler of diffusers clips to a range by itself.

    Raises:
        InputError: for a range that is not symmetric about 0.
    """
    if clip is None:
        return {"clip_sample": False}
    low, high = clip
    if low != -high:
        raise InputError(f"diffusers' schedulers clip to a symmetric range, got clip={clip}")
    return {"clip_sample": True, "clip_sample_range": high}


def check_type(scheduler: Any) -> str:
    """The prediction type of a scheduler of diffusers.

    Raises:
        InputError: when it is not one of `PREDICTION_TYPES`.
    """
    kind = getattr(scheduler.config, "prediction_type", None)
    if kind not in PREDICTION_TYPES:
        raise InputError(
            f"{type(scheduler).__name__} has the prediction_type {kind!r}; a prediction can be given to schedulers as "
            "noise ('epsilon'), clean image ('sample') or velocity ('v_prediction')"
        )
    return kind


def reads_variance(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers uses a learned variance.

    Raises:
        InputError: when it wants the variance itself; networks here learn a place between β̃ and β.
    """
    kind = getattr(scheduler.config, "variance_type", None)
    if kind not in ("learned", "learned_range"):
        return False
    # some only cut it off
    uses = "predicted_variance" in inspect.signature(getattr(scheduler, "_get_variance", reads_variance)).parameters
    if uses and kind == "learned":
        raise InputError(
            f"{type(scheduler).__name__} has variance_type 'learned': networks here learn a place between the smallest "
            "and the largest variance, which is variance_type 'learned_range'"
        )
    return uses


@dataclass(frozen=True)
class _OwnTimes:
    """The time steps that a scheduler chooses by itself."""

    scheduler: Any

    def __call__(self, schedule: Schedule, steps: int) -> list[int]:
        scheduler = _ready(self.scheduler, schedule, steps, None)
        times = scheduler.timesteps.tolist()
        name = type(scheduler).__name__
        _check_count(name, times, steps)
        if any(abs(t - round(t)) > 1e-6 for t in times):
            raise InputError(
                f"{name} asks for time steps between the discrete ones, such as {times[1]}; set its timestep_spacing"
            )
        return [round(t) for t in times]


def _check_count(name: str, times: Sequence[Any], steps: int) -> None:
    if len(times) != steps:
        raise InputError(
            f"{name} looks {len(times)} times in {steps} steps; only those that look once a step can be used"
        )


def _ready(scheduler: Any, schedule: Schedule, steps: int, times: Sequence[int] | None, spacing: Any = None) -> Any:
    """A copy of the scheduler, or a new one of that name, with its time steps set."""
    named = isinstance(scheduler, str)
    scheduler = named_scheduler(scheduler, schedule) if named else check_schedule(copy.deepcopy(scheduler), schedule)
    name = type(scheduler).__name__
    takes = "timesteps" in inspect.signature(scheduler.set_timesteps).parameters
    if times is not None and not takes:
        if not (spacing in _SETTINGS and "timestep_spacing" in scheduler.config):
            raise InputError(f"{name} cannot be told its time steps, only a spacing: {', '.join(_SETTINGS)}")
        scheduler.register_to_config(timestep_spacing=spacing)
    try:
        if takes and times is not None:
            scheduler.set_timesteps(timesteps=list(times))
        else:
            scheduler.set_timesteps(steps)
    except ValueError as error:
        raise InputError(f"{name} cannot take these {steps} steps: {error}") from error
    if times is not None and (own := scheduler.timesteps.tolist()) != list(times):
        _check_count(name, own, steps)
        raise InputError(
            f"{name} cannot be told its time steps, and those of its own {spacing} spacing are others than "
            f"{list(times)}: {own}. Take another spacing" + (", say trailing" if spacing != "trailing" else "")
        )
    return scheduler


def named_scheduler(name: str, schedule: Schedule, **settings: Any) -> Any:
    """A scheduler of diffusers by its class name, for a schedule.

    Raises:
        InputError: when there is no such class, or it cannot follow the schedule.
    """
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    cls = getattr(diffusers, name, None)
    if needed := getattr(cls, "_backends", None):
        raise InputError(f"{name} of diffusers needs {' and '.join(needed)}, of which something is not installed")
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise unknown("scheduler of diffusers", name, [n for n in dir(diffusers) if n.endswith("Scheduler")])
    if "trained_betas" not in inspect.signature(cls).parameters:
        raise InputError(f"{name} takes no table of betas, so it cannot follow the denoiser's schedule")
    alpha = schedule.levels.alpha
    betas = 1 - (alpha / torch.cat([alpha.new_ones(1), alpha[:-1]])) ** 2
    settings |= {"num_train_timesteps": schedule.steps, "trained_betas": betas.tolist()}
    if alpha[-1] < LEAST:
        # of noise no image would follow there
        settings.setdefault("prediction_type", "v_prediction")
    try:
        scheduler = cls(**settings)
    except TypeError as error:
        raise InputError(f"{name} cannot follow the denoiser's schedule: {error}") from error
    return check_schedule(scheduler, schedule)


def check_schedule(scheduler: Any, schedule: Schedule) -> Any:
    """The scheduler itself.

    Raises:
        InputError: when its noise schedule is not the given one, or it counts time otherwise.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    name = type(scheduler).__name__
    if table is None or not hasattr(scheduler, "set_timesteps"):
        raise InputError(
            f"{name} is no scheduler with a table of alphas_cumprod, which is needed to check its schedule"
        )
    if scheduler.config.get("timestep_type") == "continuous":
        raise InputError(
            f'{name} has timestep_type "continuous", which tells networks ln(σ) / 4 in the place of the time step t: '
            'give it timestep_type="discrete"'
        )
    if scheduler.config.get("use_flow_sigmas"):
        raise InputError(f"{name} has use_flow_sigmas, another noise schedule than that of its table; switch it off")
    alpha, sigma = schedule.levels
    if not torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-6):
        raise InputError(
            f"diffusers' schedulers with a table of alphas_cumprod need alpha² + sigma² = 1, which the denoiser's "
            f"schedule ({schedule}) does not keep"
        )
    signal = table.cpu().double().clone()
    if signal[-1] == NEARLY_ZERO and float(scheduler.init_noise_sigma) == 1:
        signal[-1] = 0.0
    if len(signal) != schedule.steps or not torch.allclose(signal.sqrt(), alpha, atol=1e-4):
        raise InputError(
            f"{name} has another noise schedule than the denoiser ({schedule}); build it with trained_betas, or give "
            "its class name and it is built for you"
        )
    if check_type(scheduler) == "epsilon" and signal[-1] == table[-1] == 0:
        raise InputError(
            f"{name} has zero terminal SNR, and takes noise, of which no image follows at its last time step: make it "
            'with prediction_type="v_prediction", which any denoiser gives'
        )
    return scheduler


@contextmanager
def _drawn(step: Step, arguments: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Fresh noise the way this scheduler takes it."""
    if step.draw is None or not arguments & {"variance_noise", "generator"}:
        yield {}
    elif "variance_noise" in arguments:
        yield {"variance_noise": step.fresh()}
    elif isinstance(step.draw, SeededDraw):
        yield {"generator": [torch.Generator().manual_seed(int(seed)) for seed in step.draw.at(step.k)]}
    else:
        with _Given(step):
            yield {}


class _Given(TorchFunctionMode):
    """Where a scheduler draws by itself, torch.randn gives the step's fresh noise."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step, self.given = step, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A call of torch within the step."""
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        if self.given:
            raise InputError(
                "this scheduler draws more than once a step: give draw=dualout.SeededDraw(seeds, shape), whose "
                "generators it can go on with"
            )
        self.given = True
        return self.step.fresh().to((kwargs or {}).get("dtype"))
