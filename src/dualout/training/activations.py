"""What gradients through K steps take of memory: activations are kept where they are few, and else computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dualout.denoiser import Denoiser
from dualout.levels import Level
from dualout.networks.precision import Precision
from dualout.prediction import Prediction
from dualout.schedules import Schedule

MOST_KEPT = 2**30
"""Bytes that the activations of all steps may take; with more, they are computed again in the backward pass."""


class Economical(nn.Module):
    """A denoiser, computed in a number format, whose activations are kept for the backward pass where those of all
    looks of a trajectory take no more than `MOST_KEPT`, and computed again in it otherwise."""

    def __init__(self, denoiser: Denoiser, precision: Precision, looks: int) -> None:
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
            with (kept := Kept(self.denoiser)):
                trial = look(x_t)
            self._keeps = self.looks * kept.bytes <= MOST_KEPT
            del trial
        return look(x_t) if self._keeps else _recomputed(look, x_t)


class Kept(saved_tensors_hooks):
    """Counts what passes within it keep for their backward halves, the weights themselves aside."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        self._weights = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
        self._found: dict[int, int] = {}

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._found[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        """How many."""
        return sum(self._found.values())


def _recomputed(look: Callable[[Tensor], Prediction], x_t: Tensor) -> Prediction:
    """A look whose activations are computed again in the backward pass, not kept."""
    level: list[Level] = []

    def run(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        p = look(x)
        level[:] = [p.level]
        return p.x0, dict(p.parts)

    x0, parts = checkpoint(run, x_t, use_reentrant=False)
    return Prediction(x_t, level[0], x0, parts)
