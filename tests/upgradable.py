"""Denoisers to upgrade, a toy one among them, and their noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout.denoiser import Denoiser
from dualout.networks import build
from dualout.parameterizations import (
    CleanImage,
    Epsilon,
    Flow,
    Karras,
    LearnedVariance,
    Parameterization,
    Velocity,
)
from dualout.training import noised

SCHEDULE = dualout.schedules.Linear(200, 5e-4, 0.08)
CPU = torch.device("cpu")
SOURCES = [Epsilon(), CleanImage(), Velocity(), Flow(), Karras(), LearnedVariance(), LearnedVariance(Velocity())]
SOURCE = pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.spec)


def trained(parameterization: Parameterization, channels: int = 1) -> Denoiser:
    network = build("tiny:width=8", channels, 8, parameterization.channels(channels))
    return Denoiser(network, parameterization, SCHEDULE).eval()


def noises(count: int = 3, channels: int = 1) -> Tensor:
    return dualout.noise(range(count), (channels, 8, 8))


def draw(k: int) -> Tensor:
    return dualout.noise(range(100 * k + 7, 100 * k + 10), (1, 8, 8))


class Toy(nn.Module):
    """Random features, then a layer."""

    def __init__(self, last: nn.Conv2d) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 3, 3, padding=1)
        self.last = last

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.features(x) + 0.01 * t.view(-1, 1, 1, 1)))


def toy_batches(count: int = 6, bins: int = 3, size: int = 5) -> list[noised.Noised]:
    x0 = dualout.noise(range(4 * count), (1, size, size)).tanh()
    eps = dualout.noise(range(1000, 1000 + 4 * count), (1, size, size))
    t = torch.arange(4 * count) * 8 % 200
    return [noised.Noised(k % bins, x0[4 * k :][:4], t[4 * k :][:4], eps[4 * k :][:4], {}) for k in range(count)]


def noisy(b: noised.Noised) -> Tensor:
    level = SCHEDULE.level(b.t).like(b.x0)
    return level.alpha * b.x0 + level.sigma * b.noise
