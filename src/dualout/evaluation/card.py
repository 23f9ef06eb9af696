"""Scores on the model card of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualout import checkpoint
from dualout.card import render
from dualout.evaluation.scoring import OPTIONAL
from dualout.files import write_json, write_text

_SETTINGS = ("route", "sampler", "spacing", "steps", "nfe", "seed", "features", "images")
_OPTIONAL = ("calibrated", *OPTIONAL)
_SCORES = ("fd", "kid", "precision", "recall")


def put_on_card(run: str | Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows of scores into a checkpoint's README.md, in place of those of the same settings.

    Args:
        run: a directory.
        rows: as `Scoring.rows` makes them.

    Returns:
        the README.md.
    """
    directory = checkpoint.locate(run)
    config = checkpoint.read_config(directory)
    card = checkpoint.read_card(config)
    fresh = [_line(row) for row in rows]
    card["metrics"] = [old for old in card.get("metrics", []) if not any(_same(old, new) for new in fresh)] + fresh
    config["card"] = card
    write_text(directory / checkpoint.CARD, render(config))
    write_json(directory / checkpoint.CONFIG, config)
    return directory / checkpoint.CARD


def _line(row: dict[str, Any]) -> dict[str, Any]:
    """A row for people: scores rounded, and of the protocol what tells numbers apart."""
    # a guidance of 0 is one, too: by no class
    optional = {k: row[k] for k in _OPTIONAL if row.get(k) is not None and row[k] is not False}
    set_as = {k: row[k] for k in _SETTINGS} | optional
    reference = row["protocol"]["reference"]
    against = {"reference": f"{reference['count']} of {reference['data']} ({reference['split']})"}
    return set_as | {k: float(f"{row[k]:.4g}") for k in _SCORES} | against


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a.get(k) == b.get(k) for k in (*_SETTINGS, *_OPTIONAL) if k not in ("nfe", "images"))
