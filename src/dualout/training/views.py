"""What a calibration compares images by: pixels, random features, and the model's own.

(B, C, H, W) -> (B, D), with gradients. The features that judge images later are none of these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.networks.trace import deepest, first
from dualout.randomness import mix
from dualout.schedules import Schedule
from dualout.training.told import Told

FLOOR = 0.1
"""The variance, as a share of the mean over all directions, below which a direction counts for less."""

WIDTH = 32
"""Of the random conv net's first layer."""

LOOKED_AT = 0.17
"""sigma / alpha of the noise level at which the network is asked for its features; t = 48 of the linear schedule."""


class Views(nn.Module):
    """Pixels averaged 2×2, a fixed random conv net at two scales, and the network's own features where it has some.

    (B, C, H, W) -> a list of (B, D), each whitened: real images have about unit variance in every direction in which
    they vary at all. Unwhitened, a distance sees the few directions that hold most of the variance, and strokes that
    are blurred or grey, which hold little, cost nothing.

    Args:
        images: real ones, which the directions and their variances are taken from.
        seed: of the random conv net.
        denoiser: whose features are looked at too; None is nobody's.
        told: what it is told of classes, where it knows some.
    """

    to_fine: Tensor
    to_coarse: Tensor

    def __init__(self, images: Tensor, seed: int, denoiser: Denoiser | None = None, told: Told | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(int(mix(seed, 2)) % 2**63)

        def weights(inputs: int, outputs: int) -> Tensor:
            return torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5

        self.register_buffer("to_fine", weights(images.shape[1], WIDTH))
        self.register_buffer("to_coarse", weights(WIDTH, 2 * WIDTH))
        self.to(images.device)
        self.within = None if denoiser is None else Within.of(denoiser, images[:2], told)
        with torch.no_grad():
            seen = zip(*map(self._seen, images[:1024].split(256)), strict=True)
            self.whitened = [whitening(torch.cat(view)) for view in seen]

    def forward(self, images: Tensor) -> list[Tensor]:
        """The views of images (B, C, H, W)."""
        return [view @ by for view, by in zip(self._seen(images), self.whitened, strict=True)]

    @torch.no_grad()
    def of(self, images: Tensor) -> list[Tensor]:
        """The views of any number of images (N, C, H, W), a few hundred at a time."""
        return [torch.cat(view) for view in zip(*map(self, images.split(256)), strict=True)]

    def _seen(self, images: Tensor) -> list[Tensor]:
        pixels = F.avg_pool2d(images, 2, ceil_mode=True).flatten(1)
        fine = F.leaky_relu(F.conv2d(images, self.to_fine, stride=2, padding=1), 0.2)
        coarse = F.leaky_relu(F.conv2d(fine, self.to_coarse, stride=2, padding=1), 0.2)
        views = [pixels, F.avg_pool2d(fine, 2, ceil_mode=True).flatten(1), coarse.flatten(1)]
        return views if self.within is None else [*views, self.within(images)]


def whitening(x: Tensor) -> Tensor:
    """The map (D, K) to x's principal directions, each in units of the root of its variance and FLOOR of the mean one.

    Args:
        x: (N, D).
    """
    _, singular, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    variance = singular.square() / max(len(x) - 1, 1)
    floor = (FLOOR * variance.sum() / x.shape[1]).clamp(min=1e-12)
    scale = (variance + floor).rsqrt()
    unit = (variance * scale.square()).mean().sqrt().clamp(min=1e-6)
    return directions.T * (scale / unit)


class Within:
    """What a denoiser's network makes of images deep inside, at a low noise level (DIFT, Tang et al. 2023,
    arXiv 2306.03881; DDAE, Xiang et al. 2023, arXiv 2303.09769). The images get no noise: they are the mean of x_t. A
    model of classes is told that they have none.

    Args:
        denoiser: used as it is; its weights should ask for no gradient.
        layer: the name of the module in its network whose result is taken.
        told: what it is told of classes, where it knows some.
    """

    def __init__(self, denoiser: Denoiser, layer: str, told: Told | None = None) -> None:
        self.denoiser, self.layer, self.told = denoiser, layer, told
        self.t, self.alpha = _low_noise(denoiser.schedule)

    @classmethod
    def of(cls, denoiser: Denoiser, images: Tensor, told: Told | None = None) -> Within | None:
        """At the layer that `deepest` finds; None where there is none."""
        if not isinstance(denoiser.network, nn.Module):
            return None
        t, alpha = _low_noise(denoiser.schedule)
        conditions = told.nothing(len(images)) if told else {}
        layer = deepest(denoiser.network, images, lambda: denoiser(alpha * images, t, **conditions))
        return None if layer is None else cls(denoiser, layer, told)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        module = self.denoiser.network.get_submodule(self.layer)  # type: ignore[union-attr]
        try:
            # a compiled network would not ask the hook
            with module.register_forward_hook(_stop), torch.compiler.set_stance("force_eager"):
                self.denoiser(self.alpha * images, self.t, **(self.told.nothing(len(images)) if self.told else {}))
        except _Enough as enough:
            return enough.seen.float().flatten(1)
        raise InputError(f"the network left out its layer {self.layer}, which is looked at; take --own_features false")


class _Enough(Exception):
    """What a layer gives; nothing of what the network would go on to compute is needed."""

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.seen = seen


def _stop(module: nn.Module, args: object, output: object) -> None:
    raise _Enough(first(output))


def _low_noise(schedule: Schedule) -> tuple[int, float]:
    """The time step at which the network is asked, and its alpha."""
    alpha, sigma = schedule.levels
    t = int((sigma / alpha - LOOKED_AT).abs().argmin())
    return t, float(alpha[t])
