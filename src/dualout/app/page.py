"""The page itself: gradio's components, and what happens when they are used."""

from __future__ import annotations

import html
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from dualout.analysis import canvas
from dualout.app.studio import MOST_IMAGES, Made, Progress, Request, Setting, Studio, archive, samplers, takes_eta
from dualout.errors import InputError
from dualout.samplers import SPACINGS

LETTERS = "ABC"
WAITING = 16
"""Requests that may wait; more are refused."""
TOGETHER = 2
"""Requests that are worked on at a time."""
_SHOWN_EVERY = 0.15
"""Seconds between pictures of what is on the way."""

CSS = """
.dualout img { image-rendering: pixelated; }
#status { min-height: 2.6em; padding: .5em .8em; border-left: 4px solid var(--border-color-primary); }
#status .bad { color: #b3261e; font-weight: 600; }
footer { display: none !important; }
"""
FONTS = ["system-ui", "sans-serif"]


class Controls(NamedTuple):
    """The controls of one column, in the order of `Setting`'s fields after the first."""

    used: gr.Checkbox
    run: gr.Dropdown
    sampler: gr.Dropdown
    spacing: gr.Dropdown
    steps: gr.Slider
    eta: gr.Slider
    route: gr.Radio
    ratio: gr.Slider
    calibrated: gr.Checkbox
    guidance: gr.Slider
    label: gr.Dropdown


class Results(NamedTuple):
    """What one column shows."""

    column: gr.Column
    picture: gr.Image
    film: gr.Image
    ratio: gr.Image
    command: gr.Textbox


