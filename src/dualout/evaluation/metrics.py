"""Distances between two sets of images, from their features.

| metric | is | for equal sets |
|---|---|---|
| `fd` | Fréchet distance of two Gaussians: |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·√(Σ₁Σ₂)); FID with Inception features | 0 |
| `kid` | squared maximum mean discrepancy with the kernel (x·y/D + 1)³, unbiased | 0 on average |
| `precision` | share of the generated images that lie among the real ones | near 1 |
| `recall` | share of the real images that lie among the generated ones | near 1 |

FD: Heusel et al. 2017, arXiv 1706.08500, equation 6. KID: Bińkowski et al. 2018, arXiv 1801.01401, section 4. Precision
and recall: Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualout.errors import InputError
from dualout.evaluation.statistics import Statistics

NEIGHBOURS = 3
"""k: an image lies among others when it is nearer to one of them than that one's k-th neighbour."""
TOLERANCE = 1e-6
"""By what share of itself rounding may change FD."""
_SURE = 1000
"""How many times the error that is estimated of eigenvalues is reckoned with; up to 45 times were met."""
ROUNDING = 1e-7
"""How far apart, in units of the longest feature vector, two images are taken for the same one."""
_ROWS = 1024
"""Of the matrix of all pairs, at a time: 80 MB where the other set has 10,000 images."""


class Alone(NamedTuple):
    """What a comparison needs of one set whatever the other is, found once for all others."""

    reach: Tensor
    """How far each image's surroundings reach: the distance to its k-th neighbour, float64 (N,)."""
    kernel: Tensor
    """KID's kernel, its mean over the pairs of different images: float64, no dimensions."""

    @classmethod
    def of(cls, features: Tensor, k: int = NEIGHBOURS) -> Alone:
        """Look at the features of a set, (N, D), where they are.

        Raises:
            InputError: when there are not more than k.
        """
        return cls(_reach(features, k).cpu(), torch.tensor(_kernel_within(features), dtype=torch.float64))


