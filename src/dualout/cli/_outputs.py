"""What other commands than train wrote in a directory, in a few lines: images, scores, an analysis, calibrations."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from dualout.analysis.tables import Row, grouped
from dualout.calibrated import DIRECTORY
from dualout.checkpoint import entry
from dualout.cli import _study
from dualout.cli._collect import RESULTS, TABLE, score_rows
from dualout.errors import InputError
from dualout.evaluation.stores import PROTOCOL, STORES
from dualout.files import read_json
from dualout.parameterizations import Parameterization
from dualout.samplers import Sampler

_NAMES = ("method", "parameterization")
_HOW = ("route", "sampler", "spacing", "steps", "guidance", "calibrated", "seed", "fd")


def summary(path: Path) -> dict[str, Any] | None:
    """What `dualout info` tells of a directory; None when no command's results are there.

    Raises:
        InputError: when they are damaged.
    """
    return next((found for told in (_scores, _analysis, _images, _calibrations) if (found := told(path))), None)


def _scores(path: Path) -> dict[str, Any] | None:
    file = next((path / name for name in (TABLE, RESULTS) if (path / name).is_file()), None)
    # an export's record of its check has the same name
    if file is None or isinstance(read_json(file, object), dict):
        return None
    rows, models = score_rows(file), (path / "models").is_dir()
    head: Row = {"directory": str(path), "written": _when(file)}
    if models and file.name == RESULTS:
        head["state"] = "not finished, goes on with the same command"
    head |= {"rows": len(rows), "models": _several(next((row[n] for n in _NAMES if n in row), "?") for row in rows)}
    real = (entry(entry(row, "protocol"), "reference") for row in rows)
    head["against"] = _several(f"{of.get('data')} ({of.get('split')})" for of in real)
    # scores of other features, or of another number of images, are other numbers
    groups = grouped(rows, lambda row: (str(row.get("features")), row.get("images")))
    best = [min(scored, key=lambda row: row["fd"]) for own in groups.values() if (scored := list(filter(_scored, own)))]
    named = ("run",) * (not models and len({row.get("run") for row in rows}) > 1)
    columns = [name for name in ("features", "images", *named, *_NAMES, *_HOW) if any(name in row for row in best)]
    found: dict[str, Any] = {"comparison" if models else "scores": head}
    return found | {"lowest fd": [{name: row.get(name) for name in columns} for row in best]}


def _scored(row: Row) -> bool:
    return row.get("fd") is not None and isfinite(row["fd"])


def _analysis(path: Path) -> dict[str, Any] | None:
    protocol, document = path / _study.PROTOCOL, path / _study.DOCUMENT
    told = read_json(protocol) if protocol.is_file() else {}
    if "repeats" not in told:
        return None
    done = document.is_file()
    return {
        "analysis": {
            "directory": str(path),
            "written": _when(document if done else protocol),
            "state": f"finished, {len(list(path.glob('*.csv')))} tables" if done else "not finished: make it again",
            "model": _model(told),
            "real images": f"{told.get('images')} of {told.get('data')}",
            "made images": f"{told.get('samples')} by {told.get('sampler')}, seeds {told.get('seeds')}",
        }
    }


def _images(path: Path) -> dict[str, Any] | None:
    protocol = path / PROTOCOL
    told = read_json(protocol) if protocol.is_file() else {}
    store, count, seed = (told.get(name) for name in ("format", "images", "seed"))
    if store not in STORES or type(count) is not int or type(seed) is not int:
        return None
    whole = (path / "images.npz").is_file() if store == "npz" else len(list(path.glob("[0-9]*.png"))) >= count
    found: Row = {
        "directory": str(path),
        "written": _when(protocol),
        "state": f"{count:,} {'images' if count > 1 else 'image'}, {store}"
        + ("" if whole else ": not all there yet, goes on with the same command"),
        "model": _model(told),
        "sampler": Sampler.from_config(entry(told, "sampler")).spec,
        "route": told.get("route"),
        "seeds": f"{seed} … {seed + count - 1}",
        "classes": told.get("class_labels"),
        "guidance": told.get("guidance"),
    }
    return {"images": {name: value for name, value in found.items() if value is not None}}


def _calibrations(path: Path) -> dict[str, Any] | None:
    if path.name != DIRECTORY:
        return None
    rows = []
    for file in sorted(path.glob("*.json")):
        told = read_json(file)
        protocol = entry(told, "protocol")
        rows.append(
            {
                "file": file.name,
                "sampler": Sampler.from_config(entry(told, "sampler")).spec,
                "distance": protocol.get("held_out_before"),
                "calibrated": protocol.get("held_out_after"),
                "data": entry(protocol, "data").get("name"),
                "written": _when(file),
            }
        )
    return {"calibrations": rows} if rows else None


def _model(told: Mapping[str, Any]) -> str:
    model = entry(told, "model")
    try:
        name = Parameterization.from_config(model["parameterization"]).short
        return f"{model.get('run', model.get('name'))} ({name})"
    except (InputError, KeyError):
        return str(model.get("name"))


def _several(names: Iterable[Any]) -> str:
    found = list(dict.fromkeys(map(str, names)))
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")


def _when(file: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
