"""A grid of methods, training seeds, samplers, spacings and steps, as one tidy table.

Models are trained, calibrations fitted and samples scored only where that has not been done before: a run's directory
is named by the content of its configuration, and a row is known by its protocol. Adding a method, a seed or a sampler
to the grid costs only itself.

The best spacing of a method is chosen on one set of samples and reported on others: choosing does not flatter it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dualout import data
from dualout.analysis.grid import Grid, Training
from dualout.analysis.tables import Row, by_training, cell, grouped, number, paired, spread
from dualout.calibrated import Calibration
from dualout.errors import InputError
from dualout.evaluation.autoencoder import Autoencoder
from dualout.evaluation.features import Features
from dualout.evaluation.model import Model
from dualout.evaluation.protocol import ENOUGH
from dualout.evaluation.reference import Reference, check_pictures
from dualout.evaluation.sampling import Sampling, parse_route
from dualout.evaluation.scoring import Results, Scoring, first_seed
from dualout.files import cache_directory
from dualout.networks.device import device as find_device
from dualout.networks.precision import choose
from dualout.samplers import Sampler
from dualout.training.calibrate import Fit, Target, fit_to, parameters_of, way
from dualout.training.config import TrainConfig
from dualout.training.estimate import estimate
from dualout.training.run import Run
from dualout.training.setup import assemble


class Doing(NamedTuple):
    """How far it is: what is being done, and how much of it."""

    what: str
    done: int
    total: int


class Expected(NamedTuple):
    """What a grid will cost."""

    models: int
    trained: int
    """How many of them are there already."""
    parameters: int
    """Of the largest."""
    memory: int
    """Bytes, to train the largest."""
    scores: int
    """Sets of images."""
    calibrations: int
    training: float
    """Seconds, of the models that are not there."""
    sampling: float
    """Seconds, of all scores."""


def expected(grid: Grid, out: Path) -> Expected:
    """Measure a step of each method's training; nothing is written.

    Raises:
        InputError: for a method that cannot be trained, or real images that samples cannot be compared with.
    """
    _check_images(grid, _decoder(grid))
    models, costs = grid.models(), {}
    trained = scores = calibrations = 0
    training = sampling = 0.0
    for model in models:
        if model.method not in costs:
            job = assemble(model.config)
            costs[model.method] = estimate(job), list(grid.settings(job.denoiser.schedule))
        cost, settings = costs[model.method]
        if (model.directory(out) / "model.safetensors").exists():
            trained += 1
        else:
            training += cost.step * model.config.steps
        for sampler, calibrated in settings:
            sets = len(grid.routes(model, calibrated)) * len(grid.sets)
            scores, calibrations = scores + sets, calibrations + calibrated
            sampling += sets * grid.images * sampler.evaluations * cost.look
    parameters, memory = (max(getattr(c, name) for c, _ in costs.values()) for name in ("parameters", "memory"))
    return Expected(len(models), trained, parameters, memory, scores, calibrations, training, sampling)


Listening = Callable[[Callable[[], None]], AbstractContextManager[Any]]
"""Given what ends a training after its step, a context in which that may be asked for."""


def run(grid: Grid, out: Path, listening: Listening = nullcontext) -> Iterator[Doing | list[Row]]:
    """Do all of it; the last item is the table, where no training was ended before.

    Args:
        grid: what is compared.
        out: the directory.
        listening: entered while a model is trained, as `interruptible`: one that is ended has its checkpoint.

    Raises:
        InputError: before anything is trained, for real images that samples cannot be compared with.
    """
    place = find_device(grid.device)
    decoder = _decoder(grid, place)
    _check_images(grid, decoder)
    results = Results(out)
    references: list[Reference] = []
    found: list[Row] = []
    for training in grid.models():
        directory = training.directory(out)
        if not (yield from _train(training, directory, listening)):
            return
        model = Model.load(directory, place, decode=decoder)
        if not references:
            references = _references(grid, model)
        for sampler, calibrated in grid.settings(model.denoiser.schedule):
            if calibrated:
                yield from _calibrate(grid, training, model, directory, sampler)
            for route, seed in product(grid.routes(training, calibrated), grid.sets):
                sampling = Sampling(
                    model, sampler, parse_route(str(route)), first_seed(seed, grid.images),
                    precision=grid.precision, calibrated=calibrated, backend=grid.backend,
                )  # fmt: skip
                scoring = Scoring(sampling, grid.images, references, seed)
                # rows alone are kept: a scoring holds its model, and the grid may have a hundred
                found += yield from _score(grid, training, scoring, results)
    yield found


def _score(grid: Grid, training: Training, scoring: Scoring, results: Results) -> Generator[Doing, None, list[Row]]:
    """Returns the rows, made now or before."""
    if not all(results.find(row) for row in scoring.pending()):
        batches, sampling = -(-grid.images // grid.batch_size), scoring.sampling
        sampling.prepare(min(grid.batch_size, grid.images), batches * sampling.sampler.evaluations)
        for count in scoring.run(grid.batch_size):
            yield Doing(f"{training.method} seed {training.seed}: {scoring.title}", count, grid.images)
        results.add(scoring.rows())
    rows, seed = [row for key in scoring.pending() if (row := results.find(key))], scoring.seed
    return [
        {"method": _method(training, r), "training_seed": training.seed, "reported": seed in grid.report_seeds, **r}
        for r in rows
    ]


def _method(training: Training, row: Row) -> str:
    return training.method if row["route"] == "mix" else f"{training.method} ({row['route']})"


def _train(training: Training, directory: Path, listening: Listening) -> Generator[Doing, None, bool]:
    """Returns whether all its steps are done."""
    config = TrainConfig(**{**vars(training.config), "out": str(directory)})
    with Run(config) as training_run:
        if not training_run.finished:
            directory.mkdir(parents=True, exist_ok=True)
            with listening(training_run.stop):
                for step in training_run:
                    yield Doing(f"training {training.method} seed {training.seed}", step.index, config.steps)
        return training_run.finished


def _calibrate(grid: Grid, training: Training, model: Model, directory: Path, sampler: Sampler) -> Iterator[Doing]:
    how, precision = Fit(**grid.calibration), choose(grid.precision, model.device)
    weights = model.details["sha256"]
    asked = {"weights": weights, "fit": vars(how), "precision": precision.name, "way": way(sampler)}
    try:
        known = Calibration.load(directory, sampler.config())
        same = all(known.protocol.get(key) == value for key, value in asked.items())
        if same and known.values.keys() == set(parameters_of(model.denoiser)):
            return
    except InputError:
        pass  # there is none yet: it is fitted
    dataset, split = _learned_from(grid, "train", model.shape[1:])
    target = Target.of(dataset, model.device, model.classes, name=training.config.data, split=split)
    fitting = fit_to(target, model.denoiser, sampler, how, weights, precision=precision)
    title, last = f"calibrating {training.method} seed {training.seed}: {sampler.spec}", None
    for last in fitting:
        yield Doing(title, last.iteration, how.iterations)
    if last is not None:
        last.calibration.save(directory)


def _learned_from(grid: Grid, split: str, size: int | tuple[int, ...] | None) -> tuple[data.Dataset, str]:
    config = grid.models()[0].config
    return _loaded(config.data, size=size, grey=config.grey, split=split)


def _loaded(spec: str, **defaults: Any) -> tuple[data.Dataset, str]:
    """The images, and which split they are: the spec may say another."""
    source = data.open_source(spec, **defaults)
    return data.load(source, cache=cache_directory() / "data"), source.split


def _compared_with(grid: Grid, size: int | tuple[int, ...] | None, channels: int) -> data.Dataset:
    """The real images: those that models learned from, or the pictures that their latents were encoded from."""
    if grid.pictures is None:
        return _learned_from(grid, grid.split, size)[0]
    return _loaded(grid.pictures, size=size, grey=channels == 1, split=grid.split)[0]


def _decoder(grid: Grid, place: torch.device | str = "cpu") -> Autoencoder | None:
    """What makes pictures of the models' latents, read once for all."""
    return None if grid.decode is None else Autoencoder(grid.decode, place)