def scores(
    generated: Statistics, real: Statistics, alone: Alone | None = None, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """`fd`, `kid`, `precision` and `recall` of generated images against real ones.

    Args:
        generated: of the generated images.
        real: of the real ones.
        alone: what is known of the real ones' features; None finds it out.
        device: where images are compared one by one, which is all pairs of them; it has float64.
    """
    made, given = generated.features.to(device), real.features.to(device)
    alone = Alone.of(given) if alone is None else alone
    precision, recall = precision_recall(made, given, reach=alone.reach)
    return {
        "fd": frechet(generated, real),
        "kid": kid(made, given, float(alone.kernel)),
        "precision": precision,
        "recall": recall,
    }


def frechet(a: Statistics, b: Statistics) -> float:
    """The Fréchet distance between the Gaussians of two sets; 0 for equal ones.

    Also where covariances are singular, because there are fewer images than features or some features never change.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a.moments, b.moments
    _check_features(mean_a, mean_b)
    enough = min(a.count, b.count) > len(mean_a)
    apart = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace())
    root, error = trace_of_root(cov_a.numpy(), cov_b.numpy()) if enough else (0.0, math.inf)
    if not 2 * error <= TOLERANCE * (apart - 2 * root):
        root = trace_of_singular_root(cov_a.numpy(), cov_b.numpy())
    # rounding leaves equal sets a little off 0, on either side
    return max(apart - 2 * root, 0.0)


def trace_of_root(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """tr √(A·B) of symmetric positive definite matrices (D, D), and how far off it may be.

    √A·B·√A is symmetric and has the eigenvalues of A·B, and so has Lᵀ·A·L with B = L·Lᵀ, which LAPACK's sygst makes
    from A and the Cholesky factor in half of the operations of two products. L is of the pivoted decomposition, so that
    Lᵀ·A·L falls off from its first entries to its last, and its small eigenvalues outlive the rounding of the large
    ones. They are left to torch: with the library that it is built with they take half of scipy's time.

    Their product is det A · det B, which the Cholesky factors tell as well: where errors of the eigenvalues are alike,
    the sum of their roots is off by √(Σ λ⁻¹ / Σ λ⁻²) / 2 times what the sum of their logarithms is off by. The error is
    infinite where A or B is singular to working precision.
    """
    from scipy.linalg import get_lapack_funcs

    cholesky, pivoted_cholesky, congruent = get_lapack_funcs(("potrf", "pstrf", "sygst"), (a, b))
    lower_b, pivots, rank, _ = pivoted_cholesky(b, lower=1)
    if rank < len(b):
        return 0.0, math.inf
    a = a[np.ix_(pivots - 1, pivots - 1)]
    lower_a, failed = cholesky(a, lower=1)
    if failed:
        return 0.0, math.inf
    lower, _ = congruent(a, lower_b, itype=2, lower=1)
    values = torch.linalg.eigvalsh(torch.from_numpy(lower), UPLO="L").numpy()
    if values[0] <= 0:
        return 0.0, math.inf
    off = np.log(values).sum() - 2 * np.log(lower_a.diagonal() * lower_b.diagonal()).sum()
    inverse = values[0] / values
    error = _SURE * abs(off) * math.sqrt(values[0] * inverse.sum() / np.square(inverse).sum()) / 2
    return float(np.sqrt(values).sum()), float(error)


def trace_of_singular_root(a: np.ndarray, b: np.ndarray) -> float:
    """tr √(A·B) of symmetric positive semi-definite matrices (D, D), singular or not.

    With A = L_a·L_aᵀ and B = L_b·L_bᵀ taken down to their ranks it is the sum of the singular values of L_aᵀ·L_b, which
    are the roots themselves: no root is taken of a rounding error.
    """
    product = torch.from_numpy(_factor(a).T @ _factor(b))
    return float(torch.linalg.svdvals(product).sum()) if product.numel() else 0.0


def _factor(matrix: np.ndarray) -> np.ndarray:
    """L (D, rank) with L·Lᵀ = matrix."""
    from scipy.linalg import get_lapack_funcs

    if not matrix.any():
        return matrix[:, :0]
    (pivoted_cholesky,) = get_lapack_funcs(("pstrf",), (matrix,))
    lower, pivots, rank, _ = pivoted_cholesky(matrix, lower=1)
    factor = np.empty((len(matrix), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor


def kid(x: Tensor, y: Tensor, within_y: float | None = None) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy, over all pairs of x (N, D) and y (M, D).

    The usual KID is the mean of this over random subsets; all pairs at once have the same expectation, less variance
    and no random numbers. It is not multiplied by 1000.

    Args:
        x: the features of one set.
        y: of the other.
        within_y: the kernel's mean over the pairs of y, where it is known.
    """
    _check_features(x, y)
    if min(len(x), len(y)) < 2:
        raise InputError(f"KID needs at least 2 images on each side, got {len(x)} and {len(y)}")
    within_y = _kernel_within(y) if within_y is None else within_y
    return _kernel_within(x) + within_y - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _kernel_within(x: Tensor) -> float:
    """The kernel's mean over the pairs of different rows."""
    diagonal = float((x.double().square().sum(1) / x.shape[1] + 1).pow(3).sum())
    return (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    y = y.double()
    return sum(float((rows.double() @ y.T / x.shape[1] + 1).pow_(3).sum()) for rows in x.split(_ROWS))


def precision_recall(
    generated: Tensor, real: Tensor, k: int = NEIGHBOURS, reach: Tensor | None = None
) -> tuple[float, float]:
    """Precision and recall of generated features (N, D) against real ones (M, D).

    Args:
        generated: their features.
        real: the others'.
        k: how many neighbours an image's surroundings reach to.
        reach: of the real ones, (M,), where it is known.
    """
    _check_features(generated, real)
    reach_g, reach_r = _reach(generated, k), _reach(real, k) if reach is None else reach.to(real.device)
    # among images that are there more than k times the reach is 0, and what rounding leaves of a distance of 0 is not
    near = ROUNDING * max(float(x.double().norm(dim=1).max()) for x in (generated, real))
    among_real, among_generated = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for distances, own in zip(_distances(generated, real), (reach_g + near).split(_ROWS), strict=True):
        among_real.append((distances <= reach_r + near).any(1))
        among_generated |= (distances <= own[:, None]).any(0)
    return float(torch.cat(among_real).double().mean()), float(among_generated.double().mean())


def _check_features(a: Tensor, b: Tensor) -> None:
    for x in (a, b):
        if not isinstance(x, Tensor):
            raise InputError(f"features are tensors, (N, D), say torch.from_numpy(x); got {type(x).__name__}")
    if a.shape[-1] != b.shape[-1]:
        got = f"{a.shape[-1]} and {b.shape[-1]}"
        raise InputError(f"features of two sets are compared where one network made both; got lengths {got}")


def _reach(features: Tensor, k: int) -> Tensor:
    """The distance of each image to its k-th neighbour among the others, float64 (N,)."""
    if k < 1 or len(features) <= k:
        raise InputError(
            f"precision and recall look at {k} neighbours of every image: that is 1 or more, and there must be more "
            f"images than that on each side; got {len(features)}"
        )
    reach = []
    for i, distances in enumerate(_distances(features, features)):
        distances.diagonal(i * _ROWS).fill_(math.inf)
        reach.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(reach)


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The distances of x (N, D) to y (M, D), float64, in blocks of rows."""
    y = y.double()
    for rows in x.split(_ROWS):
        yield torch.cdist(rows.double(), y, compute_mode="use_mm_for_euclid_dist")
