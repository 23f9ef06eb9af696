"""Writes what was measured: a section of docs/results/performance.md a question, and all numbers as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from timing import Spread, Times


@dataclass
class Goal:
    """A ratio that is to be reached."""

    what: str
    ratio: Spread
    limit: float
    least: bool = False
    """Whether the limit is the least, not the most, that is good."""

    @property
    def reached(self) -> bool:
        """Whether the median is on the right side."""
        return self.ratio.median >= self.limit if self.least else self.ratio.median <= self.limit

    def row(self) -> list[str]:
        """Its line in the table."""
        sign = "≥" if self.least else "≤"
        return [self.what, self.ratio.text(), f"{sign} {self.limit:.2g}", "yes" if self.reached else "**no**"]


@dataclass
class Section:
    """The answer to one question."""

    question: str
    goals: list[Goal] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    """In Markdown."""
    times: dict[str, Times] = field(default_factory=dict)
    """Seconds of each round, by table and case."""

    def text(self) -> str:
        """In Markdown, ratios first."""
        goals = [table(["ratio", "median [min..max]", "goal", "reached"], [g.row() for g in self.goals])]
        return "\n\n".join([self.question, *(goals if self.goals else []), *self.tables])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(directory: Path, name: str, section: Section, how: dict[str, str]) -> None:
    """Put a section where its markers are in performance.md, or at its end, and its numbers into performance.json.

    Args:
        directory: of both.
        name: of the section.
        section: what was measured.
        how: the command, the machine, the date: by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    page, numbers = directory / "performance.md", directory / "performance.json"
    begin, end = f"<!-- measured: {name} -->", f"<!-- /measured: {name} -->"
    told = "; ".join(f"{key}: {value}" for key, value in how.items())
    block = f"{begin}\n{section.text()}\n\n<sub>{told}</sub>\n{end}"
    before = page.read_text(encoding="utf-8") if page.exists() else "# Performance\n"
    there = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    after = there.sub(lambda _: block, before) if there.search(before) else f"{before.rstrip()}\n\n{block}\n"
    page.write_text(after, encoding="utf-8")
    known: dict[str, Any] = json.loads(numbers.read_text(encoding="utf-8")) if numbers.exists() else {}
    goals = [asdict(g) | {"ratio": g.ratio._asdict(), "reached": g.reached} for g in section.goals]
    rounded = {t: {case: [float(f"{x:.4g}") for x in v] for case, v in ts.items()} for t, ts in section.times.items()}
    known[name] = {"how": how, "goals": goals, "seconds": rounded}
    numbers.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
