"""What tests of the closed form share: a toy network, its images, and the fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dualout
from dualout.denoiser import Denoiser
from dualout.parameterizations import Epsilon, Parameterization
from dualout.training.closed_form import Fitted, fit
from dualout.training.upgrade import new_rows, output_layer, upgrade

SCHEDULE = dualout.schedules.Linear(200, 5e-4, 0.08)


class Toy(nn.Module):
    """Random features, dropout, then a layer; remembers what it was called with."""

    def __init__(self, kind: Any = nn.Conv2d, channels: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = kind(channels, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.last = kind(6, channels, 3, padding=1)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((x, t))
        h = torch.tanh(self.features(x) + (0.01 * t).to(x).view(-1, *[1] * (x.ndim - 1)))
        return self.last(self.dropout(h)).to(x.dtype)


def images(count: int = 96, *shape: int) -> Tensor:
    """Smooth ones, so that there is something to learn."""
    shape = shape or (1, 6, 6)
    return (dualout.noise(range(count), (shape[0], *[1] * (len(shape) - 1))) * torch.ones(shape)).tanh()


def toy(source: Parameterization | None = None, kind: Any = nn.Conv2d, channels: int = 1) -> Denoiser:
    return upgrade(Denoiser(Toy(kind, channels), source or Epsilon(), SCHEDULE), layer="last")


def fitted(denoiser: Denoiser, batches: Any, **options: Any) -> Fitted:
    return fit(denoiser, batches, **({"held_out": 32, "bins": 4} | options))


def weights(denoiser: Denoiser) -> Tensor:
    """Of the new outputs: a row each, the bias last."""
    layer: Any = denoiser.network.get_submodule(output_layer(denoiser.network))  # type: ignore[union-attr, arg-type]
    rows = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1)
    return rows[new_rows(denoiser)].detach().clone()


def text_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=8, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip


LATENTS = images(96, 2, 8, 8)
