"""Collect runs in one self-contained web page: curves, samples, scores, analyses, protocols.

Includes whatever is there: metrics and samples of a training, results.json of evaluations, and analyses.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from dualout.cli import console
from dualout.cli.options import parse
from dualout.errors import InputError
from dualout.files import write_text


@dataclass(kw_only=True)
class Options:
    """The options of ``dualout report``."""

    runs: list[str] = field(metadata={"positional": True})
    """Directories of runs, of results, or of several runs"""
    out: str = "report.html"
    """File to write"""
    title: str | None = None
    """Title of the page"""


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "report", arguments, __doc__)
    out = Path(options.out).expanduser()
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out is a page, such as report.html; got {options.out!r}")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no directory {out.parent}")

    from dualout.analysis.report import Material, report
    from dualout.cli._collect import collect

    runs, scores = collect(options.runs)
    material = Material(runs, scores, commands={"report": shlex.join(["dualout", "report", *arguments])})
    names = ", ".join(run.name for run in runs)
    page = report(material, options.title or f"Report on {names or 'scores'}", _lead(len(runs), len(scores)))
    write_text(out, page)
    console.wrote(out, f"{_size(out.stat().st_size)}, nothing else is needed to read it")
    return None


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"


def _lead(runs: int, scores: int) -> str:
    return f"{runs} {'model' if runs == 1 else 'models'}, {scores} {'score' if scores == 1 else 'scores'}."
