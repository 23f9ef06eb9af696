"""Networks of third parties, as far as their published weights need them; names follow those weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dualout.errors import InputError
from dualout.levels import per_image
from dualout.networks.adapter import LevelAdapter
from dualout.schedules import Schedule


class ScaledInput(LevelAdapter):
    """A network that was trained with images of another scale: it sees scale·x0 where the denoiser's images are x0.

    Args:
        network: the network.
        schedule: the denoiser's noise levels, with alpha² + sigma² = 1; those of the network then also have it.
        scale: its images' largest value.
    """

    factor: Tensor

    def __init__(
        self, network: nn.Module | Callable[..., Any], schedule: Schedule | dict[str, Any], scale: float
    ) -> None:
        super().__init__(network, schedule)
        self.scale = float(scale)
        alpha, sigma = self.schedule.levels
        self.tabulate("factor", ((alpha / self.scale) ** 2 + sigma**2).rsqrt())

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"network": self.network, "schedule": self.schedule.config(), "scale": self.scale}

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Any:
        """The network's output for noisy images (B, C, H, W) at time steps (B,)."""
        return self.network(x_t * per_image(self.factor[t].to(x_t.dtype), x_t), t, **conditions)


class _Normed(nn.Module):
    """A convolution, and a LayerNorm over the whole image."""

    def __init__(self, before: int, channels: int, size: Sequence[int], kernel: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(before, channels, kernel, padding=kernel // 2)
        self.net = nn.Sequential(convolution, nn.LayerNorm([channels, *size]), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class StarterCNN(nn.Module):
    """Convolutions with a LayerNorm over the whole image after each; time in [0, 1] is added after the first.

    The layout of the MNIST networks of github.com/Yichizz/hot_vs_cold_diffusion (MIT).

    Args:
        image_channels: C.
        size: height and width.
        hidden: channels of each convolution but the last.
        kernel: their size.
        last_kernel: that of the last.
        frequencies: of the time's sines and cosines, how many.
    """

    frequencies: Tensor

    def __init__(
        self,
        image_channels: int,
        size: Sequence[int],
        hidden: Sequence[int],
        kernel: int = 7,
        last_kernel: int = 3,
        frequencies: int = 16,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "image_channels": image_channels, "size": list(size), "hidden": list(hidden), "kernel": kernel,
            "last_kernel": last_kernel, "frequencies": frequencies,
        }  # fmt: skip
        self.image: dict[str, Any] = {"channels": image_channels, "size": list(size)}
        self.blocks = nn.ModuleList()
        for before, channels in pairwise((image_channels, *hidden)):
            self.blocks.append(_Normed(before, channels, size, kernel))
        self.blocks.append(nn.Conv2d(hidden[-1], image_channels, last_kernel, padding=last_kernel // 2))
        widths = (2 * frequencies, 128, 128, 128, hidden[0])
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.GELU())]
        self.time_embed = nn.Sequential(*layers[:-1])
        self.register_buffer("frequencies", torch.zeros(frequencies))

    @staticmethod
    def sizes(weights: Mapping[str, Tensor], source: str) -> dict[str, Any]:
        """The constructor's arguments that weights need."""
        try:
            blocks = [
                weights[f"blocks.{i}.net.0.weight"]
                for i in range(len(weights))
                if f"blocks.{i}.net.0.weight" in weights
            ]
            last = weights[f"blocks.{len(blocks)}.weight"]
            return {
                "image_channels": len(last),
                "size": list(weights["blocks.0.net.1.weight"].shape[1:]),
                "hidden": [len(w) for w in blocks],
                "kernel": blocks[0].shape[-1],
                "last_kernel": last.shape[-1],
                "frequencies": len(weights["frequencies"]),
            }
        except (KeyError, IndexError) as error:
            raise InputError(f"{source} has no {error} among its weights: it is of another layout") from error

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, C, H, W), (B,) in [0, 1] -> (B, C, H, W)."""
        first, *others, last = self.blocks
        phase = t[:, None] * self.frequencies
        time = self.time_embed(torch.cat([phase.sin(), phase.cos() - 1], 1))
        h = first(x_t) + time[:, :, None, None]
        for block in others:
            h = block(h)
        return last(h)


class _Block(nn.Module):
    """LayerNorm over the whole image, then two convolutions."""

    def __init__(self, before: int, channels: int, size: int, *, normed: bool = True) -> None:
        super().__init__()
        # the weights of a norm that is not applied are in the files too
        self.ln = nn.LayerNorm([before, size, size])
        self.conv1 = nn.Conv2d(before, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.normed = normed

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln(x) if self.normed else x
        return nn.functional.silu(self.conv2(nn.functional.silu(self.conv1(h))))


class TimeUNet(nn.Module):
    """A UNet for one-channel images of 28×28; each level is told the time by a sum.

    The layout of github.com/niuwengang/mnist_ddpm, which many tutorials share.

    Args:
        steps: T.
        width: of the time's table.
    """

    def __init__(self, steps: int = 1000, width: int = 100) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"steps": steps, "width": width}
        self.image: dict[str, Any] = {"channels": 1, "size": [28, 28]}
        self.time_embed = nn.Embedding(steps, width).requires_grad_(False)

        def told(channels: int) -> nn.Module:
            return nn.Sequential(nn.Linear(width, channels), nn.SiLU(), nn.Linear(channels, channels))

        def level(size: int, *channels: int, normed: bool = True) -> nn.Module:
            pairs = list(pairwise(channels))
            return nn.Sequential(
                *(_Block(a, b, size, normed=normed or i < len(pairs) - 1) for i, (a, b) in enumerate(pairs))
            )

        self.te1, self.b1, self.down1 = told(1), level(28, 1, 10, 10, 10), nn.Conv2d(10, 10, 4, 2, 1)
        self.te2, self.b2, self.down2 = told(10), level(14, 10, 20, 20, 20), nn.Conv2d(20, 20, 4, 2, 1)
        self.te3, self.b3 = told(20), level(7, 20, 40, 40, 40)
        self.down3 = nn.Sequential(nn.Conv2d(40, 40, 2, 1), nn.SiLU(), nn.Conv2d(40, 40, 4, 2, 1))
        self.te_mid, self.b_mid = told(40), level(3, 40, 20, 20, 40)
        self.up1 = nn.Sequential(nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2, 1))
        self.te4, self.b4, self.up2 = told(80), level(7, 80, 40, 20, 20), nn.ConvTranspose2d(20, 20, 4, 2, 1)
        self.te5, self.b5, self.up3 = told(40), level(14, 40, 20, 10, 10), nn.ConvTranspose2d(10, 10, 4, 2, 1)
        self.te_out, self.b_out = told(20), level(28, 20, 10, 10, 10, normed=False)
        self.conv_out = nn.Conv2d(10, 1, 3, 1, 1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 1, 28, 28), (B,) -> (B, 1, 28, 28)."""
        time = self.time_embed(t)

        def add(x: Tensor, told: nn.Module) -> Tensor:
            return x + told(time)[:, :, None, None]

        h1 = self.b1(add(x_t, self.te1))
        h2 = self.b2(add(self.down1(h1), self.te2))
        h3 = self.b3(add(self.down2(h2), self.te3))
        middle = self.b_mid(add(self.down3(h3), self.te_mid))
        h = self.b4(add(torch.cat([h3, self.up1(middle)], 1), self.te4))
        h = self.b5(add(torch.cat([h2, self.up2(h)], 1), self.te5))
        h = self.b_out(add(torch.cat([h1, self.up3(h)], 1), self.te_out))
        return self.conv_out(h)
