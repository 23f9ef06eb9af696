"""improved-diffusion's and guided-diffusion's UNets: ``network(x_t, timesteps, y)``.

Their classes are told by position, ``Positional(network, ["class_labels"])``, and improved-diffusion's time is counted
to 1000 unless it was told otherwise, ``ScaledTime(network, 1000 / T)``. Their learned variance is
`dualout.parameterizations.LearnedVariance`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from dualout.networks.output import Plain


@dataclass(frozen=True, kw_only=True)
class OpenAI(Plain):
    """The last convolution of the sequence `out`; also of latent-diffusion's UNet, which descends from these."""

    classes = ("improved_diffusion.UNetModel", "guided_diffusion.UNetModel", "ldm.UNetModel")
    layer: str = "out.2"

    @classmethod
    def of(cls, network: Any) -> Self:
        """The last of however many there are."""
        return cls(layer=f"out.{len(network.out) - 1}")
