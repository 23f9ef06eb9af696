"""The loop that all samplers share.

A sampler visits K noise levels in turn. Everything it needs to know about them is computed before the first step,
in float64, as plain numbers (`plan`); a step then is a few multiplications and additions of images (`advance`).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from dualout.errors import InputError, unknown
from dualout.levels import CLEAN, HALF, Level, Scalar, number
from dualout.prediction import Prediction
from dualout.randomness import Draw
from dualout.registry import Registered
from dualout.samplers.spacing import SPACINGS, Spacing, space
from dualout.schedules import Schedule, schedule_of


class Denoises(Protocol):
    """What a sampler asks of a denoiser, guided, calibrated or plain."""

    @property
    def schedule(self) -> Schedule:
        """The noise levels."""
        ...

    def __call__(self, x_t: Tensor, t: int | Tensor, **conditions: Any) -> Prediction:
        """Predict the clean images."""
        ...


class _Before(NamedTuple):
    k: int
    """Which step: 0 … K−1."""
    t: int
    """Its time step in the schedule."""
    x_t: Tensor
    """The noisy images before the step, (B, C, H, W)."""
    prediction: Prediction
    """The denoiser's prediction from them."""


class Moment(_Before):
    """One step of a trajectory: ``k, t, x_t, prediction = moment``, and the images after it, `x_next`."""

    x_next: Tensor
    """The images after the step; after the last one, the result."""

    def __new__(cls, k: int, t: int, x_t: Tensor, prediction: Prediction, x_next: Tensor) -> Self:
        """A moment of five entries, of which four are unpacked."""
        moment = super().__new__(cls, k, t, x_t, prediction)
        moment.x_next = x_next
        return moment

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What `copy` and `pickle` make it again of."""
        return (*self, self.x_next)


@dataclass(frozen=True)
class Sampler(Registered, ABC):
    """K steps from noise to images.

    Attributes:
        steps: K, from 1 to the schedule's T.
        spacing: which time steps are visited: a name in `dualout.samplers.SPACINGS`, a decreasing list of K time steps,
            or a function of the schedule and K that returns one.
        clip: the range that predicted clean images are clipped to, or None. They are clipped once, after any blending.
        order: the order of convergence, as K grows, to the solution of the sampler's equation.
    """

    kind: ClassVar[str] = "sampler"
    plans_keep: ClassVar[bool] = True
    """Whether a plan can be used again: it is numbers alone, and no object that a trajectory changes."""
    steps: int = 20
    _: KW_ONLY
    spacing: Spacing = "trailing"
    clip: tuple[float, float] | None = (-1.0, 1.0)
    order: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        for key in ("spacing", "clip"):
            value = getattr(self, key)
            if isinstance(value, _SEQUENCES):
                object.__setattr__(self, key, tuple(value if isinstance(value, list) else value.tolist()))
        self.check_types()
        if self.steps < 1:
            raise InputError(f"steps is a whole number, 1 or more; got {self.steps!r}")
        if isinstance(self.spacing, str) and self.spacing not in SPACINGS:
            raise unknown("spacing", self.spacing, SPACINGS)
        if self.clip is not None and not (len(self.clip) == 2 and self.clip[0] < self.clip[1]):
            raise InputError(f"clip is a pair (low, high) with low < high, or None; got {self.clip!r}")

    @property
    def stochastic(self) -> bool:
        """Whether steps add fresh noise."""
        return False

    @property
    def reads_variance(self) -> bool:
        """Whether steps use the variance that a network learned (`parameterizations.LearnedVariance`)."""
        return False

    @property
    def evaluations(self) -> int:
        """How many times the network is called (NFE)."""
        return len(self.looks(range(self.steps)))

    def looks(self, times: Sequence[int]) -> list[int]:
        """The time step of each call of the network, of K that are visited."""
        return list(times)

    def timesteps(self, schedule: Schedule) -> list[int]:
        """The K time steps that are visited, decreasing."""
        return space(self.spacing, schedule, self.steps)

    def at(self, times: Sequence[int]) -> Self:
        """The same sampler at these time steps, K of them, decreasing."""
        return replace(self, spacing=tuple(times))

    @abstractmethod
    def plan(self, schedule: Schedule, times: Sequence[int]) -> Sequence[Any]:
        """What each of the K steps needs to know about the levels it goes between, computed once."""

    @abstractmethod
    def advance(self, step: Step) -> Tensor:
        """The images after a step."""

    @torch.no_grad()
    def sample(self, denoiser: Denoises, noise: Tensor, draw: Draw | None = None, **conditions: Any) -> Tensor:
        """Make images.

        Args:
            denoiser: the model, plain, guided or calibrated.
            noise: standard normal, (B, C, H, W); `dualout.noise` makes it, one seed an image. It is multiplied by
                √(alpha² + sigma²) of the first level, so that images x_t to begin with are given divided by that; it
                is 1 but for flow and EDM.
            draw: gives the fresh noise of step k, for stochastic samplers; `dualout.SeededDraw` makes it one seed an
                image. None draws from torch's global generator.
            conditions: passed on to the network.

        Returns:
            images (B, C, H, W), in the dtype of `noise`.

        Raises:
            InputError: when K exceeds the schedule's T, or for what is no denoiser.
        """
        x = noise
        # nothing holds a moment while the next is made: its memory, still in the cache, serves again
        for x in map(attrgetter("x_next"), self._moments(denoiser, noise, draw, conditions)):  # noqa: B007
            pass
        return x.to(noise.dtype)

    def trajectory(
        self,
        denoiser: Denoises,
        noise: Tensor,
        draw: Draw | None = None,
        *,
        differentiable: bool = False,
        **conditions: Any,
    ) -> Generator[Moment, None, None]:
        """The K steps, one at a time.

        Arguments are those of `sample`; `differentiable` keeps the graph of gradients through all steps.
        """
        moments = self._moments(denoiser, noise, draw, conditions)
        return each_within(lambda: nullcontext() if differentiable else torch.no_grad(), moments)

    def _moments(
        self, denoiser: Denoises, noise: Tensor, draw: Draw | None, conditions: dict[str, Any]
    ) -> Generator[Moment, None, None]:
        """The K steps, with gradients as they are around each."""
        schedule = schedule_of(denoiser, "a sampler asks")
        if not (draw is None or callable(draw)):
            raise InputError(
                f"draw is a function of the step k, say dualout.SeededDraw(seeds, shape); got {type(draw).__name__}"
            )
        times, plan = planned(self, schedule)
        x = begun(noise, schedule.scalars(times[0]))
        past: list[Tensor] = []

        def look(x: Tensor, k: int) -> Prediction:
            return denoiser(x, times[k], **conditions)

        for k, t in enumerate(times):
            prediction = denoiser(x, t, **conditions)
            if k == 0:
                self.warn_of(prediction)
            x_next = self.advance(Step(k, plan[k], prediction, past, draw, look))
            yield Moment(k, t, x, prediction, x_next)
            x = x_next
            del prediction, x_next

    def warn_of(self, prediction: Prediction) -> None:
        """Say what of a trajectory's first prediction is left unread."""
        if "variance" in prediction.parts and not self.reads_variance:
            warnings.warn(_IGNORED.format(self.spec), stacklevel=4)

    def clipped(self, x0: Tensor) -> Tensor:
        """Predicted clean images, clipped to the range."""
        return x0 if self.clip is None else x0.clamp(*self.clip)

    def scaled(self, factor: Scalar, x0: Tensor) -> Tensor:
        """factor · clip(x0), in a tensor that may be added to."""
        scale = number(factor, x0)
        return x0 * scale if self.clip is None else x0.clamp(*self.clip).mul_(scale)


