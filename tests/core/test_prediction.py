"""A belief is frozen, and its eps follows from its x0."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dualout.prediction import Prediction
from dualout.schedules import Level, Linear


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
