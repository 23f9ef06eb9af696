"""Small networks, and that a widened one gives what it gave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """A network of someone else's: (x, t), a tensor back."""

    def __init__(self, channels: int = 2, tail: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.middle = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.last = nn.Conv2d(12, channels, 3, padding=1, bias=False)
        self.tail = tail or nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(self.first(x) + t.view(-1, 1, 1, 1) / 1000).relu()
        return self.tail(self.last(self.middle(h)))


def sample_of(output: Any) -> Tensor:
    return getattr(output, "sample", output)


def same_first(wide: nn.Module, network: nn.Module, channels: int, *arguments: Any, **conditions: Any) -> None:
    with torch.no_grad():
        before, after = (sample_of(n(*arguments, **conditions)) for n in (network, wide))
    old = before.shape[1]
    assert after.shape == (len(before), channels, *before.shape[2:])
    assert torch.equal(after[:, :old], before)
    assert (after[:, old:] == 0).all()