def each_within(
    context: Callable[[], AbstractContextManager[Any]], moments: Iterator[Moment]
) -> Generator[Moment, None, None]:
    """Moments, each made within a context that what is done between two is not in."""
    while True:
        with context():
            moment = next(moments, None)
        if moment is None:
            return
        yield moment
        # its memory serves again for the next
        del moment


def planned(sampler: Sampler, schedule: Schedule) -> tuple[list[int], Sequence[Any]]:
    """The time steps and the plan, from a cache where `plans_keep`."""
    try:
        return (_plan_kept if sampler.plans_keep else _plan)(sampler, schedule)
    except TypeError:  # cannot be hashed: a spacing that is an array
        return _plan(sampler, schedule)


def _plan(sampler: Sampler, schedule: Schedule) -> tuple[list[int], Sequence[Any]]:
    times = sampler.timesteps(schedule)
    plan = sampler.plan(schedule, times)
    if not isinstance(plan, Sequence) or len(plan) != len(times):
        got = len(plan) if isinstance(plan, Sequence) else type(plan).__name__
        raise InputError(
            f"plan() of sampler {sampler.name!r} gives a list, an entry for each of {len(times)} steps; got {got}"
        )
    return times, plan


_plan_kept = lru_cache(maxsize=32)(_plan)


