"""In which order images are seen, as a function of (seed, global sample index) alone.

Training sees samples g = 0, 1, 2, …; with n images, sample g belongs to epoch g // n and is image π(g mod n), where π
is a permutation keyed by (seed, epoch). Nothing is stored and nothing drawn in advance: any g can be asked for at any
time, by any process, and an epoch of 10⁹ images starts as fast as one of ten.

π is a Feistel network over pairs of digits base a = ⌈√n⌉ (Luby & Rackoff 1988), (l, r) -> (r, l + F(r) mod a), walked
on from numbers ≥ n until it lands below n (Black & Rogaway 2002), which happens at once for nearly all.
"""

from __future__ import annotations

import math

import numpy as np

from dualout.randomness import mix

ROUNDS = 6
_ORDER, _FLIP = 0x6F72646572, 0x666C6970


def indices(seed: int, n: int, start: int, count: int) -> np.ndarray:
    """The images of samples start … start + count − 1, int64 (count,), each in 0 … n − 1.

    Args:
        seed: of the order.
        n: how many images there are.
        start: the first global sample index.
        count: how many samples.
    """
    if n < 1 or start < 0 or count < 0:
        raise ValueError(f"Must have n >= 1, start >= 0 and count >= 0, got n={n}, start={start}, count={count}")
    samples = np.arange(start, start + count, dtype=np.int64)
    epochs, positions = np.divmod(samples, n)
    epochs -= start // n
    distinct = np.arange(start // n, start // n + (int(epochs[-1]) if count else 0) + 1)
    keys = np.stack([mix(seed, _ORDER, distinct, r) for r in range(ROUNDS)])
    base = math.isqrt(n - 1) + 1
    found = _feistel(positions, keys[:, epochs], base)
    outside = np.flatnonzero(found >= n)
    while len(outside):
        found[outside] = _feistel(found[outside], keys[:, epochs[outside]], base)
        outside = outside[found[outside] >= n]
    return found


def _feistel(x: np.ndarray, keys: np.ndarray, base: int) -> np.ndarray:
    left, right = np.divmod(x, base)
    for key in keys:
        scrambled = (mix(0, key + right.astype(np.uint64)) % np.uint64(base)).astype(np.int64)
        left, right = right, (left + scrambled) % base
    return left * base + right


def flips(seed: int, samples: np.ndarray) -> np.ndarray:
    """Whether samples are mirrored left to right, bool, one for each global sample index."""
    return (mix(seed, _FLIP, samples) >> np.uint64(63)).astype(bool)
