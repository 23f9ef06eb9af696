"""Grey levels 0…255 on disk, [−1, 1] in the model: the one place where they are turned into each other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_model(images: Tensor) -> Tensor:
    """uint8 0…255 -> float32 in [−1, 1], by v / 127.5 − 1; floating tensors (latents) pass as they are."""
    if images.is_floating_point():
        return images
    return images.to(torch.float32).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [−1, 1] -> uint8 0…255, rounded to the nearest (half to even); what lies outside is clipped.

    The exact inverse of `to_model`. uint8 passes as it is; NaN becomes 0.
    """
    if images.dtype == torch.uint8:
        return images
    scaled = torch.nan_to_num(images.detach().to(torch.float32), nan=-1.0).add_(1).mul_(127.5)
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


def floats(images: np.ndarray) -> np.ndarray:
    """`to_model` for arrays: the same numbers, bit for bit, and no threads of its own."""
    if images.dtype != np.uint8:
        return images
    out = np.divide(images, np.float32(127.5), dtype=np.float32)
    out -= np.float32(1)
    return out


def quantized(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Floating values -> uint8: `black` becomes 0, `white` 255, half to even, and what lies outside is clipped."""
    scaled = (values.astype(np.float32) - np.float32(black)) * np.float32(255 / (white - black))
    return np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled).astype(np.uint8)