_SEQUENCES = (list, np.ndarray, Tensor)
_IGNORED = (
    "this network learned a variance, which the sampler {} does not use; DDPM with variance=learned does "
    "(ddpm:variance=learned)"
)


class Step(NamedTuple):
    """What one step is given."""

    k: int
    plan: Any
    """This step's entry of `Sampler.plan`."""
    prediction: Prediction
    past: list[Tensor]
    """What the sampler keeps from earlier steps of this trajectory, latest first; empty at first."""
    draw: Draw | None
    look: Callable[[Tensor, int], Prediction]
    """The denoiser at the k-th level, for samplers that look more than once a step."""

    def fresh(self) -> Tensor:
        """This step's fresh noise, (B, C, H, W).

        Raises:
            InputError: when what was drawn is not one noise an image.
        """
        x = self.prediction.x_t
        if self.draw is None:
            return torch.randn_like(x)
        drawn = self.draw(self.k)
        # shapes take longer to compare than numbers of pixels, and a wrong one shows at the first step
        if not isinstance(drawn, Tensor) or drawn.numel() != x.numel() or (self.k == 0 and drawn.shape != x.shape):
            got = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
            raise InputError(f"draw(k) gives noise for each image, {tuple(x.shape)}; got {got}")
        return drawn


def visited(schedule: Schedule, times: Sequence[int]) -> list[Level[float]]:
    """The K levels of a trajectory and, after them, the clean one."""
    return [*(schedule.scalars(t) for t in times), CLEAN]


def begun(noise: Tensor, level: Level[float]) -> Tensor:
    """x_T ~ N(0, alpha² + sigma²): what images of unit variance look like at the first level."""
    if not isinstance(noise, Tensor):
        raise InputError(f"noise is a tensor (B, C, H, W), say dualout.noise(range(4), (3, 32, 32)); got {noise!r}")
    x = noise.float() if noise.dtype in HALF else noise
    power = level.alpha**2 + level.sigma**2
    return x if abs(power - 1) < 1e-9 else x * power**0.5


def combine(*terms: tuple[Scalar, Tensor]) -> Tensor:
    """The sum of coefficient · tensor, without a temporary for each; a coefficient of 0 is not computed."""
    for i, (coefficient, x) in enumerate(terms):
        if not isinstance(coefficient, float) or coefficient != 0:
            return add(x * number(coefficient, x), *terms[i + 1 :])
    return torch.zeros_like(terms[0][1])


def add(total: Tensor, *terms: tuple[Scalar, Tensor]) -> Tensor:
    """`total`, with coefficient · tensor added in place."""
    for coefficient, x in terms:
        if not isinstance(coefficient, float):  # a tensor, of a step that is compiled
            total = total + coefficient * x
        elif coefficient != 0:
            total.add_(x, alpha=coefficient)
    return total


def remember(past: list[Tensor], latest: Tensor, most: int) -> None:
    """Put the latest first and forget what is older than `most`."""
    past.insert(0, latest)
    del past[most:]
