"""Metrics sent to a tracker, or nowhere: an object with the same methods either way."""

from __future__ import annotations

import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any, Protocol

from dualout.card import public
from dualout.errors import InputError, first_line, unknown
from dualout.files import write_text
from dualout.training.config import TRACKERS


class Tracker(Protocol):
    """What a run asks of a tracker."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        ...

    def finish(self) -> None:
        """Send what is left."""
        ...


class NoTracker:
    """Tracking is off."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


def check(name: str | None) -> None:
    """Refuse a tracker whose name is unknown or whose package is not installed.

    Raises:
        InputError: then.
    """
    if name is None:
        return
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    if importlib.util.find_spec(name) is None:
        raise InputError(f"--track {name} needs the package {name}: pip install 'dualout[track]'")


def start(name: str | None, directory: Path, config: dict[str, Any], step: int = 0) -> Tracker:
    """The tracker called `name`, begun; what it keeps on this machine goes below `directory`.

    Args:
        name: tensorboard, trackio or wandb, through accelerate; None is off.
        directory: of the run.
        config: the run's configuration, shown with its metrics, and of paths on this machine the last names.
        step: the run goes on from; later ones that are there already are made again.

    Raises:
        InputError: as `check`, or when the tracker does not start, say without an account.
    """
    check(name)
    if name is None:
        return NoTracker()
    from accelerate import PartialState, tracking

    # accelerate's trackers log, and its log asks which process this is
    PartialState()
    place = directory / "tracking"
    place.mkdir(exist_ok=True)
    known = place / "id"
    # by which wandb and trackio tell that it goes on; one that begins anew is another
    identity = known.read_text(encoding="utf-8") if step and known.is_file() else uuid.uuid4().hex[:8]
    if name == "tensorboard":
        tracker = tracking.TensorBoardTracker(directory.name, logging_dir=place, purge_step=step + 1)
    elif name == "wandb":
        own = os.environ.get("WANDB_RUN_ID") or identity
        tracker = tracking.WandBTracker("dualout", name=directory.name, id=own, dir=str(place), resume="allow")
    else:
        tracker = tracking.TrackioTracker("dualout", name=f"{directory.name}-{identity}", resume="allow")
    try:
        tracker.start()
    except Exception as error:
        # whatever another program says: it is not set up
        raise InputError(f"--track {name} did not start: {first_line(error)}") from error
    write_text(known, identity)
    # others may see it there, as they may a model card; train.yaml has it whole
    shown = {k: v if isinstance(v, int | float | str) else str(v) for k, v in public(config).items()}
    tracker.store_init_configuration(shown)
    return tracker
