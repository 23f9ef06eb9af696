"""Every concrete class, found through `kinds()`, in every variant that its fields allow.

A class that is added to the package is in here without an edit. Options whose values cannot be found out from the
class are listed by the name of the field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from dualout.errors import InputError
from dualout.parameterizations import CleanImage, Dual, Epsilon, Flow, Karras, Parameterization, Velocity
from dualout.parameterizations.dual import GATES, RATIOS
from dualout.samplers import Sampler
from dualout.samplers.ddpm import VARIANCES
from dualout.schedules import Cosine, Linear, Schedule

CHOICES: dict[str, tuple[Any, ...]] = {
    "order": tuple(range(1, 9)),
    "eta": (0.0, 0.5, 1.0),
    "reach": (None, 1.5),
    "variance": VARIANCES,
    "ratio": ("closed", *RATIOS, 0.0, 0.3, 1.0),
    "gate": GATES,
    "sigma_data": (0.5, 1.0),
    "base": (Epsilon(), CleanImage(), Velocity(), Dual(ratio="step"), Karras()),
}
"""Values of a field that select another computation, by the field's name; what a class refuses is left out."""

PAIRS = (
    Dual(first=Velocity()),
    Dual(first=Velocity(), gate="balanced", blend_weight=0.5),
    Dual(second=Velocity(), gate="balanced"),
    Dual(first=Flow(), second=CleanImage(), ratio="channel"),
)
"""Other pairs of outputs; not every variant of a ratio with every pair."""


def variants(cls: type[Any], **fixed: Any) -> Iterator[Any]:
    """Instances of one class for every choice of the fields that select."""
    chosen: dict[str, tuple[Any, ...]] = {}
    for f in dataclasses.fields(cls):
        if f.init and f.name not in fixed:
            if f.name in CHOICES:
                chosen[f.name] = CHOICES[f.name]
            elif isinstance(f.default, bool):
                chosen[f.name] = (False, True)
    for values in product(*chosen.values()):
        try:
            yield cls(**fixed, **dict(zip(chosen, values, strict=True)))
        except InputError:
            continue


def parameterizations() -> list[Any]:
    """Every variant of every parameterization, as parameters of a test."""
    every = [*(p for cls in Parameterization.kinds().values() for p in variants(cls)), *PAIRS]
    return [pytest.param(p, id=p.spec) for p in every]


def schedule_of(cls: type[Schedule], steps: int) -> Schedule:
    """A schedule of T steps that ends near pure noise."""
    needed = {f.name for f in dataclasses.fields(cls) if f.init}
    fields: dict[str, Any] = {"steps": steps} if "steps" in needed else {}
    if "betas" in needed:
        fields["betas"] = Cosine(steps).variances()
    if {"beta_start", "beta_end"} <= needed:
        fields |= {"beta_start": 0.1 / max(steps, 10), "beta_end": min(20 / steps, 0.9)}
    return cls(**fields)


def schedules(steps: int) -> list[Any]:
    """Every schedule, of T steps, as parameters of a test."""
    return [pytest.param(schedule_of(cls, steps), id=name) for name, cls in Schedule.kinds().items()]


def samplers(steps: int = 5, **fields: Any) -> list[Any]:
    """Every variant of every sampler, as parameters of a test."""
    found = []
    for cls in Sampler.kinds().values():
        # one that leaves the time steps to somebody else is not told them
        own_times = isinstance(next(f.default for f in dataclasses.fields(cls) if f.name == "spacing"), str)
        given = fields if own_times else {k: v for k, v in fields.items() if k != "spacing"}
        for sampler in variants(cls, steps=steps, **given):
            plain = dataclasses.replace(
                sampler, steps=20, clip=(-1.0, 1.0), **({"spacing": "trailing"} if own_times else {})
            )
            found.append(pytest.param(sampler, id=plain.spec))
    return found


def short() -> Schedule:
    """50 steps from nearly clean to nearly pure noise."""
    return schedule_of(Linear, 50)
