"""A network's output, whatever it was trained to predict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dualout.levels import Level


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Prediction:
    """A prediction of the clean image, at one noise level.

    Invariant: ``level.alpha · x0 + level.sigma · eps == x_t``.
    """

    x_t: Tensor
    """The noisy image that it was made from, (B, C, H, W)."""
    level: Level
    """Its noise level: floats, or tensors shaped to broadcast against `x_t`; those of one number an image become so."""
    x0: Tensor
    """The predicted clean image, (B, C, H, W), not clipped."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """The network's outputs, by name: `eps` and `x0` (B, C, H, W), `ratio` in (0, 1), broadcastable to them;
    `variance`, the place between β̃ and β of a learned variance (see `parameterizations.LearnedVariance`)."""
    direct: Tensor | None = field(default=None, init=False)
    """The noise as the network gave it, where `x0` follows from it alone: `eps`, but for rounding. No argument, so that
    `dataclasses.replace` with another x0 leaves it out, which would contradict it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", self.level.over(self.x_t))

    def __repr__(self) -> str:
        parts = f" of {', '.join(self.parts)}" if self.parts else ""
        return f"Prediction({'×'.join(map(str, self.x0.shape))}{parts})"

    @property
    def eps(self) -> Tensor:
        """The noise that `x0` implies, (B, C, H, W)."""
        return (self.x_t - self.level.alpha * self.x0) / self.level.sigma


def directly(prediction: Prediction, noise: Tensor | None) -> Prediction:
    """A Prediction that was just made, with the noise that its x0 was made of."""
    object.__setattr__(prediction, "direct", noise)
    return prediction
