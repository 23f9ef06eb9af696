"""One self-contained web page: nothing in it is fetched from anywhere.

Blocks are strings of HTML, made by the functions here, which escape whatever they are given.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from dualout.analysis.tables import Row, cell, columns
from dualout.version import __version__


class Section(NamedTuple):
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[str]


def page(title: str, lead: str, verdict: Sequence[str], sections: Iterable[Section]) -> str:
    """The whole page.

    Args:
        title: of the page.
        lead: a sentence under it.
        verdict: paragraphs that say what was found, before everything else.
        sections: empty blocks are left out, and so are those without any other.
    """
    present = [Section(s.title, blocks) for s in sections if (blocks := [b for b in s.blocks if b])]
    links = [f'<a href="#{_anchor(s.title)}">{text(s.title)}</a>' for s in present]
    body = [f"<h1>{text(title)}</h1>", f'<p class="lead">{text(lead)}</p>']
    if verdict:
        body.append(f'<div class="verdict">{"".join(f"<p>{text(v)}</p>" for v in verdict)}</div>')
    body.append(f"<nav>{''.join(links)}</nav>")
    for s in present:
        body += [f'<section id="{_anchor(s.title)}">', f"<h2>{text(s.title)}</h2>", *s.blocks, "</section>"]
    body.append(f"<footer>Made with dualout {__version__}.</footer>")
    css = importlib.resources.files("dualout.analysis").joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{css}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def text(value: str) -> str:
    """Plain text, escaped; `code` and **strong** are marked as in Markdown."""
    escaped = html.escape(value)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)


def paragraphs(*sentences: str) -> str:
    """One paragraph each."""
    return "".join(f"<p>{text(s)}</p>" for s in sentences if s)


def bullets(items: Sequence[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{text(i)}</li>' for i in items)}</ul>" if items else ""


def heading(title: str) -> str:
    """A heading within a section."""
    return f"<h3>{text(title)}</h3>"


def code(lines: str) -> str:
    """Commands, as typed."""
    return f"<pre>{html.escape(lines)}</pre>"


def figure(svg: str, caption: str = "") -> str:
    """A drawing, made by `canvas.svg`."""
    return f"<figure>{svg}{_caption(caption)}</figure>"


def picture(png: bytes, what: str, caption: str = "") -> str:
    """A picture, given as a PNG file; `what` is for those who cannot see it."""
    data = base64.b64encode(png).decode()
    return f'<figure><img alt="{html.escape(what)}" src="data:image/png;base64,{data}">{_caption(caption)}</figure>'


def figures(items: Sequence[str], *, wide: bool = False) -> str:
    """Figures beside each other, three where they fit; two where that fills the rows, or they are `wide`."""
    two = wide or len(items) in (2, 4)
    return f'<div class="figures{" wide" if two else ""}">{"".join(items)}</div>' if items else ""


def details(summary: str, *blocks: str) -> str:
    """What is only shown when it is asked for."""
    return f"<details><summary>{text(summary)}</summary>{''.join(blocks)}</details>"


def table(
    rows: Sequence[Row],
    names: Mapping[str, str] | Sequence[str] | None = None,
    style: Callable[[Row, str], str] | None = None,
    group: str | None = None,
) -> str:
    """Rows as a table.

    Args:
        rows: the rows.
        names: the columns to show and what they are called; all of them when None.
        style: gives the class of a cell: "best", "good", "bad" or nothing.
        group: a column whose value stands above the rows that share it.
    """
    shown = dict(names) if isinstance(names, Mapping) else {n: n for n in (names or columns(rows))}
    words = {n: any(isinstance(r.get(n), str) and not _NUMBER.match(r[n]) for r in rows) for n in shown}
    head = "".join(f"<th{' class=text' if words[n] else ''}>{text(label)}</th>" for n, label in shown.items())
    lines, last = [], object()
    for row in rows:
        cells = []
        for n in shown:
            classes = " ".join(c for c in ("text" if words[n] else "", style(row, n) if style else "") if c)
            attribute = f' class="{classes}"' if classes else ""
            cells.append(f"<td{attribute}>{text(cell(row.get(n)))}</td>")
        if group is not None and row.get(group) != last:
            last = row.get(group)
            lines.append(f'<tr class="group"><th class="text" colspan="{len(shown)}">{text(cell(last))}</th></tr>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ± [\d.,]+(e[-+]?\d+)?)?$")


def _caption(caption: str) -> str:
    return f"<figcaption>{text(caption)}</figcaption>" if caption else ""


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
