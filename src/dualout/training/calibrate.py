"""K-step calibration: fit a few numbers for each step of a K-step trajectory.

The weights stay as they are. The numbers of `dualout.calibrated` are found by gradients through all K steps, against a
distance between made and real images; what that takes of memory is bounded (`dualout.training.activations`). There are
two starts: the uncalibrated one, its time steps moved, and for samplers of first order that of DPM-Solver++ 2M, for
those of higher order the uncalibrated one as it is. Which of the two goes on halfway, and when to stop, is decided by
noise that the fit never sees and by all real images, held-out ones included.

Trained samplers of single-output models: DDSS (Watson et al. 2022, arXiv 2202.05830), iDDIM, bespoke solvers (Shaul
et al. 2023, arXiv 2310.19075), AMED (Zhou et al. 2024, arXiv 2312.00094).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from dualout.calibrated import NEUTRAL, Calibrated, Calibration
from dualout.data.dataset import Dataset
from dualout.data.pixels import to_model
from dualout.denoiser import Denoiser
from dualout.errors import InputError, unknown
from dualout.networks.precision import Precision
from dualout.randomness import check_seed, mix
from dualout.registry import as_python, described, fits
from dualout.samplers.base import Denoises, Sampler
from dualout.training.activations import Economical
from dualout.training.comparison import FEWEST, UPDATES, Comparison, Far
from dualout.training.distances import Distance
from dualout.training.starts import Numbers, Start, moved_times
from dualout.training.told import Told

RACE = 0.5
"""The part of the updates that is made from both starts; then the better goes on."""


def way(sampler: Sampler) -> int:
    """Which way of fitting a sampler's calibration this is, of those that were kept: other ways find other numbers from
    the same settings. The sixth begins solvers of higher order twice, and left those of first order as they were."""
    return 6 if sampler.order > 1 else 5


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
    """Noises, and as many images or a quarter of those given, that only decide where to begin and when to stop.

    The images decide together with those of the fit.
    """
    check_every: int = 25
    patience: int = 6
    """Checks without a better held-out distance, after which it stops."""
    move_times: int = 3
    """Rounds in which every time step is moved to where the distance is least, before the numbers are fitted and again
    when they are half fitted."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, value := as_python(getattr(self, name)))
            if not fits(value, hint):
                raise InputError(f"{name} of a calibration is {described(hint)}; got {value!r}")
        # of one image, there is no distance between two of a batch
        least = {"iterations": 1, "batch": 2, "held_out": FEWEST, "check_every": 1, "patience": 1, "move_times": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} is {low} or more, got {getattr(self, name)}")
        if not self.lr > 0:
            raise InputError(f"lr is above 0, got {self.lr}")
        check_seed(self.seed)
        Distance.parse(self.distance)

    @property
    def placing(self) -> int:
        """Images that places of time steps are tried by: one batch has to do, where the numbers see many."""
        return max(self.batch, 256)

    def trajectories(self, steps: int) -> float:
        """How many images are made through all steps, at most; what gradients cost is counted as such."""
        # an update makes its images, may make each step again in the backward pass, and that costs two more
        updates = 4 * (1 + RACE) * self.iterations * self.batch
        # from two starts and halfway one whole trajectory, and in a round two for every step k that is moved, of which
        # the k steps before are known: 2·(K + … + 1) steps
        moves = 3 * (1 + self.move_times * (steps + 1)) * self.placing if self.move_times else 0
        checks = (4 + (1 + RACE) * self.iterations / self.check_every) * self.held_out
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
    told: Told | None = None,
) -> Iterator[Progress]:
    """Calibrate; yields at every check, the last time with the result.

    Args:
        denoiser: whose weights stay as they are.
        sampler: with its K and spacing.
        images: real ones, float in [−1, 1], (N, C, H, W).
        how: the settings.
        numbers: which to fit, of `calibrated.NEUTRAL`; None is all that the parameterization has.
        precision: of the network when images are made; None is float32. How far images are is measured in float32.
        told: the class labels that the denoiser is conditioned on, where it is.

    Raises:
        InputError: for too few images, those of another kind or range, or numbers that there are not.
    """
    _check(denoiser, sampler, images)
    names = parameters_of(denoiser) if numbers is None else tuple(numbers)
    for name in names:
        if name not in parameters_of(denoiser):
            raise unknown("number of a calibration of this model:", name, parameters_of(denoiser))
    precision = precision or Precision("fp32", images.device, "the default")
    plain = Economical(denoiser, precision, sampler.evaluations)
    comparison = Comparison(denoiser, images, how, told)
    uncalibrated = Start(names, sampler.timesteps(denoiser.schedule), moves=how.move_times > 0)
    before = comparison.held_out(plain, sampler)
    best = _Found(before, uncalibrated, uncalibrated.times, uncalibrated.values(denoiser.schedule))
    frozen = {p: p.requires_grad for p in denoiser.parameters()}
    worse = 0
    try:
        for p in frozen:
            p.requires_grad_(False)
        starts = [start.moved(plain, sampler, comparison) for start in uncalibrated.alternatives(sampler)]
        descents = [_Descent(plain, sampler, start, comparison, how) for start in starts]
        for i in range(1, how.iterations + 1):
            for descent in descents:
                descent.update(i)
            if i % how.check_every and i != how.iterations:
                continue
            for descent in descents:
                descent.check()
            ahead = min(descents, key=lambda descent: descent.best.far.distance)
            if i >= how.iterations * RACE and not ahead.chosen:
                ahead.go_on()
                descents = [ahead]
            worse = 0 if ahead.best.far.distance < best.far.distance else worse + 1
            if not worse:
                best = ahead.best
            known = {"way": way(sampler), "iterations": i, "precision": plain.precision.name}
            protocol = _protocol(before, best, comparison) | known
            calibration = Calibration(sampler.config(), best.times, best.values, protocol)
            yield Progress(i, ahead.since(), ahead.now.distance, best.far.distance, calibration)
            if worse >= how.patience:
                return
    finally:
        for p, wanted in frozen.items():
            p.requires_grad_(wanted)


