"""What gradients through K steps take of memory: activations are kept where they are few, and else computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualout.levels import Level
from dualout.networks.precision import Precision
from dualout.prediction import Prediction
from dualout.samplers.base import Denoises
from dualout.schedules import Schedule

KEPT = 2**30
"""Bytes that the activations of all steps may take; with more, they are computed again in the backward pass."""


class Economical(nn.Module):
    """A denoiser, computed in a number format, whose activations are kept for the backward pass where those of all
    looks of a trajectory take no more than `KEPT`, and computed again in it otherwise."""

    def __init__(self, denoiser: Denoises, precision: Precision, looks: int) -> None:
        super().__init__()
        self.denoiser, self.precision, self.looks = denoiser, precision, looks
        self._keeps: bool | None = None

    @property
    def schedule(self) -> Schedule:
        """The noise levels."""
        return self.denoiser.schedule

    def forward(self, x_t: Tensor, t: int, **conditions: Any) -> Prediction:
        """Predict the clean images, as the denoiser does."""

        def look(x: Tensor) -> Prediction:
            with self.precision.autocast():
                return self.denoiser(x, t, **conditions)

        if not (torch.is_grad_enabled() and x_t.requires_grad):
            with torch.no_grad():
                return look(x_t)
        if self._keeps is None:
            self._keeps = self.looks * _kept(lambda: look(x_t)) <= KEPT
        return look(x_t) if self._keeps else _recomputed(look, x_t)


def _kept(run: Callable[[], object]) -> int:
    """The bytes that a computation keeps for its backward pass."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _alive = run()
    return sum(sizes.values())


def _recomputed(look: Callable[[Tensor], Prediction], x_t: Tensor) -> Prediction:
    """A look whose activations are computed again in the backward pass, not kept."""
    level: list[Level] = []

    def run(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        p = look(x)
        level[:] = [p.level]
        return p.x0, dict(p.parts)

    x0, parts = checkpoint(run, x_t, use_reentrant=False)
    return Prediction(x_t, level[0], x0, parts)
