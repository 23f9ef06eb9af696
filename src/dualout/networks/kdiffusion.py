"""k-diffusion's models: ``network(x, sigma)``.

The models are preconditioned as in EDM. One of them is read by ``Karras(sigma_data)`` with
``SigmaConditioned(network, schedule)``; with k-diffusion's own Denoiser around it, which gives the clean image, by
``CleanImage()`` with ``SigmaConditioned(network, schedule, exploding=True)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from dualout.errors import InputError
from dualout.networks.output import Interleaved, Plain


@dataclass(frozen=True, kw_only=True)
class KUNet(Plain):
    """A 1×1 convolution whose rows are shuffled into patches, all of a channel's rows together."""

    classes = ("k_diffusion.ImageDenoiserModelV1",)
    layer: str = "proj_out"

    @classmethod
    def of(cls, network: Any) -> Self:
        """By this network's patches."""
        return cls(each=network.patch_size**2)

    def check(self, network: Any) -> None:
        """Refuse networks with a row more."""
        if network.has_variance:
            raise InputError(
                "this ImageDenoiserModelV1 has a row for its loss beside the channels (has_variance): it cannot be "
                "widened"
            )


@dataclass(frozen=True, kw_only=True)
class KTransformer(Interleaved):
    """A linear map to patches; its class counts operations, and computes as torch's."""

    classes = ("k_diffusion.ImageTransformerDenoiserModelV2",)
    same = ("k_diffusion.Linear",)
    layer: str = "patch_out.proj"

    @classmethod
    def of(cls, network: Any) -> Self:
        """By this network's patches."""
        return cls(each=network.patch_out.h * network.patch_out.w)


@dataclass(frozen=True, kw_only=True)
class KDenoiser(Plain):
    """A model in its preconditioning, which adds the image to the output."""

    classes = ("k_diffusion.Denoiser", "k_diffusion.DenoiserWithVariance", "k_diffusion.SimpleLossDenoiser")
    layer: str = "inner_model"

    def check(self, network: Any) -> None:
        """Refuse it."""
        raise InputError(
            f"this {type(network).__name__} adds the noisy image to its network's output, channel by channel: widen "
            "what is in it, widen(network.inner_model, …)"
        )
