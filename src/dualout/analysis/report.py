"""The report: one web page of whatever is known about some runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dualout.analysis import canvas, figures, page, reading
from dualout.analysis.page import Section
from dualout.analysis.study import Drawing, Study, together
from dualout.analysis.tables import Row, grouped

METRICS = {"fd": "FD", "kid": "KID", "precision": "precision", "recall": "recall", "nfe": "NFE", "seconds": "seconds"}


@dataclass(frozen=True)
class Run:
    """What is known of one model.

    Attributes:
        name: what it is called in the report.
        config: its config.json; empty when there is none.
        metrics: of its training, one row every few steps.
        grids: pictures made in training, PNG files by name.
        study: what `analyze` found.
    """

    name: str
    config: Row = field(default_factory=dict)
    metrics: Sequence[Row] = ()
    grids: Mapping[str, bytes] = field(default_factory=dict)
    study: Study | None = None


@dataclass(frozen=True)
class Material:
    """All that goes into a report; what is empty is left out.

    Attributes:
        runs: the models.
        scores: rows of results.json, over all models.
        samples: sets of images from the same seeds by what made them, uint8 (N, H, W, C).
        samples_note: how they were made.
        commands: what makes each part again, by section: "scores", "samples", "analysis", "training", "report".
    """

    runs: Sequence[Run]
    scores: Sequence[Row] = ()
    samples: Mapping[str, np.ndarray] = field(default_factory=dict)
    samples_note: str = ""
    commands: Mapping[str, str] = field(default_factory=dict)


def report(material: Material, title: str, lead: str = "") -> str:
    """The page, as HTML that fetches nothing."""
    scores = reading.named(material.scores)
    judged = _judged(scores)
    first = next(iter(judged.values()), [])
    studies = {r.name: r.study for r in material.runs if r.study is not None}
    verdict = reading.verdict(first, list(studies.values()))
    sections = [
        Section("Scores", _scores(judged, material.commands.get("scores", ""))),
        Section("Samples", _samples(material)),
        *(Section(f"Inside {name}", _inside(study, name)) for name, study in studies.items() if study.dual),
        Section("From noise to image", _films(studies)),
        Section("On the way", _way(studies, material.commands.get("analysis", ""))),
        Section("Training", _training(material.runs, material.commands.get("training", ""))),
        Section("Protocols", _protocols(material, scores)),
    ]
    return page.page(title, lead, verdict, sections)


def features_of(row: Row) -> str:
    """The feature network of a row of results."""
    protocol = row.get("protocol")
    found = row.get("features") or (protocol.get("features") if isinstance(protocol, dict) else None) or "features"
    return str(found.get("name", found) if isinstance(found, dict) else found)


def _judged(scores: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that compare with each other, by features and, where it is not the same for all, number of images: a
    Fréchet distance falls as they grow. The largest number comes first."""
    found: dict[str, list[Row]] = {}
    for features, rows in grouped(scores, features_of).items():
        by_count = sorted(grouped(rows, lambda r: r.get("images") or 0).items(), reverse=True)
        found |= {features if len(by_count) == 1 else f"{features}, {n} images": own for n, own in by_count}
    return found


def _scores(judged: Mapping[str, Sequence[Row]], command: str) -> list[str]:
    blocks = []
    for judge, rows in judged.items():
        if len(judged) > 1:
            blocks.append(page.heading(f"Features: {judge}"))
        several = len({r["method"] for r in rows}) > 1
        findings = reading.compare(rows) if several else []
        # the first sentence stands above everything
        blocks.append(page.bullets(findings if blocks else findings[1:]))
        blocks.append(comparison(rows, features_of(rows[0])))
        blocks.append(page.figures(_score_figures(rows, judge)))
    return [*blocks, _again("Make the scores again", command)] if blocks else []


def comparison(rows: Sequence[Row], features: str) -> str:
    """Fréchet distances side by side, and their ratios."""
    table = reading.cells(rows)
    methods = reading.methods_of(rows)
    ratios = [reading.ratio_name(methods[0], other) for other in methods[1:]]
    shown = []
    for row in table:
        spreads = row["spreads"]
        best = min((s.mean for s in spreads.values()), default=None)
        texts = {m: reading.spread_text(s) for m, s in spreads.items()}
        marks = {m: "best" for m, s in spreads.items() if len(spreads) > 1 and s.mean == best}
        marks |= {
            r: "good" if row[r] < 1 - reading.EVEN else "bad" if row[r] > 1 + reading.EVEN else ""
            for r in ratios
            if r in row
        }
        numbers = {r: f"{row[r]:.2f}" for r in ratios if r in row}
        group = {"group": f"{row['sampler']}, {row['spacing']} spacing", "marks": marks}
        shown.append({"steps": row["steps"]} | texts | numbers | group)
    names = {"steps": "steps"} | {name: name for name in (*methods, *ratios)}
    table_html = page.table(shown, names, lambda row, column: row["marks"].get(column, ""), "group")
    return page.paragraphs(f"Fréchet distance in the features `{features}`, lower is better:") + table_html


