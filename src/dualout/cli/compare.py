"""Train methods at equal budget and compare them over seeds, samplers, spacings, steps and calibration.

The grid is a YAML file (--config). Models and scores that exist already are reused, so that an addition costs only its
own time and an interrupted comparison goes on. Writes table.csv and table.json (a row for each score, with its
protocol), summary.csv, summary.md and figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dualout.analysis.grid import Grid
from dualout.cli import console
from dualout.cli.options import out_directory, parse
from dualout.files import atomically, explained, portable, write_text

if TYPE_CHECKING:
    from dualout.analysis.tables import Row


@dataclass(kw_only=True)
class Options(Grid):
    """The options of ``dualout compare``."""

    out: str = "runs/compare"
    """Output directory: new, empty, or of this command"""
    dry_run: bool = False
    """Print the grid, its models and what time to expect, and stop"""


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "compare", arguments, __doc__)
    if options.dry_run:
        return _dry_run(options)
    out = out_directory(options.out, holds="comparisons", marker="results.json")
    rows, code = _done(options, out)
    if code:
        console.say("stopped: the same command goes on from there")
        return code
    _write(rows, options, out)
    return None


def _dry_run(options: Options) -> None:
    from dualout.analysis.compare import expected

    out = Path(options.out).expanduser()
    found = expected(options, out)
    rows = {
        "models": f"{found.models}, of which {found.trained} are trained already; the largest has "
        f"{found.parameters:,} parameters",
        "scores": f"{console.count(found.scores, 'set')} of {options.images:,} images, "
        f"compared by {', '.join(options.features)}",
        "fits": f"{found.calibrations} calibrations",
        "memory": f"about {found.memory / 2**20:,.0f} MiB beside the images and the libraries, to train",
        "time": f"about {console.duration(found.training)} to train and {console.duration(found.sampling)} to sample, "
        "if no score is there yet; comparing and calibrating come on top",
    }
    console.dry_run(vars(options), rows)


def _done(options: Options, out: Path) -> tuple[list[Row], int]:
    """The table, and 0; or no rows and the exit code, when a training was asked to end."""
    from dualout.analysis.compare import Doing
    from dualout.analysis.compare import run as do
    from dualout.training.interrupt import interruptible

    code = 0

    @contextmanager
    def listening(stop: Callable[[], None]) -> Iterator[None]:
        nonlocal code
        with interruptible(stop) as asked:
            yield
        code = asked.code

    with console.progress() as bar:
        task = bar.add_task("comparing", total=None)
        last = ""
        for item in do(options, out, listening):
            if code:
                # it was asked for in a training's last step
                break
            if not isinstance(item, Doing):
                return item, 0
            if item.what != last and bar.disable:
                console.say(item.what)
            last = item.what
            bar.update(task, description=item.what, completed=item.done, total=item.total)
    return [], code


def _write(rows: list[Row], options: Options, out: Path) -> None:
    from dualout.analysis.canvas import png
    from dualout.analysis.compare import chosen, markdown, summary
    from dualout.analysis.figures import scores
    from dualout.analysis.tables import csv_text, grouped, json_text

    best = chosen(rows)
    reported = [row for row in rows if row["reported"]]
    table = [{k: v for k, v in row.items() if k != "protocol"} for row in rows]
    text = markdown(best, reported, options)
    for name, content in {
        "table.json": json_text(rows),
        "table.csv": csv_text(table),
        "summary.csv": csv_text(summary(best, options.baseline or "")),
        "summary.md": text,
    }.items():
        write_text(out / name, content)
    with explained(out / "figures"):
        (out / "figures").mkdir(exist_ok=True)
    drawn = {"best": best} | grouped(reported, lambda r: r["spacing"])
    for spacing, own in drawn.items():
        for (features, sampler), of in grouped(own, lambda r: (r["features"], r["sampler"])).items():
            lines = [{**row, "method": row["method"] + (", calibrated" if row["calibrated"] else "")} for row in of]
            title = f"{sampler}, {'best spacing' if spacing == 'best' else spacing}, {features}"
            name = portable(f"{features}-{sampler}-{spacing}")
            with atomically(out / "figures" / f"{name}.png") as aside:
                aside.write_bytes(png(scores(lines, title=title)))
    shown = summary(best, options.baseline or "")
    columns = ["features", "sampler", "steps", "calibrated", "method", "spacing", "nfe", "fd", "ratio", "ratio_sd"]
    console.table(shown, columns, f"At each method's best spacing; ratios to {options.baseline}")
    for name in ("table.csv", "table.json", "summary.md", "figures"):
        console.wrote(out / name)
