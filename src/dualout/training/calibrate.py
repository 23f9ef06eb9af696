"""K-step calibration: fit a few numbers a step to what a K-step trajectory wants.

The weights stay as they are. The numbers of `dualout.calibrated` are found by gradients through all K steps, from
the uncalibrated start, against a distance between made and real images; each step is recomputed in the backward
pass, so that memory does not grow with K. Noise and images that the fit never sees decide when to stop.

Trained samplers of single-output models: DDSS (Watson et al. 2022, arXiv 2202.05830), iDDIM, bespoke solvers (Shaul
et al. 2023, arXiv 2310.19075), AMED (Zhou et al. 2024, arXiv 2312.00094).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from dualout.calibrated import NEUTRAL, Calibrated, Calibration
from dualout.denoiser import Denoiser
from dualout.errors import InputError, unknown
from dualout.networks.precision import Precision
from dualout.prediction import Prediction
from dualout.randomness import SeededDraw, mix, noise
from dualout.samplers.base import Denoises, Sampler
from dualout.schedules import Level, Schedule
from dualout.training.distances import Distance
from dualout.training.views import Views


@dataclass(frozen=True)
class Fit:
    """How a calibration is found."""

    iterations: int = 300
    batch: int = 192
    lr: float = 0.03
    distance: str = "sliced"
    own_features: bool = True
    """Whether images are compared by what the model's own network makes of them too, beside pixels and a random net."""
    held_out: int = 1000
    """Images, and as many noises, that only decide when to stop; at most a quarter of the images given."""
    check_every: int = 25
    patience: int = 6
    """Checks without a better held-out distance, after which it stops."""
    move_times: int = 3
    """Rounds in which every time step is moved to where the distance is least, before the numbers are fitted."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "held_out", "check_every", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is 1 or more, got {getattr(self, name)}")
        if self.move_times < 0:
            raise InputError(f"move_times is 0 or more, got {self.move_times}")
        if not self.lr > 0:
            raise InputError(f"lr is above 0, got {self.lr}")
        Distance.parse(self.distance)

    @property
    def compared(self) -> int:
        """Images that places of time steps are compared by: one batch has to do, where the numbers see many."""
        return max(self.batch, 512)

    def trajectories(self, steps: int) -> float:
        """How many images are made through all steps, at most; what gradients cost is counted as such."""
        # an update makes its images, makes each step again in the backward pass, and that costs two more
        updates = 4 * self.iterations * self.batch
        moves = 2 * self.move_times * steps * self.compared
        checks = (2 + self.iterations / self.check_every) * self.held_out
        return updates + moves + checks


class Progress(NamedTuple):
    """One check of a fit."""

    iteration: int
    distance: float
    """On the batches since the last check."""
    held_out: float
    best: float
    calibration: Calibration
    """The best so far."""


def parameters_of(denoiser: Denoiser) -> tuple[str, ...]:
    """The names of the numbers that a denoiser's steps can have: dual output has the ratio's as well."""
    of_ratio = denoiser.parameterization.learns_ratio
    return tuple(name for name in NEUTRAL if of_ratio or not name.startswith("ratio"))


def fit(
    denoiser: Denoiser,
    sampler: Sampler,
    images: Tensor,
    how: Fit,
    numbers: Sequence[str] | None = None,
    precision: Precision | None = None,
) -> Iterator[Progress]:
    """Calibrate; yields at every check, the last time with the result.

    Args:
        denoiser: whose weights stay as they are.
        sampler: with its K and spacing.
        images: real ones, float in [−1, 1], (N, C, H, W).
        how: the settings.
        numbers: which to fit, of `calibrated.NEUTRAL`; None is all that the parameterization has.
        precision: of the network when images are made; None is float32. How far images are is measured in float32.

    Raises:
        InputError: for too few images, or numbers that there are not.
    """
    names = parameters_of(denoiser) if numbers is None else tuple(numbers)
    for name in names:
        if name not in parameters_of(denoiser):
            raise unknown("number of a calibration of this model:", name, parameters_of(denoiser))
    held = min(how.held_out, len(images) // 4)
    if held < 16:
        raise InputError(f"calibration needs 64 images or more, got {len(images)}")
    images = images[torch.from_numpy(_shuffled(how.seed, len(images)))]
    real, real_held = images[held:], images[:held]
    views = Views(real[:2048], how.seed, denoiser if how.own_features else None)
    distance = Distance.parse(how.distance)
    precision = precision or Precision("fp32", images.device, "the default")
    plain = _Recomputed(denoiser, precision)

    def far(made: Tensor, real: Tensor, seed: int) -> Tensor:
        return torch.stack([distance(a, b, seed) for a, b in zip(views(made), views(real), strict=True)]).sum()

    @torch.no_grad()
    def held_out(denoiser: Denoises, sampler: Sampler) -> tuple[float, float]:
        """The distance, and how near made images are to images of the fit."""
        batches = [slice(i, i + how.batch) for i in range(0, held, how.batch)]
        made = torch.cat([_made(denoiser, sampler, real_held[b], how.seed + 1, b.start, grad=False) for b in batches])
        return float(far(made, real_held, how.seed)), nearest(made, real)

    @torch.no_grad()
    def far_at(times: Sequence[int]) -> float:
        rows = real[: how.compared]
        return float(far(_made(plain, sampler.at(times), rows, how.seed + 3, 0, grad=False), rows, how.seed))

    asked, times = sampler.config(), sampler.timesteps(denoiser.schedule)
    start, near = held_out(plain, sampler)
    nearness = {"before": near, "after": near, "held_out_images": nearest(real_held, real)}
    best = start
    if how.move_times:
        try:
            others = moved(times, denoiser.schedule.steps - 1, far_at, how.move_times)
        except InputError as error:
            raise InputError(f"the time steps cannot be moved ({error}); take --move_times 0") from error
        there = sampler.at(others)
        now, near = held_out(plain, there)
        if now < best:
            best, times, sampler, nearness["after"] = now, others, there, near
    values = {
        name: torch.full((len(times),), NEUTRAL[name], device=images.device, requires_grad=True) for name in names
    }
    wrapped = Calibrated(plain, times, values, sampler.clip)
    optimizer = torch.optim.Adam(values.values(), lr=how.lr, betas=(0.9, 0.95))
    frozen = {p: p.requires_grad for p in denoiser.parameters()}
    best_values = _floats(values)
    worse, since = 0, []
    try:
        for p in frozen:
            p.requires_grad_(False)
        for i in range(1, how.iterations + 1):
            for group in optimizer.param_groups:
                group["lr"] = how.lr * 0.5 * (1 + math.cos(math.pi * (i - 1) / how.iterations))
            rows = torch.from_numpy(_shuffled(int(mix(how.seed, 3, i)) % 2**31, len(real))[: how.batch])
            made = _made(wrapped, sampler, real[rows], how.seed + 2, i * how.batch, grad=True)
            loss = far(made, real[rows], int(mix(how.seed, i)) % 2**31)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            since.append(loss.detach())
            if i % how.check_every and i != how.iterations:
                continue
            now, near = held_out(wrapped, sampler)
            worse = 0 if now < best else worse + 1
            if now < best:
                best, best_values = now, _floats(values)
                nearness["after"] = near
            protocol = {
                "held_out_before": start,
                "held_out_after": best,
                "nearest": dict(nearness),
                "iterations": i,
                "fit": vars(how),
                "precision": precision.name,
                "own_features": None if views.within is None else {"layer": views.within.layer, "t": views.within.t},
                "images": len(real),
                "held_out_images": held,
            }
            found = Calibration(asked, times, best_values, protocol)
            yield Progress(i, float(torch.stack(since).mean()), now, best, found)
            since.clear()
            if worse >= how.patience:
                return
    finally:
        for p, wanted in frozen.items():
            p.requires_grad_(wanted)


class _Recomputed(nn.Module):
    """A denoiser, computed in a number format, whose activations are recomputed in the backward pass, not kept."""

    def __init__(self, denoiser: Denoises, precision: Precision) -> None:
        super().__init__()
        self.denoiser, self.precision = denoiser, precision

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def forward(self, x_t: Tensor, t: int, **conditions: Any) -> Prediction:
        if not (torch.is_grad_enabled() and x_t.requires_grad):
            with torch.no_grad(), self.precision.autocast():
                return self.denoiser(x_t, t, **conditions)

        level: list[Level] = []

        def run(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            # in here, so that it is around the second computation too
            with self.precision.autocast():
                p = self.denoiser(x, t, **conditions)
            level[:] = [p.level]
            return p.x0, dict(p.parts)

        x0, parts = recomputed(run, x_t, use_reentrant=False)  # type: ignore[misc]
        return Prediction(x_t, level[0], x0, parts)


def _made(denoiser: Denoises, sampler: Sampler, like: Tensor, seed: int, first: int, *, grad: bool) -> Tensor:
    """As many images as `like` has, from noises counted from `first`."""
    seeds = mix(seed, torch.arange(first, first + len(like)).numpy())
    shape = like.shape[1:]
    draw = SeededDraw(seeds, shape, device=like.device)  # type: ignore[arg-type]
    x = noise(seeds, shape, device=like.device)
    for moment in sampler.trajectory(denoiser, x, draw, differentiable=grad):
        x = moment.x_next
    return x if sampler.clip is None else x.clamp(*sampler.clip)


def moved(times: Sequence[int], last: int, far: Callable[[Sequence[int]], float], rounds: int) -> list[int]:
    """Time steps, moved towards their neighbours where that brings the images nearer.

    Args:
        times: K of them, decreasing.
        last: T − 1.
        far: how far the images of given time steps are.
        rounds: how often each is tried, by half of the way in the first, half of that in the next, and so on.
    """
    times, best = list(times), far(times)
    for part in range(1, rounds + 1):
        for k in range(len(times)):
            t, above, below = times[k], times[k - 1] if k else last + 1, times[k + 1] if k + 1 < len(times) else -1
            for other in (t + (above - t) // 2**part, t - (t - below) // 2**part):
                if below < other < above and other != t:
                    tried = [*times[:k], other, *times[k + 1 :]]
                    if (distance := far(tried)) < best:
                        times, best = tried, distance
    return times


def nearest(made: Tensor, real: Tensor) -> float:
    """How far images are from the nearest of others, root mean square over pixels, on average.

    Made images that come nearer to the images of the fit than unseen real images are copies of these.
    """
    distances = [torch.cdist(rows.flatten(1), real.flatten(1)).amin(1) for rows in made.split(256)]
    return float(torch.cat(distances).mean()) / made[0].numel() ** 0.5


def evenly(count: int, most: int) -> list[int]:
    """At most so many of `count` images, spread evenly: folders lie sorted by class."""
    n = min(count, most)
    return [i * count // n for i in range(n)]


def _shuffled(seed: int, n: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).permutation(n)


def _floats(values: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: v.detach().tolist() for name, v in values.items()}