def _check(denoiser: Denoiser, sampler: Sampler, images: Tensor) -> None:
    for what, wanted, it in (("denoiser", Denoiser, denoiser), ("sampler", Sampler, sampler)):
        if not isinstance(it, wanted):
            raise InputError(f"what is calibrated is a {what}; got {type(it).__name__} {it!r:.60}")
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"a calibration is fitted to a tensor of real images, floats (N, C, H, W); got {got}")
    least, most = images.aminmax() if images.numel() else (images.sum(), images.sum())
    low, high = sampler.clip or (-math.inf, math.inf)
    # what is normalized by its mean and deviation goes beyond by some
    beyond = 2 * (high - low) if sampler.clip else 0.0
    if not (low - beyond <= float(least) <= float(most) <= high + beyond and (most - least).isfinite()):
        raise InputError(
            f"real images lie in the sampler's clip, {sampler.clip}, and hold no NaN; got {float(least):.4g} to "
            f"{float(most):.4g}. dualout.data.to_model is for 0 to 255, and clip=None for latents"
        )


@dataclass(frozen=True, eq=False)
class Target:
    """Images of a data set that a calibration is fitted to, and what its protocol says of them."""

    images: Tensor
    """Float in [−1, 1], (N, C, H, W), where images are made."""
    told: Told | None
    """Their classes, where the denoiser is told some."""
    data: dict[str, Any]
    """Which they are, as plain JSON values."""

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device, classes: int | None, most: int = 20_000, **said: Any) -> Target:
        """So many images at most, spread evenly over the data set: folders lie sorted by class.

        Args:
            dataset: the real images.
            device: where images are made.
            classes: how many the denoiser knows; None where it is told nothing.
            most: images, at most.
            said: what the images were asked for by, such as their name and split.
        """
        n = min(len(dataset), most)
        rows = [i * len(dataset) // n for i in range(n)]
        images = to_model(dataset.batch(rows)).to(device)
        data = {**said, "images": n, "fingerprint": dataset.fingerprint}
        return cls(images, Told.of(classes, dataset, rows, device), data)


def fit_to(
    target: Target,
    denoiser: Denoiser,
    sampler: Sampler,
    how: Fit,
    weights: str,
    numbers: Sequence[str] | None = None,
    precision: Precision | None = None,
) -> Iterator[Progress]:
    """Calibrate as `fit` does, with a protocol that tells the images, and the weights by their hash."""
    known = {"data": target.data, "weights": weights}
    for progress in fit(denoiser, sampler, target.images, how, numbers, precision, target.told):
        calibration = replace(progress.calibration, protocol=progress.calibration.protocol | known)
        yield progress._replace(calibration=calibration)


class _Found(NamedTuple):
    """A calibration, and how far images made with it are."""

    far: Far
    begun: Start
    times: Sequence[int]
    values: Numbers


def _protocol(before: Far, best: _Found, comparison: Comparison) -> dict[str, Any]:
    return {
        "held_out_before": before.distance,
        "held_out_after": best.far.distance,
        "nearest": {
            "before": before.nearest,
            "after": best.far.nearest,
            "held_out_images": comparison.nearest_real,
        },
        "begun_as": "2M" if best.begun.second_order else "uncalibrated",
        "fit": vars(comparison.how),
        **comparison.protocol(),
    }


class _Descent:
    """The numbers of one start, followed down the gradient of the distance.

    Attributes:
        values: by name, one number a step, (K,).
        now: how far images made with them were at the last check.
        best: what was nearest at one.
        chosen: whether it is the one that goes on halfway.
    """

    def __init__(self, denoiser: Denoises, sampler: Sampler, start: Start, comparison: Comparison, how: Fit) -> None:
        self.start, self.comparison, self.how, self.chosen = start, comparison, how, False
        place = comparison.real.device
        self.values = {
            name: torch.tensor(numbers, device=place, requires_grad=True)
            for name, numbers in start.values(denoiser.schedule).items()
        }
        self.plain, self.sampler = denoiser, sampler
        self._go_by(start.times)
        self.optimizer = torch.optim.Adam(self.values.values(), lr=how.lr, betas=(0.9, 0.95))
        self._losses: list[Tensor] = []
        self.now = comparison.held_out(self.denoiser, self.sampler)
        self.best = _Found(self.now, self.start, self.times, _floats(self.values))

    def update(self, i: int) -> None:
        """The i-th update of the numbers, from 1."""
        how = self.how
        for group in self.optimizer.param_groups:
            group["lr"] = how.lr * 0.5 * (1 + math.cos(math.pi * (i - 1) / how.iterations))
        numbers = range(i * how.batch, (i + 1) * how.batch)
        made = self.comparison.made(self.denoiser, self.sampler, UPDATES, numbers, grad=True)
        loss = self.comparison.far(made, int(mix(how.seed, i)) % 2**31)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._losses.append(loss.detach())

    def check(self) -> None:
        """See how far images of held-out noise are from real ones."""
        self.now = self.comparison.held_out(self.denoiser, self.sampler)
        if self.now.distance < self.best.far.distance:
            self.best = _Found(self.now, self.start, self.times, _floats(self.values))

    def go_on(self) -> None:
        """Go on from the best numbers so far, with the time steps moved to where these want them, if they are to be:
        what is fitted wants others than DDIM did."""
        self.chosen, numbers, times = True, self.best.values, self.best.times
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(torch.tensor(numbers[name]))
        if self.start.moves:
            times = moved_times(times, lambda _: numbers, self.plain, self.sampler, self.comparison)
        self._go_by(times)
        self.check()

    def _go_by(self, times: Sequence[int]) -> None:
        self.times, self.sampler = times, self.sampler.at(times)
        self.denoiser = Calibrated(self.plain, times, self.values, self.sampler.clip)

    def since(self) -> float:
        """How far images of the updates were, on average, since this was last asked."""
        mean = float(torch.stack(self._losses).mean())
        self._losses.clear()
        return mean


def _floats(values: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: v.detach().tolist() for name, v in values.items()}
