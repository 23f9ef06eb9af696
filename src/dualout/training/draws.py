"""What is random in training, as functions of the seed and the number of the sample.

Samples are counted over the whole run: sample g = (step − 1)·batch_size + its place in the batch. Its time step, its
noise and whether its class is withheld depend on (seed, g) only, as its image and mirroring do (`dualout.data.order`):
not on the process that computes it, nor on how the batch is cut into parts, nor on what came before. So any step can be
computed again.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dualout.randomness import mix
from dualout.randomness import noise as normal

_TIME, _NOISE, _LABEL, _DROPOUT = 0x74, 0x6E6F697365, 0x6C6162656C, 0x64726F70


def times(seed: int, samples: np.ndarray, steps: int) -> np.ndarray:
    """Uniform time steps in 0 … T−1, (B,) int64."""
    return (mix(seed, _TIME, samples) % np.uint64(steps)).astype(np.int64)


def noise(seed: int, samples: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, (B, C, H, W) float32."""
    return normal(mix(seed, _NOISE, samples), shape)


def withheld(seed: int, samples: np.ndarray, share: float) -> np.ndarray:
    """Which images hide their class: `share` of them, (B,) bool."""
    return mix(seed, _LABEL, samples) < np.uint64(min(int(share * 2**64), 2**64 - 1))


def dropout(seed: int, sample: int) -> int:
    """The seed of the network's own random numbers (dropout) for a part of a batch that begins with this sample."""
    return int(mix(seed, _DROPOUT, sample) >> np.uint64(1))
