"""A sampler's step as one compiled function: what the network said is read, blended and turned into the next images.

Its numbers are tensors, made once, so that all steps share a function that differ in nothing but numbers. Most samplers
have two to four kinds of step: the first ones remember less, and the last leads to no noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.levels import Level
from dualout.networks.backends.trajectory import FixedTrajectory
from dualout.prediction import Prediction
from dualout.randomness import Draw
from dualout.samplers import Sampler
from dualout.samplers.base import Step, begun, planned

TOLERANCE = 1e-5
"""How far images after a step may be from those of eager torch: the root mean square, of that of the images."""


class _Turn(NamedTuple):
    """A step, and what makes it."""

    time: Tensor
    """What the network is told, (B,)."""
    scalars: Level[float]
    level: Level[Tensor]
    plan: Any
    noisy: bool
    """Whether it adds fresh noise."""
    run: Callable[..., tuple[Tensor, ...]]
    """(raw, x_t, level, plan, fresh, *past) -> (x_next, *past)."""


class Fused(FixedTrajectory):
    """Makes images as a sampler does, with everything but the network compiled.

    Args:
        denoiser: neither guided nor calibrated.
        sampler: one whose plan is numbers, and that looks once a step.
        noise: an example, (B, C, H, W).
        conditions: that go with it.

    Raises:
        InputError: for another sampler, or when a step differs from eager torch's by more than `TOLERANCE`.
    """

    @torch.no_grad()
    def __init__(self, denoiser: Denoiser, sampler: Sampler, noise: Tensor, **conditions: Any) -> None:
        if not sampler.plans_keep or sampler.evaluations != sampler.steps:
            raise InputError(f"the sampler {sampler.spec} looks more than once a step, or has a state of its own")
        # imported with sympy, which takes as long as torch itself
        from torch._dynamo import config as dynamo

        schedule, read = denoiser.schedule, denoiser.parameterization.read
        times, plan = planned(sampler, schedule)
        super().__init__(noise)
        self.denoiser, self.first = denoiser, schedule.scalars(times[0])
        self.turns: list[_Turn] = []
        noise = noise.contiguous()
        functions: dict[Any, Any] = {}
        x, past = begun(noise, self.first), []
        rows = [torch.full((self.rows,), t, device=noise.device) for t in times]
        # the network is looked at once: what it says of other steps is as good an example
        raw = denoiser.raw(x, rows[0], self.first, **conditions)
        for k, t in enumerate(times):
            scalars, draw = schedule.scalars(t), _Draw(x)
            prediction = read(raw, x, scalars)
            if k == 0:
                sampler.warn_of(prediction)
            expected = sampler.advance(Step(k, plan[k], prediction, list(past), draw, _look))
            level, numbers = _tensors(scalars, x), _tensors(plan[k], x)
            given = (raw, x, level, numbers, draw.given, *past)
            form = _form(given)
            if form not in functions:
                # ahead of time: a call looks for no function that fits it, and never makes another; torch 2.11 does it
                # only when it is told to
                with dynamo.patch(enable_aot_compile=True):
                    function: Any = torch.compile(_turn(sampler, read), fullgraph=True, dynamic=False)
                    functions[form] = function.aot_compile((given, {}))
                # what would be looked at in every step is the same in all, and `sample` looks at it once
                functions[form].disable_guard_check()
            self.turns.append(_Turn(rows[k], scalars, level, numbers, draw.given is not None, functions[form]))
            x, *past = functions[form](*given)
            _compare(x, expected, sampler)

    def _batch(self, noise: Tensor, draw: Draw | None, conditions: dict[str, Any]) -> Tensor:
        x, past = begun(noise, self.first), []
        for k, turn in enumerate(self.turns):
            raw = self.denoiser.raw(x, turn.time, turn.scalars, **conditions)
            fresh = None
            if turn.noisy:
                fresh = torch.randn(x.shape, dtype=x.dtype, device=x.device) if draw is None else draw(k).to(x)
            x, *past = turn.run(raw, x, turn.level, turn.plan, fresh, *past)
        return x.to(noise.dtype)


def _turn(sampler: Sampler, read: Callable[[Tensor, Tensor, Level], Prediction]) -> Callable[..., tuple[Tensor, ...]]:
    def turn(raw: Tensor, x_t: Tensor, level: Level, plan: Any, fresh: Tensor | None, *past: Tensor):
        kept = list(past)
        x_next = sampler.advance(Step(0, plan, read(raw, x_t, level), kept, lambda k: fresh, _look))  # type: ignore[arg-type, return-value]
        return x_next, *kept

    return turn


def _compare(got: Tensor, expected: Tensor, sampler: Sampler) -> None:
    difference = float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-12))
    if not difference <= TOLERANCE:  # written so that NaN is refused, too
        raise InputError(f"compiled, a step of {sampler.spec} differs by {difference:.2g} of the images")


class _Draw:
    """An example of a step's fresh noise, given where it is asked for."""

    def __init__(self, x: Tensor) -> None:
        self.like, self.given = x, None

    def __call__(self, k: int) -> Tensor:
        self.given = torch.ones(self.like.shape, dtype=self.like.dtype, device=self.like.device)
        return self.given


def _look(x: Tensor, k: int) -> Prediction:
    raise InputError("a sampler that looks more than once a step is not compiled")


def _tensors(value: Any, like: Tensor) -> Any:
    """The numbers of a level or a plan as tensors without dimensions; 0 stays, and is not computed."""
    if isinstance(value, float):
        return torch.tensor(value, dtype=like.dtype, device=like.device) if value else 0.0
    if isinstance(value, Level):
        return value.map(lambda number: _tensors(number, like))
    if isinstance(value, tuple):
        made = [_tensors(v, like) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    return value


def _form(value: Any) -> Any:
    """What a function is made for: all but the values of tensors."""
    if isinstance(value, Tensor):
        return value.stride()
    return tuple(map(_form, value)) if isinstance(value, tuple | list) else ("is", value)
