"""The directory of a run, which is a checkpoint that can also be trained on.

    config.json  model.safetensors  README.md     the averaged weights: what `Denoiser.from_pretrained` reads
    train.yaml                                     the configuration, for --config
    metrics.jsonl  samples/                        how it went
    state/run.json                                 what the run is: configuration, network, data
    state/step-00000500/                           all that the next step depends on

A state is written aside, flushed to disk and renamed as a whole, and the one before it is removed after that. So
whatever happens, at whatever moment, the newest complete state is there, and the run goes on from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dualout.checkpoint import read_tensors, write_tensors
from dualout.errors import InputError
from dualout.files import (
    explained,
    file_hash,
    flush,
    read_json,
    refuse_others,
    sweep,
    take_place,
    text_path,
    write_json,
    write_text,
)

STATE, RUN, LOCK, METRICS, YAML = "state", "run.json", "lock", "metrics.jsonl", "train.yaml"
_FILES = ("weights", "average", "optimizer")
_RUN = {"config": dict, "precision": str, "denoiser": dict, "data": dict}


def read_run(path: Path) -> dict[str, Any] | None:
    """What a run is; None when this is no run's directory.

    Raises:
        InputError: when it is one and is damaged.
    """
    file = path / STATE / RUN
    if not file.exists():
        return None
    run = read_json(file)
    wrong = [k for k, kind in _RUN.items() if not isinstance(run.get(k), kind)]
    if not wrong and not isinstance(run["config"].get("steps"), int):
        wrong = ["steps"]
    if wrong:
        raise InputError(f"{file} is damaged: it does not say its {', '.join(wrong)}")
    return run


def states(path: Path) -> list[tuple[int, Path]]:
    """The complete states of a run, by step, oldest first."""
    found = [(p.name.removeprefix("step-"), p) for p in (path / STATE).glob("step-*")]
    return sorted((int(number), p) for number, p in found if number.isdigit())


def read_metrics(path: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole, in order, each step once, up to step `until`."""
    rows: list[dict[str, Any]] = []
    for line in _lines(path / METRICS):
        try:
            row = json.loads(line)
        except ValueError:
            # torn by a crash: the run that is resumed writes it again
            continue
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or (until is not None and step > until) or (rows and step <= rows[-1]["step"]):
            continue
        rows.append(row)
    return rows


def _lines(file: Path) -> Iterator[str]:
    if file.exists():
        yield from file.read_text(encoding="utf-8", errors="replace").splitlines()


def read_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], Path] | None:
    """The newest state of a run: its tensors, its numbers and where it lies; None when there is none.

    Raises:
        InputError: when it is damaged.
    """
    if not (found := states(path)):
        return None
    _, place = found[-1]
    try:
        numbers = read_json(place / "state.json")
        for name, digest in numbers["sha256"].items():
            if file_hash(place / name) != digest:
                raise InputError(f"{place / name} is not as it was written")
        return {name: read_tensors(place / f"{name}.safetensors") for name in _FILES}, numbers, place
    except (InputError, OSError, KeyError, AttributeError, TypeError) as error:
        raise damaged(place, error) from error


def damaged(place: Path, error: Exception) -> InputError:
    """The error for a state that cannot be gone on from."""
    earlier = [p.name for _, p in states(place.parents[1]) if p.name < place.name]
    then = f"go on from {earlier[-1]}" if earlier else "begin anew"
    return InputError(f"the state {place} is damaged ({error}); remove that directory to {then}")


class RunDirectory:
    """The directory of one run, held by one process at a time.

    Args:
        path: new, empty, or of a run that is to go on.

    Raises:
        InputError: when it holds something else, or another process trains in it.
    """

    def __init__(self, path: str | Path) -> None:
        from filelock import FileLock, Timeout

        self.path = Path(path).expanduser()
        text_path(self.path)
        self._refuse_foreign()
        self._new = not self.path.exists()
        with explained(self.path / STATE):
            (self.path / STATE).mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / STATE / LOCK, thread_local=False)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise InputError(
                    f"another process is training in --out {self.path}: wait for it, stop it, or choose another --out"
                ) from None
            for left in (self.path / STATE).glob(".step-*"):
                shutil.rmtree(left)
        sweep(self.path)

    def _refuse_foreign(self) -> None:
        if read_run(self.path) is not None:
            return
        instead = "a run goes to a new or empty directory, or to that of an interrupted run, which it resumes"
        # a run that was killed as it began has its lock, and at most files that were being written
        refuse_others(self.path, instead, but=STATE)
        refuse_others(self.path / STATE, instead, but=LOCK)

    def close(self) -> None:
        """Let others have it."""
        self._lock.release()

    def withdraw(self) -> None:
        """Take back what the run is, where nothing came of it: it would stand in another's way."""
        own = [self.path / YAML, self.path / STATE / RUN, self.path / STATE / LOCK]
        if any(p.is_file() and p not in own for p in self.path.rglob("*")):
            return
        for file in own:
            try:
                file.unlink(missing_ok=True)
            except PermissionError:  # Windows removes nothing that is open, as the lock is
                self.close()
                file.unlink(missing_ok=True)
        within = sorted((p for p in self.path.rglob("*") if p.is_dir()), reverse=True)
        for empty in [*within, *([self.path] if self._new else [])]:
            if not any(empty.iterdir()):
                empty.rmdir()

    def describe(self, run: dict[str, Any], yaml: str) -> None:
        """Write down what the run is."""
        # what makes it a run comes first: whatever is there after a crash is then known to be its own
        if run != read_run(self.path):
            (self.path / YAML).unlink(missing_ok=True)
            write_json(self.path / STATE / RUN, run)
        if not (self.path / YAML).exists():
            write_text(self.path / YAML, yaml)

    def save(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any], keep: int) -> Path:
        """Write a state, whole or not at all, then remove all but the newest `keep`."""
        place = self.path / STATE / f"step-{numbers['step']:08d}"
        if place.exists():
            # the same step of the same run: it is what would be written
            return place
        aside = place.with_name(f".{place.name}")
        try:
            with explained(place):
                aside.mkdir()
            for name in _FILES:
                write_tensors(aside / f"{name}.safetensors", tensors[name])
            with explained(place):
                digests = {f"{name}.safetensors": file_hash(aside / f"{name}.safetensors") for name in _FILES}
            write_json(aside / "state.json", numbers | {"sha256": digests})
            with explained(place):
                take_place(aside, place)
                flush(place.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        for _, old in states(self.path)[:-keep]:
            # renamed first: what is half removed is no state
            doomed = old.with_name(f".{old.name}")
            with explained(old):
                take_place(old, doomed)
                shutil.rmtree(doomed)
        return place

    def log(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        file = self.path / METRICS
        with explained(file), file.open("ab", buffering=0) as stream:
            stream.write((json.dumps(row) + "\n").encode())

    def flush_log(self) -> None:
        """See that metrics.jsonl is on disk, before a state says that its steps are done."""
        file = self.path / METRICS
        if file.exists():
            with explained(file):
                flush(file)

    def repair_log(self, step: int) -> None:
        """Take out of metrics.jsonl what a crash tore, and the steps after `step`, which are made again."""
        file = self.path / METRICS
        text = "".join(json.dumps(row) + "\n" for row in read_metrics(self.path, until=step))
        if file.exists() and file.read_text(encoding="utf-8", errors="replace") != text:
            write_text(file, text)
