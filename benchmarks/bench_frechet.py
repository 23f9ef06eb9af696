"""What does the matrix term of the Fréchet distance cost, and is it the same number?"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from report import Goal, Section, table
from timing import Spread, digits, interleaved, ratio

from dualout.evaluation.metrics import trace_of_root, trace_of_singular_root

FEATURES = 2048


def covariance(generator: np.random.Generator, images: int) -> np.ndarray:
    """Of features whose spectrum falls, as that of networks' features does."""
    mixing = generator.normal(size=(FEATURES, FEATURES)) / FEATURES**0.5 * np.arange(1, FEATURES + 1) ** -0.5
    x = generator.normal(size=(images, FEATURES)) @ mixing.T
    return np.cov(x.T)


def measure(full: bool, peers: list[ModuleType]) -> Section:
    """At 2048 features, as Inception has: of more images than features, and of fewer."""
    from torchmetrics import __version__ as version
    from torchmetrics.image.fid import _compute_fid

    section = Section(
        "## The matrix term of the Fréchet distance\n\n"
        f"At {FEATURES} features, float64, against torchmetrics {version}: time, and by how much the distances differ."
    )
    zero = torch.zeros(FEATURES, dtype=torch.float64)
    rows = []
    for images in (10_000, 1000):
        generator = np.random.default_rng(images)
        a, b = covariance(generator, images), covariance(generator, images)
        traces = float(np.trace(a) + np.trace(b))
        ta, tb = torch.from_numpy(a), torch.from_numpy(b)
        found: dict[str, float] = {}

        def ours(a: np.ndarray = a, b: np.ndarray = b, few: bool = images <= FEATURES) -> None:
            found["ours"] = traces - 2 * (trace_of_singular_root(a, b) if few else trace_of_root(a, b)[0])  # noqa: B023

        def theirs(ta: torch.Tensor = ta, tb: torch.Tensor = tb) -> None:
            found["theirs"] = float(_compute_fid(zero, ta, zero, tb))  # noqa: B023

        cases: dict[str, Callable[[], Any]] = {"dualout": ours, "torchmetrics": theirs}
        times = interleaved(cases, rounds=5 if full else 3, warmup=1)
        section.times[f"{images} images"] = times
        gain = ratio(times, "torchmetrics", "dualout")
        section.goals.append(Goal(f"torchmetrics / dualout, {images} images", gain, 3, least=True))
        difference = abs(found["ours"] - found["theirs"]) / abs(found["ours"])
        spreads = [Spread.of(times[name]).text() for name in cases]
        rows.append([str(images), *spreads, digits(found["ours"]), f"{difference:.1e}"])
    header = ["images", "dualout, s", "torchmetrics, s", "distance", "relative difference"]
    section.tables.append(table(header, rows))
    return section
