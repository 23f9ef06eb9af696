"""The exponential moving average of the weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class Ema(Generic[Module]):
    """A module whose weights are the average of another's over the steps.

        average ← d·average + (1 − d)·weights,   d = min(decay, (1 + n) / (10 + n)) at the n-th update

    so that the first, bad, weights are forgotten early. Without the warm-up d is `decay` from the first update: where
    the first weights are good ones, the average leaves them as slowly as it follows.

    Args:
        module: the module that is trained; weights that are not trained, and buffers, are followed, not averaged.
        decay: d's final value.
        average: a module that holds the average so far; None begins with a copy of the weights.
        warmup: whether d rises to its value.
    """

    def __init__(self, module: Module, decay: float, average: Module | None = None, *, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup
        self.module: Module = copy.deepcopy(module).eval().requires_grad_(False) if average is None else average
        means, weights = self.module.state_dict(keep_vars=True), module.state_dict(keep_vars=True)
        # what a module holds under two names is averaged once
        once = {id(v): k for k, v in weights.items()}.values()
        learned = [k for k in once if weights[k].requires_grad]
        followed = [k for k in once if not isinstance(weights[k], nn.Parameter)]
        self._average, self._weights = _both(learned, means, weights)
        self._copies, self._buffers = _both(followed, means, weights)

    def decay_at(self, n: int) -> float:
        """d at the n-th update, counted from 1."""
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Take in the weights after the n-th update, counted from 1."""
        torch._foreach_lerp_(self._average, self._weights, 1 - self.decay_at(n))  # type: ignore[attr-defined]
        if self._copies:
            torch._foreach_copy_(self._copies, self._buffers)  # type: ignore[attr-defined]


def _both(
    names: list[str], average: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [average[k] for k in names], [weights[k] for k in names]
