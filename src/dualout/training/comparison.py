"""What the images of a calibration are compared with: real ones that the fit sees, and others that it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.randomness import SeededDraw, mix, noise
from dualout.samplers.base import Denoises, Sampler
from dualout.training.distances import Distance
from dualout.training.told import Told
from dualout.training.views import Views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualout.training.calibrate import Fit

REAL = 2048
"""Real images, at most, that every batch of made ones is compared with."""

FEWEST = 16
"""Held-out images that are enough to decide."""

HELD_OUT, UPDATES, PLACES = 1, 2, 3
"""Kinds of noise: what decides, what the numbers are fitted by, and what the time steps are moved by."""


class Far(NamedTuple):
    """How far images of held-out noise are from real ones, and how near to those of the fit."""

    distance: float
    nearest: float


class Comparison:
    """What made images are compared with: real images of the fit, and others beside them to decide.

    Args:
        denoiser: whose network looks at images too, where the fit asks for that.
        images: real ones, (N, C, H, W).
        how: the settings.
        told: what the denoiser is told of classes, where it knows some.

    Raises:
        InputError: for too few images.
    """

    def __init__(self, denoiser: Denoiser, images: Tensor, how: Fit, told: Told | None = None) -> None:
        held = min(how.held_out, len(images) // 4)
        if held < FEWEST:
            raise InputError(f"calibration needs {4 * FEWEST} images or more, got {len(images)}")
        images = images[torch.from_numpy(np.random.default_rng(how.seed).permutation(len(images)))]
        self.how, self.told, self.distance = how, told, Distance.parse(how.distance)
        self.real, real_held = images[held:], images[:held]
        self.views = Views(self.real[:REAL], how.seed, denoiser if how.own_features else None, told)
        self.seen, seen_held = self.views.of(self.real[:REAL]), self.views.of(real_held)
        # all tell two calibrations apart better than the few held out: some numbers a step learn no image by heart, and
        # `nearest` would show it
        self.seen_all = [torch.cat(both) for both in zip(self.seen, seen_held, strict=True)]
        self.held_images = held
        self.nearest_real = nearest(real_held, self.real)

    def far(self, made: Tensor, seed: int) -> Tensor:
        """How far images are from those of the fit: a scalar, with gradients."""
        return self._sum(made, self.seen, seed)

    @torch.no_grad()
    def held_out(self, denoiser: Denoises, sampler: Sampler) -> Far:
        """Of images from noise that the fit does not see, to all real images, seen by the fit or not."""
        many, batch = self.how.held_out, self.how.batch
        numbers = [range(first, min(first + batch, many)) for first in range(0, many, batch)]
        made = torch.cat([self.made(denoiser, sampler, HELD_OUT, some) for some in numbers])
        return Far(float(self._sum(made, self.seen_all, self.how.seed)), nearest(made, self.real))

    @torch.no_grad()
    def placed(self, denoiser: Denoises, sampler: Sampler) -> float:
        """How far images are from those of the fit, made from the one batch of noises that time steps are moved by."""
        return float(self.far(self.made(denoiser, sampler, PLACES, range(self.how.placing)), self.how.seed))

    def made(self, denoiser: Denoises, sampler: Sampler, kind: int, numbers: range, *, grad: bool = False) -> Tensor:
        """Images (B, C, H, W), from the noises of a kind that have these numbers."""
        seeds, shape = mix(self.how.seed + kind, np.array(numbers)), self.real.shape[1:]
        draw = SeededDraw(seeds, shape, device=self.real.device)  # type: ignore[arg-type]
        x = noise(seeds, shape, device=self.real.device)
        conditions = self.told.classes(numbers) if self.told else {}
        for moment in sampler.trajectory(denoiser, x, draw, differentiable=grad, **conditions):
            x = moment.x_next
        return x if sampler.clip is None else x.clamp(*sampler.clip)

    def protocol(self) -> dict[str, Any]:
        """What images were compared by."""
        within = self.views.within
        return {
            "own_features": None if within is None else {"layer": within.layer, "t": within.t},
            "images": len(self.real),
            "held_out_images": self.held_images,
        } | ({"class_labels": self.told.source} if self.told else {})

    def _sum(self, made: Tensor, seen: Sequence[Tensor], seed: int) -> Tensor:
        views = zip(self.views(made), seen, strict=True)
        return torch.stack([self.distance(a, b, seed) for a, b in views]).sum()


def nearest(made: Tensor, real: Tensor) -> float:
    """How far images are from the nearest of others, root mean square over pixels, on average.

    Made images that come nearer to the images of the fit than unseen real images are copies of these.
    """
    distances = [torch.cdist(rows.flatten(1), real.flatten(1)).amin(1) for rows in made.split(256)]
    return float(torch.cat(distances).mean()) / made[0].numel() ** 0.5
