"""A belief is frozen, and its eps follows from its x0."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dualout import Denoiser, Epsilon, noise
from dualout.levels import Level
from dualout.prediction import Prediction
from dualout.samplers import DDIM
from dualout.schedules import Linear


def test_eps_follows_from_x0() -> None:
    x_t, x0 = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64)
    p = Prediction(x_t, Level(0.6, 0.8), x0)
    torch.testing.assert_close(p.eps, (x_t - 0.6 * x0) / 0.8)
    torch.testing.assert_close(0.6 * p.x0 + 0.8 * p.eps, x_t)
    assert p.parts == {}


def test_it_cannot_be_changed() -> None:
    p = Prediction(torch.zeros(1, 1, 2, 2), Linear().scalars(3), torch.zeros(1, 1, 2, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.x0 = torch.ones(1, 1, 2, 2)  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        p.more = 1  # type: ignore[attr-defined]


def test_another_x0_has_another_eps_for_every_sampler() -> None:
    """Guidance of one's own replaces x0; DDIM must not go on by the noise that the network gave."""
    denoiser = Denoiser(lambda x_t, t: 0.3 * x_t, Epsilon(), Linear())

    class Halved:
        schedule = denoiser.schedule

        def __init__(self, change) -> None:
            self.change = change

        def __call__(self, x_t, t) -> Prediction:
            return self.change(denoiser(x_t, t))

    replaced = Halved(lambda p: dataclasses.replace(p, x0=p.x0 / 2))
    built = Halved(lambda p: Prediction(p.x_t, p.level, p.x0 / 2))
    start = noise(range(2), (1, 4, 4))
    assert denoiser(start, 500).direct is not None
    torch.testing.assert_close(DDIM(5).sample(replaced, start), DDIM(5).sample(built, start))