def _check_images(grid: Grid, decoder: Autoencoder | None) -> None:
    """See that there are images to compare with, and that the features take such."""
    dataset, _ = _learned_from(grid, grid.split if grid.pictures is None else "train", grid.models()[0].config.size)
    if decoder is not None:
        if not dataset.latents:
            raise InputError(f"the data {dataset.name!r} are pictures, not latents: leave out decode and pictures")
        channels, *size = decoder.check(dataset.shape)
        dataset = _compared_with(grid, tuple(size), channels)
        if dataset.shape != (channels, *size):
            raise InputError(
                f"{grid.decode} makes pictures of {(channels, *size)} (C, H, W), {grid.pictures} are of {dataset.shape}"
            )
    check_pictures(dataset)
    for spec in grid.features:
        Features.parse(spec).check(dataset.channels, dataset.size)


def _references(grid: Grid, model: Model) -> list[Reference]:
    dataset = _compared_with(grid, model.image[1:], model.image[0])
    name, device = grid.pictures or grid.models()[0].config.data, model.device
    return [
        Reference.of(dataset, Features.parse(spec), name=name, split=grid.split, device=device)
        for spec in grid.features
    ]


SETTING = ("features", "sampler", "steps", "calibrated")


def chosen(rows: Sequence[Row]) -> list[Row]:
    """The reported rows of each method's best spacing, in each setting."""
    best = {}
    for key, own in grouped(rows, lambda r: (r["method"], r["sampler"], r["steps"], r["calibrated"])).items():
        judged = [r for r in own if r["features"] == own[0]["features"] and not r["reported"]]
        by_spacing = {s: spread(r["fd"] for r in of) for s, of in grouped(judged, lambda r: r["spacing"]).items()}
        known = {s: v.mean for s, v in by_spacing.items() if v is not None}
        best[key] = min(known, key=known.__getitem__) if known else own[0]["spacing"]
    return [
        row
        for row in rows
        if row["reported"] and row["spacing"] == best[row["method"], row["sampler"], row["steps"], row["calibrated"]]
    ]


