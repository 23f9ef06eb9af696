"""What commands print: results to standard output, progress to standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dualout.analysis.tables import cell
from dualout.cli._processes import first
from dualout.errors import printable


class _Plain(Console):
    """A console that prints texts as they are: neither rich's markup in them is read, nor does a terminal obey them."""

    def render_str(self, text: str, **options: Any) -> Text:
        """A text, made printable."""
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """End with code 1 where the reader of the log has gone, amid work; that of results may have seen enough."""
        if self.stderr:
            super().on_broken_pipe()
        raise BrokenPipeError


out = _Plain(highlight=False, markup=False, emoji=False, soft_wrap=True)
"""Results. rich drops colour where the output is no terminal, or NO_COLOR is set."""
log = _Plain(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
"""What is going on."""


def say(text: str) -> None:
    """Log a line."""
    log.print(text)


def dry_run(options: dict[str, Any], rows: dict[str, str]) -> None:
    """Print options as YAML, --dry_run itself left out, and what to expect of them as comments below."""
    import yaml

    resolved = {name: value for name, value in options.items() if name != "dry_run"}
    out.print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).rstrip())
    for name, value in rows.items():
        out.print(f"# {name:<10} {value}")


def rate(images: float) -> str:
    """Images a second, in words."""
    return f"{images:,.0f} images/s" if images >= 10 else f"{images:.2g} images/s"


def duration(seconds: float) -> str:
    """A time, in words."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def wrote(path: Any, what: str = "") -> None:
    """Tell where something was written."""
    out.print(f"wrote {path}{f'  ({what})' if what else ''}")


@contextmanager
def progress(*columns: str) -> Iterator[Progress]:
    """A progress display with the given task fields at its end; silent where standard error is no terminal, and in all
    processes but the first, as they share one."""
    extra = [TextColumn(f"{{task.fields[{name}]}}") for name in columns]
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *extra,
        TimeElapsedColumn(), TimeRemainingColumn(), console=log, disable=not (log.is_terminal and first()),
    )  # fmt: skip
    with bar:
        yield bar


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Tell how far pieces of work are, by a function of what is done, how much, and of how much (0: unknown)."""
    with progress() as bar:
        tasks: dict[str, Any] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield told


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str], title: str | None = None) -> None:
    """Print rows as a table; on a screen too narrow for it, row by row with the columns' names."""
    if not out.is_terminal:
        # where no one looks at a screen, no digit is cut off to fit it
        out.width = 1000
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        grid.add_column(column, justify="right" if _numbers(row.get(column) for row in rows) else "left")
    for row in rows:
        grid.add_row(*(cell(row.get(column)) for column in columns))
    for padding in (1, 0):
        grid.padding = (0, padding)
        if out.measure(grid, options=out.options.update(width=1000)).maximum <= out.width:
            out.print(grid)
            return
    out.print(f"{title or ''}\n", style="table.title")
    for row in rows:
        out.print("  ".join(f"{column} {cell(row[column])}" for column in columns if row.get(column) is not None))


def _numbers(values: Iterable[Any]) -> bool:
    return all(value is None or isinstance(value, int | float) or value[:1].isdigit() for value in values)


def count(many: int, noun: str) -> str:
    """How many there are of what: 1 image, 1,797 images."""
    return f"{many:,} {noun}{'' if many == 1 else 's'}"