def _score_figures(rows: Sequence[Row], judge: str) -> list[str]:
    if len({r["steps"] for r in rows}) < 2:
        return []
    known = [r["fd"] for r in rows if r.get("fd") and math.isfinite(r["fd"])]
    limits = (0.8 * min(known), 1.25 * max(known)) if known else None
    found = []
    for k, ((sampler, spacing), own) in enumerate(
        sorted(grouped(rows, lambda r: (r["sampler"], r["spacing"])).items(), key=str)
    ):
        name = f"fd-{_word(judge)}-{k}"
        title = f"{sampler}, {spacing} spacing"
        found.append(
            page.figure(canvas.svg(figures.scores(own, "fd", title, limits), name, f"FD against steps, {title}"))
        )
    return found


def _samples(material: Material) -> list[str]:
    if not material.samples:
        return []
    shown = [
        page.picture(canvas.png_of(canvas.tiles(images, min(8, len(images))), 4), f"samples of {name}", name)
        for name, images in material.samples.items()
    ]
    return [
        page.paragraphs(material.samples_note),
        page.figures(shown, wide=True),
        _again("Make the samples again", material.commands.get("samples", "")),
    ]


def _again(title: str, command: str) -> str:
    """The command that makes something again, folded away; nothing where it is not known."""
    return page.details(title, page.code(command)) if command else ""


def _inside(study: Study, name: str) -> list[str]:
    return [page.bullets(reading.ratio(study)), page.figures(_drawn(study.inside(), name))]


def _films(studies: Mapping[str, Study]) -> list[str]:
    films = [
        page.figure(canvas.svg(d.figure, f"{_word(name)}-film", f"{d.title}, {name}"), f"**{name}.** {d.caption}")
        for name, study in studies.items()
        for d in study.film()
    ]
    return [page.figures(films, wide=True)]


def _way(studies: Mapping[str, Study], command: str) -> list[str]:
    if not studies:
        return []
    return [
        page.bullets(reading.paths(studies)),
        page.figures(_drawn(together(studies), "together")),
        _again("Make the analysis again", command),
    ]


def _drawn(drawings: Sequence[Drawing], prefix: str) -> list[str]:
    return [
        page.figure(canvas.svg(d.figure, f"{_word(prefix)}-{d.name}", d.title), f"**{d.title}.** {d.caption}")
        for d in drawings
    ]


def _training(runs: Sequence[Run], command: str) -> list[str]:
    drawn, grids = [], []
    for run in runs:
        if len(run.metrics) > 1:
            name = f"training-{_word(run.name)}"
            drawn.append(page.figure(canvas.svg(figures.training(run.metrics, run.name), name, f"loss of {run.name}")))
        if run.grids:
            last = list(run.grids)[-1]
            grids.append(page.picture(run.grids[last], f"samples of {run.name} in training", f"{run.name}: {last}"))
    return [
        page.figures(drawn),
        _again("Train again", command),
        page.details("The last samples made in training", page.figures(grids)) if grids else "",
    ]


def _protocols(material: Material, scores: Sequence[Row]) -> list[str]:
    blocks = []
    if scores:
        columns = [c for c in ("method", *reading.CELL, *METRICS, "images", "seed") if any(c in r for r in scores)]
        names = {c: METRICS.get(c, c) for c in columns}
        blocks.append(page.details(f"All scores ({len(scores)})", page.table(scores, names)))
        protocols = [r["protocol"] for r in scores if r.get("protocol")]
        if protocols:
            unlike = len({json.dumps(p, sort_keys=True) for p in protocols})
            title = f"Protocol of the scores ({unlike} in all; the first)"
            blocks.append(page.details(title, _settings(protocols[0])))
    for run in material.runs:
        if run.config:
            blocks.append(page.details(f"{run.name}: model and training", _settings(run.config)))
        if run.study is not None:
            blocks.append(page.details(f"{run.name}: protocol of the analysis", _settings(run.study.protocol)))
            tables = [page.heading(n) + page.table(rows) for n, rows in run.study.tables().items()]
            blocks.append(page.details(f"{run.name}: tables of the analysis", *tables))
    if command := material.commands.get("report", ""):
        blocks.append(page.paragraphs("This page again:") + page.code(command))
    return blocks


def _settings(values: Mapping[str, Any]) -> str:
    flat = [{"setting": k, "value": v if isinstance(v, str) else json.dumps(v)} for k, v in _flat(values)]
    return page.table(flat, {"setting": "", "value": ""})


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{before}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return found


def _word(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name) or "x"
