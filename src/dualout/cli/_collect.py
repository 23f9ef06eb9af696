"""What lies in the directories of runs: configurations, metrics, scores, analyses, pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dualout.analysis.report import Run
from dualout.analysis.tables import Row, grouped
from dualout.checkpoint import CONFIG, entry
from dualout.cli import _study
from dualout.errors import InputError
from dualout.files import read_json
from dualout.parameterizations import Parameterization
from dualout.training.checkpoint import METRICS, read_metrics
from dualout.training.config import FREE

RESULTS, TABLE, GRIDS, ANALYSIS = "results.json", "table.json", "samples", "analysis"
_NUMBERS = ("seed", "fd", "kid", "precision", "recall", "images", "nfe", "seconds")
_WORDS = ("method", "run", "parameterization", "route", "sampler", "spacing")
_LARGEST = 8 * 2**20
_FREE = FREE | {"seed", "step", "dualout"}


def runs_in(paths: Sequence[str]) -> list[Path]:
    """The directories of runs: those given, and those right below one that is none itself.

    Raises:
        InputError: when one holds nothing to report.
    """
    found: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        if not path.is_dir():
            raise InputError(f"no directory at {text!r}; a report is made of the directories of runs")
        own = [path] if _is_run(path) else sorted(p for p in path.iterdir() if p.is_dir() and _is_run(p))
        if not own and not _scores([path], {}):
            raise InputError(
                f"{text!r} holds nothing to report: no {CONFIG}, {ANALYSIS}/ or scores in {RESULTS}, nor do "
                "directories in it"
            )
        found += [p for p in own if p not in found]
    return found


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in (CONFIG, METRICS, _study.DOCUMENT)) or (path / ANALYSIS).is_dir()


def collect(paths: Sequence[str]) -> tuple[list[Run], list[Row]]:
    """The runs below some directories, and all rows of scores in them.

    Raises:
        InputError: when there is nothing, or something is damaged.
    """
    directories = runs_in(paths)
    configs = {path: _object(path / CONFIG) for path in directories}
    names = _names(configs)
    runs = [
        Run(
            names[path],
            configs[path],
            read_metrics(path),
            _grids(path / GRIDS),
            _study.read(path / ANALYSIS) or _study.read(path),
        )
        for path in directories
    ]
    return runs, _scores([*map(Path, paths), *directories], names)


def _names(configs: Mapping[Path, Row]) -> dict[Path, str]:
    """Each run's parameterization; with its directory's name where several runs have the same one."""
    specs = {path: _spec(config) or path.name for path, config in configs.items()}
    names = {}
    for path, spec in specs.items():
        others = [p for p, s in specs.items() if s == spec]
        names[path] = spec if len(others) == 1 else f"{spec} [{path.name}]"
    return names


def _spec(config: Row) -> str | None:
    written = config.get("parameterization")
    if not isinstance(written, dict):
        return None
    try:
        return Parameterization.from_config(written).short
    except InputError:
        return str(written.get("name"))


def _scores(paths: Iterable[Path], names: Mapping[Path, str]) -> list[Row]:
    files: dict[Path, None] = {}
    for path in paths:
        for pattern in (RESULTS, f"*/{RESULTS}", f"*/*/{RESULTS}"):
            for file in sorted(path.expanduser().glob(pattern)):
                # of a comparison, whose table also says which method a row is of
                table = file.with_name(TABLE)
                files[(table if table.exists() else file).resolve()] = None
    rows: dict[str, Row] = {}
    for file in files:
        for row in score_rows(file):
            rows.setdefault(json.dumps(row, sort_keys=True), row)
    return _with_methods(list(rows.values()), names)


def score_rows(file: Path) -> list[Row]:
    """The rows of a file of scores that are reported; what an export was checked by, called alike, has none."""
    found = _parsed(file)
    if found is None or (isinstance(found, dict) and "format" in found):
        return []
    if not isinstance(found, list):
        raise InputError(f"{file} is damaged: it holds no JSON list")
    if not all(isinstance(row, dict) for row in found):
        raise InputError(f"{file} holds something else than rows of scores")
    for row in found:
        if wrong := [k for k, v in row.items() if not _fits(k, v)]:
            raise InputError(f"{file} is damaged: {wrong[0]} is {str(row[wrong[0]])[:40]!r} in a row of scores")
    # of a comparison: what its spacings were chosen by would flatter what was chosen
    return [row for row in found if row.get("reported") is not False]


def _fits(key: str, value: Any) -> bool:
    """Whether an entry of a row may be what it is."""
    if key == "steps":
        return type(value) is int and 0 < value < 2**31
    if key in _NUMBERS:
        return value is None or type(value) is float or (type(value) is int and abs(value) < 2**64)
    return key not in _WORDS or not isinstance(value, list | dict)


def _with_methods(rows: list[Row], names: Mapping[Path, str]) -> list[Row]:
    """Rows of runs that differ in more than their seed are told apart by the run's name."""
    names_of = {path.name: name for path, name in names.items()}
    settings = {path.name: _settings(_object(path / CONFIG)) for path in names}
    runs_of = grouped(rows, lambda r: r.get("parameterization"))
    found = []
    for row in rows:
        own, spec = _run_name(row), row.get("parameterization")
        if "method" in row:
            found.append(row)
            continue
        others = {_run_name(r) for r in runs_of[spec]}
        if all(settings.get(other) == settings.get(own) for other in others) and (own in settings or len(others) == 1):
            found.append(row)
        else:
            name = f"{Parameterization.shortened(str(spec))} [{own}]"
            found.append(row | {"parameterization": names_of.get(own, name)})
    return found


def _run_name(row: Row) -> str:
    return Path(str(row.get("run", ""))).name


def _settings(config: Row) -> Row:
    return {k: v for k, v in entry(config, "training").items() if k not in _FREE}


def _grids(directory: Path) -> dict[str, bytes]:
    """The last grid of samples made in training."""
    pictures = sorted(directory.glob("*.png"))[-1:] if directory.is_dir() else []
    return {p.name: p.read_bytes() for p in pictures if p.stat().st_size <= _LARGEST}


def _object(file: Path) -> Row:
    """A JSON file's object; an empty one where there is no file."""
    return read_json(file) if file.exists() else {}


def _parsed(file: Path) -> Any:
    """What a JSON file says; None where there is none."""
    return read_json(file, object) if file.exists() else None
