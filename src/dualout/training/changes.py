"""What may not change when a run goes on: its settings, its images and its network."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from dualout.errors import InputError, cut
from dualout.training.config import TrainConfig


def refuse_changes(path: Path, known: dict[str, Any], config: TrainConfig) -> None:
    """Refuse to go on with a run in another way than it began.

    Args:
        path: of the run.
        known: what it is.
        config: what is asked of it now.
    """
    differences = TrainConfig.fromdict(known["config"]).differences(config)
    # where the images lie may change: once they are loaded it shows whether they are the same
    differences.pop("data", None)
    if differences:
        listed = ", ".join(f"{k} {cut(old, 60)} → {cut(new, 60)}" for k, (old, new) in differences.items())
        raise InputError(
            f"--out {path} is a run with other settings: {listed}. Give it the old ones to go on, or another --out; "
            f"--init {shlex.quote(str(path))} starts another run from its weights"
        )


def refuse_other_images(path: Path, known: dict[str, Any], data: str, images: dict[str, Any]) -> None:
    """Refuse to go on with other images.

    Args:
        path: of the run.
        known: what it is.
        data: where the images are now.
        images: what they are known again by.
    """
    if known["data"] != images:
        old = known["config"].get("data")
        moved = "" if old == data else f"data {old} → {data}, "
        raise InputError(
            f"--out {path} began with other images: {moved}{_first_difference(known['data'], images)}; take another "
            "--out"
        )


def refuse_other_source(path: Path, known: dict[str, Any], source: str, fingerprint: str) -> None:
    """Refuse to go on with an upgrade of another model.

    Args:
        path: of the upgrade.
        known: what it is.
        source: where the model is now.
        fingerprint: what it is known again by.
    """
    if known["source"] not in (None, fingerprint):
        old = known["config"]["source"]
        what = f"the weights of {source} have changed" if old == source else f"{source} has other weights than {old}"
        raise InputError(f"--out {path} began with another source: {what}; take another --out")


def refuse_other_network(path: Path, known: dict[str, Any], described: dict[str, Any]) -> None:
    """Refuse to go on with a run with another network, as it is described now."""
    if known["denoiser"] != described:
        raise InputError(
            f"--out {path} is a run with another network: {_first_difference(known['denoiser'], described)}; take "
            "another --out"
        )


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    key = next(k for k in {**old, **new} if old.get(k) != new.get(k))
    return f"{key} {cut(old.get(key), 60)} → {cut(new.get(key), 60)}"