def summary(rows: Sequence[Row], baseline: str) -> list[Row]:
    """A row for each setting and method: mean and spread of FD over training and sampling seeds, and its ratio to the
    baseline's, paired by training seed."""
    found: list[Row] = []
    for setting, own in grouped(rows, lambda r: tuple(r[k] for k in SETTING)).items():
        by_method = grouped(own, lambda r: r["method"])
        base = by_method.get(baseline, [])
        for method, of in by_method.items():
            fd, ratio = spread(r["fd"] for r in of), paired(of, base)
            if fd is None:
                continue
            found.append(
                dict(zip(SETTING, setting, strict=True))
                | {
                    "method": method,
                    "spacing": "/".join(sorted({r["spacing"] for r in of})),
                    "nfe": of[0]["nfe"],
                    "fd": fd.mean,
                    "fd_sd": fd.sd,
                    "ratio": None if ratio is None else ratio.mean,
                    "ratio_sd": None if ratio is None else ratio.sd,
                    "training_seeds": len(by_training(of)),
                    "precision": _mean(of, "precision"),
                    "recall": _mean(of, "recall"),
                }
            )
    return found


def _mean(rows: Sequence[Row], column: str) -> float | None:
    value = spread(r.get(column) for r in rows)
    return None if value is None else value.mean


def markdown(best: Sequence[Row], equal: Sequence[Row], grid: Grid) -> str:
    """The summary in words and tables."""
    seeds, chosen_on = (", ".join(map(str, s)) or "none" for s in (grid.report_seeds, grid.choose_seeds))
    lines = [
        "# Comparison",
        "",
        f"{grid.images} images a score against the {grid.split} split, features {', '.join(grid.features)}; "
        f"{len(grid.training_seeds)} training seed(s), samples of seed set(s) {seeds}; the best spacing was chosen on "
        f"set(s) {chosen_on}. Ratios are to {grid.baseline}, paired by training seed, with their standard deviation "
        f"over seeds; below 1 is better. Scores of fewer than {ENOUGH:,} images compare only among themselves.",
        "",
        "## At each method's best spacing",
        "",
        *_table(summary(best, grid.baseline or "")),
    ]
    for spacing, own in grouped(equal, lambda r: r["spacing"]).items():
        lines += ["", f"## At equal spacing: {spacing}", "", *_table(summary(own, grid.baseline or ""))]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    columns = [*SETTING, "method", "spacing", "nfe", "FD", "ratio", "precision", "recall"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        shown = row | {"FD": _number(row["fd"], row["fd_sd"]), "ratio": _number(row["ratio"], row["ratio_sd"])}
        lines.append(f"| {' | '.join(_cell(shown.get(c)) for c in columns)} |")
    return lines


def _number(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return ""
    return number(mean, 3, zeros=True) + (f" ± {number(sd, 2)}" if sd else "")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return cell(value, 3)
