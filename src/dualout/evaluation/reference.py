"""The real images that generated ones are compared with, as their features' statistics."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualout import checkpoint
from dualout.data.base import Progress
from dualout.data.dataset import Dataset, check_dataset
from dualout.errors import InputError
from dualout.evaluation.features.base import Features
from dualout.evaluation.metrics import NEIGHBOURS, Alone, scores
from dualout.evaluation.statistics import KEPT, Statistics
from dualout.files import cache_directory, explained
from dualout.networks.device import exact

_FORMAT = 2


@dataclass(frozen=True, eq=False)
class Reference:
    """A feature network, and what it makes of the real images."""

    features: Features
    statistics: Statistics
    images: dict[str, Any]
    """Which images: name, split, count, fingerprint."""
    kept_at: Path | None = None
    """Where the statistics are kept; what is found out later goes beside them."""
    device: torch.device | str = "cpu"
    """Where images are compared one by one."""
    classes: Sequence[int] = ()
    """How many of the images are of each class, where they have classes."""

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        features: Features,
        *,
        name: str | None = None,
        split: str = "all",
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        progress: Progress | None = None,
    ) -> Reference:
        """Look at all images of a dataset, or at what was kept of having done so before.

        Statistics are cached by content: a hash of the images and one of the feature network.

        Args:
            dataset: the real images.
            features: the feature network.
            name: what the data are called in the protocol; None takes the dataset's name.
            split: what part of the data they are, for the protocol.
            device: where to compute features, and to compare them.
            batch_size: how many at a time.
            progress: called with how far it is.

        Raises:
            InputError: when the features do not take such images, or there are too few of them.
        """
        check_dataset(dataset)
        check_pictures(dataset)
        features.check(dataset.channels, dataset.size)
        if len(dataset) <= NEIGHBOURS:
            raise InputError(f"a comparison needs more than {NEIGHBOURS} images, {dataset.name} has {len(dataset)}")
        path = cache_file(dataset, features)
        kept = _read(path, ("count", "limit", "mean", "scatter", "features"))
        if kept is not None:
            statistics = Statistics.from_tensors(kept)
        else:
            statistics = _measured(dataset, features, device, batch_size, progress)
            _keep(path, statistics.tensors())
        known = {
            "data": name or dataset.name,
            "split": split,
            "count": len(dataset),
            "fingerprint": dataset.fingerprint,
            "variance": float(statistics.moments[1].trace()),
        }
        counts = [] if dataset.labels is None else dataset.labels.bincount(minlength=len(dataset.classes)).tolist()
        return cls(features, statistics, known, path, exact(device), counts)

    @cached_property
    def alone(self) -> Alone:
        """What comparing asks of the real images alone, found out once for all models, and kept by content too."""
        path = self.kept_at and self.kept_at.with_suffix(f".alone{NEIGHBOURS}.safetensors")
        known = _read(path, Alone._fields) if path else None
        if known is not None:
            return Alone(**known)
        found = Alone.of(self.statistics.features.to(self.device))
        if path:
            _keep(path, found._asdict())
        return found

    def scores(self, generated: Statistics) -> dict[str, float]:
        """`fd`, `kid`, `precision` and `recall` of generated images."""
        return scores(generated, self.statistics, self.alone, self.device)

    def protocol(self) -> dict[str, Any]:
        """What the scores depend on besides the generated images."""
        return {
            "features": self.features.protocol(),
            "reference": self.images,
            "metrics": {
                "fd": "float64, unbiased covariances",
                "kid": f"unbiased MMD² with (x·y/D + 1)³, all pairs of at most {KEPT} images a side, not times 1000",
                "precision_recall": f"k = {NEIGHBOURS}, of at most {KEPT} images a side",
            },
        }


def check_pictures(dataset: Dataset) -> None:
    """Refuse real images that nothing can be compared with."""
    if dataset.latents:
        raise InputError(
            f"{dataset.name} holds latents, which are no pictures and are not compared as such: dualout evaluate "
            "compares what a model's latents are decoded to by --decode with the pictures that --data names, dualout "
            "compare by decode with pictures"
        )


def cache_file(dataset: Dataset, features: Features) -> Path:
    """Where the statistics of these images are kept."""
    content = f"{_FORMAT} {KEPT} {dataset.fingerprint} {features.fingerprint}"
    key = hashlib.sha256(content.encode()).hexdigest()[:20]
    return cache_directory() / "reference" / f"{features.name}-{key}.safetensors"


def _read(path: Path, names: Sequence[str]) -> dict[str, Tensor] | None:
    """What was kept; None where there is nothing, or it is damaged, to be found out again and written over."""
    if not path.is_file():
        return None
    try:
        tensors = checkpoint.read_tensors(path)
        return {name: tensors[name] for name in names}
    except (InputError, KeyError):
        return None


def _keep(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_tensors(path, tensors)
    except InputError as error:
        # the next evaluation computes them again
        warnings.warn(f"statistics of the real images are not kept: {error}", stacklevel=3)


def _measured(
    dataset: Dataset, features: Features, device: torch.device | str, batch_size: int, progress: Progress | None
) -> Statistics:
    statistics = Statistics()
    # of sets that are sorted by class, too, the kept ones are a fair share
    order = np.random.default_rng(0).permutation(len(dataset))
    for start in range(0, len(order), batch_size):
        statistics.add(features(dataset.batch(order[start : start + batch_size]).to(device)))
        if progress is not None:
            progress("reference", statistics.count, len(dataset))
    return statistics