@dataclass
class Visit:
    """One browser's: whether what it asked for last is still wanted, waiting in the queue or being made."""

    wanted: bool = False

    def begin(self) -> dict[str, Any]:
        """The button was pressed: it can be pressed again when all is made."""
        self.wanted = True
        return gr.update(interactive=False)

    def cancel(self) -> None:
        """What is being made ends with the step that it is at."""
        self.wanted = False


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    with gr.Blocks(title="dualout", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        gr.Markdown("# dualout\nThe same seeds, made in several ways, side by side.")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                images = gr.Slider(1, MOST_IMAGES, 16, step=1, label="Images", elem_id="images")
                with gr.Row():
                    # what they may be is told by `Request`, in the status
                    seed = gr.Number(0, label="First seed", precision=0, min_width=90, elem_id="seed")
                    filmed = gr.Number(0, label="Film of image", precision=0, min_width=90)
                with gr.Tabs():
                    columns = []
                    for letter in LETTERS:
                        with gr.Tab(f"Setting {letter}", id=letter):
                            columns.append(_controls(studio, letter))
                with gr.Row():
                    start = gr.Button("Make images", variant="primary", elem_id="start")
                    stop = gr.Button("Cancel", elem_id="cancel")
                status = gr.HTML(said("Ready."), elem_id="status")
                download = gr.DownloadButton("Download images", visible=False, elem_id="download")
            with gr.Column(scale=2, min_width=340), gr.Row():
                results = [_results(letter) for letter in LETTERS]
        visit = gr.State(Visit())
        inputs = [visit, seed, images, filmed, *(c for column in columns for c in column)]
        outputs = [status, download, *(c for result in results for c in result)]

        def make(visit: Visit, *values: Any) -> Iterator[dict[Any, Any]]:
            yield from _make(studio, visit, values, status, download, results)

        # Not gradio's own `cancels`: it ends a request from outside, and what that still had to say then arrives after
        # "Stopped.", or never does. Here the request ends itself, so that one alone writes the status.
        pressed = start.click(Visit.begin, visit, start, queue=False, show_progress="hidden")
        done = pressed.then(make, inputs, outputs, concurrency_limit=TOGETHER)
        done.then(lambda: gr.update(interactive=True), None, start, queue=False, show_progress="hidden")
        # gradio's `then` is not for what it refuses itself: a full queue, a number beyond a slider's end
        done.failure(_refused, None, [start, status], queue=False, show_progress="hidden")
        stop.click(Visit.cancel, visit, None, queue=False)
        # a calibration may have been made since the page was built
        page.load(lambda: _calibrated_labels(studio), None, [c.calibrated for c in columns], queue=False)
    page.queue(max_size=WAITING, default_concurrency_limit=TOGETHER, api_open=False)
    return page


def said(text: str, bad: bool = False) -> str:
    """A status line, as HTML."""
    return f'<span class="{"bad" if bad else "well"}" role="status">{html.escape(text)}</span>'


def _refused() -> list[Any]:
    return [gr.update(interactive=True), said("Nothing was made; the message on the right says why.", bad=True)]


def _controls(studio: Studio, letter: str) -> Controls:
    runs, first = list(studio.models), letter == LETTERS[0]
    model = studio.models[runs[0]]
    used = gr.Checkbox(first, label=f"Show {letter}", visible=not first, elem_id=f"used-{letter}")
    run = gr.Dropdown(_named(runs), value=runs[0], label="Model", elem_id=f"run-{letter}")
    with gr.Row():
        sampler = gr.Dropdown(samplers(), value="ddim", label="Sampler", min_width=120, elem_id=f"sampler-{letter}")
        spacing = gr.Dropdown(list(SPACINGS), value="trailing", label="Spacing", min_width=120)
    most = min(100, model.denoiser.schedule.steps)
    steps = gr.Slider(1, most, min(10, most), step=1, label="Steps K", elem_id=f"steps-{letter}")
    eta = gr.Slider(0, 1, 0, step=0.05, label="η: fresh noise of each step")
    routes = studio.routes(runs[0])
    route = gr.Radio(routes, value=routes[0], label="Route", elem_id=f"route-{letter}")
    ratio = gr.Slider(0, 1, 0.5, step=0.01, label="r: 0 is eps only, 1 is x0 only", visible=False)
    calibrated = gr.Checkbox(False, label=_calibrated_label(studio, runs[0]))
    classes = model.classes is not None
    guidance = gr.Slider(0, 8, 1, step=0.25, label="Guidance; 1 is none", visible=classes)
    label = gr.Dropdown(_classes(studio, runs[0]), value=_ALL, label="Class", visible=classes)
    sampler.change(lambda name: gr.update(visible=takes_eta(name)), sampler, eta, queue=False, show_progress="hidden")
    route.change(lambda name: gr.update(visible=name == "fixed r"), route, ratio, queue=False, show_progress="hidden")

    def changed(name: str, asked: float) -> list[Any]:
        model, routes = studio.models[name], studio.routes(name)
        classes, most = model.classes is not None, min(100, model.denoiser.schedule.steps)
        return [
            gr.update(choices=routes, value=routes[0]),
            gr.update(label=_calibrated_label(studio, name), value=False),
            gr.update(visible=classes, value=1),
            gr.update(visible=classes, value=_ALL, choices=_classes(studio, name)),
            gr.update(maximum=most, value=min(asked, most)),
        ]

    run.change(changed, [run, steps], [route, calibrated, guidance, label, steps], queue=False, show_progress="hidden")
    return Controls(used, run, sampler, spacing, steps, eta, route, ratio, calibrated, guidance, label)


def _named(runs: list[str]) -> list[tuple[str, str]]:
    """A name to show and the run: the last part of its path, where no other run ends alike."""
    names = [Path(run).name for run in runs]
    return [(name if names.count(name) == 1 else run, run) for name, run in zip(names, runs, strict=True)]


_ALL = "all in turn"


def _classes(studio: Studio, run: str) -> list[str]:
    model = studio.models[run]
    return [_ALL, *(model.class_names or map(str, range(model.classes or 0)))]


def _calibrated_label(studio: Studio, run: str) -> str:
    there = studio.calibrations(run)
    return f"Calibrated (there: {', '.join(there)})" if there else "Calibrated (dualout calibrate makes it)"


def _calibrated_labels(studio: Studio) -> list[Any]:
    """Of all columns, as they are when a browser comes: at the first model."""
    return [gr.update(label=_calibrated_label(studio, next(iter(studio.models))))] * len(LETTERS)


def _results(letter: str) -> Results:
    shown: dict[str, Any] = {
        "interactive": False,
        "format": "png",
        "buttons": ["download", "fullscreen"],
        "show_label": False,
    }
    with gr.Column(visible=letter == LETTERS[0], min_width=260, elem_id=f"result-{letter}") as column:
        gr.Markdown(f"### {letter}")
        picture = gr.Image(elem_id=f"picture-{letter}", elem_classes="dualout", **shown)
        film = gr.Image(elem_id=f"film-{letter}", visible=False, **shown)
        ratio = gr.Image(elem_id=f"ratio-{letter}", visible=False, **shown)
        command = gr.Textbox(
            label="The command that makes these images", elem_id=f"command-{letter}", visible=False, interactive=False,
            lines=1, max_lines=6, buttons=["copy"],
        )  # fmt: skip
    return Results(column, picture, film, ratio, command)


def _request(values: tuple[Any, ...]) -> tuple[Request, list[int]]:
    """What the controls say, and which columns they are."""
    seed, images, filmed, *rest = values
    width = len(Controls._fields)
    columns = [rest[i : i + width] for i in range(0, len(rest), width)]
    used = [k for k, (on, *_) in enumerate(columns) if on or k == 0]
    settings = [_setting(columns[k][1:]) for k in used]
    return Request(settings, int(seed or 0), int(images), int(filmed or 0)), used


def _setting(values: list[Any]) -> Setting:
    *others, label = values
    return Setting(*others, label=None if label == _ALL else label)


def _make(
    studio: Studio,
    visit: Visit,
    values: tuple[Any, ...],
    status: gr.HTML,
    download: gr.DownloadButton,
    results: list[Results],
) -> Iterator[dict[Any, Any]]:
    shown = time.monotonic()
    made: list[Made] = []
    try:
        request, used = _request(values)
        yield {status: said("Working …"), download: gr.update(visible=False)} | {
            result.column: gr.update(visible=k in used) for k, result in enumerate(results)
        }
        for item in studio.make(request):
            if not visit.wanted:
                yield {status: said("Stopped.")}
                return
            if isinstance(item, Made):
                made.append(item)
                yield _finished(item, results[used[len(made) - 1]])
            elif time.monotonic() - shown >= _SHOWN_EVERY or item.step == item.steps:
                shown = time.monotonic()
                yield _on_the_way(item, used, status, results)
        with tempfile.TemporaryDirectory(prefix="dualout-") as directory:
            path = archive(made, Path(directory) / "images.zip")
            # gradio takes a copy before this goes on, and removes it after an hour
            yield {
                status: said(
                    f"{request.images} image{'s' * (request.images > 1)} of {len(made)} setting{'s' * (len(made) > 1)}."
                ),
                download: gr.update(value=str(path), visible=True),
            }
    except InputError as error:
        yield {status: said(str(error), bad=True)}


def _on_the_way(item: Progress, used: list[int], status: gr.HTML, results: list[Results]) -> dict[Any, Any]:
    k = used[item.setting]
    return {status: said(f"{LETTERS[k]}: step {item.step} of {item.steps}"), results[k].picture: _image(item.picture)}


def _finished(item: Made, result: Results) -> dict[Any, Any]:
    ratio = item.ratio()
    return {
        result.picture: _image(item.picture),
        result.film: gr.update(value=_drawn(item.film()), visible=True),
        result.ratio: gr.update(value=None if ratio is None else _drawn(ratio), visible=ratio is not None),
        result.command: gr.update(value=item.command, visible=True),
    }


def _image(picture: Any) -> Image.Image:
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


def _drawn(figure: Any) -> Image.Image:
    return Image.open(io.BytesIO(canvas.png(figure)))
