"""What becomes of that which a sampler makes: pixels, latents as they are, or the pixels that are decoded from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor

from dualout.data.pixels import to_uint8
from dualout.evaluation.autoencoder import Autoencoder

Shape = tuple[int, int, int]
"""(C, H, W)."""
_AT_ONCE = 2**20
"""Pixels of the pictures that are decoded together: that takes far more memory than making their latents."""


class Output(ABC):
    """From the last x0 of a sampler to what is written or scored, on the CPU.

    As in data sets, pictures are uint8 and latents floats.
    """

    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)
    bounded: ClassVar[bool] = False
    """Whether x0 has a range to clip it to."""

    @abstractmethod
    def __call__(self, x0: Tensor) -> Tensor:
        """(B, C, H, W), of `dtype`."""

    @abstractmethod
    def shape(self, made: Shape) -> Shape:
        """The shape of what comes of x0 of a shape."""

    @abstractmethod
    def seen(self, x: Tensor) -> Tensor:
        """What there is to see on the way: of noisy or predicted images (B, C, H, W), pictures in [−1, 1] as floats."""

    @property
    def decoded_by(self) -> str | None:
        """The autoencoder that decodes x0, as it was named; None where none does."""
        return None

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What was done, as plain JSON values."""


@final
class Pixels(Output):
    """x0 is a picture in [−1, 1]."""

    bounded = True

    def __call__(self, x0: Tensor) -> Tensor:
        """uint8 (B, C, H, W)."""
        return to_uint8(x0).cpu()

    def shape(self, made: Shape) -> Shape:
        """The same."""
        return made

    def seen(self, x: Tensor) -> Tensor:
        """Themselves."""
        return x

    def protocol(self) -> dict[str, Any]:
        """How floats became pixels."""
        return {"pixels": "clipped to [−1, 1], rounded to 0 … 255"}


@final
class Latents(Output):
    """x0 is written as it is."""

    dtype = np.dtype(np.float32)

    def __call__(self, x0: Tensor) -> Tensor:
        """float32 (B, C, H, W)."""
        return x0.to("cpu", torch.float32)

    def shape(self, made: Shape) -> Shape:
        """The same."""
        return made

    def seen(self, x: Tensor) -> Tensor:
        """Their channels, −3 as black and 3 as white: autoencoders' factors bring latents to a deviation near 1."""
        return x / 3

    def protocol(self) -> dict[str, Any]:
        """That nothing was done."""
        return {"latents": "as they were sampled, float32, (N, C, H, W)"}


@final
class Decoded(Output):
    """x0 is the latent of a picture.

    Args:
        autoencoder: what decodes it.
        made: the shape of x0.

    Raises:
        InputError: when the two do not fit together.
    """

    def __init__(self, autoencoder: Autoencoder, made: Shape) -> None:
        self.autoencoder, self._shape = autoencoder, autoencoder.check(made)

    def __call__(self, x0: Tensor) -> Tensor:
        """uint8 (B, c, h, w), of the picture's shape."""
        return torch.cat([to_uint8(self.autoencoder.decode(latents)).cpu() for latents in self._some(x0)])

    def _some(self, latents: Tensor) -> Sequence[Tensor]:
        return latents.split(max(1, _AT_ONCE // (self._shape[1] * self._shape[2])))

    def shape(self, made: Shape) -> Shape:
        """The picture's."""
        return self._shape

    def seen(self, x: Tensor) -> Tensor:
        """What they are decoded to, on the CPU."""
        return torch.cat([self.autoencoder.decode(latents).cpu() for latents in self._some(x)])

    @property
    def decoded_by(self) -> str | None:
        """As the autoencoder was named."""
        return self.autoencoder.source

    def protocol(self) -> dict[str, Any]:
        """Which autoencoder decoded it, and how floats became pixels."""
        return Pixels().protocol() | {"decoder": self.autoencoder.protocol()}
