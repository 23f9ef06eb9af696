"""A grid of methods, training seeds, samplers, spacings and steps, as one tidy table.

Models are trained, calibrations fitted and samples scored only where that has not been done before: a run's directory
is named by the content of its configuration, and a row is known by its protocol. Adding a method, a seed or a sampler
to the grid costs only itself.

The best spacing of a method is chosen on one set of samples and reported on others: choosing does not flatter it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from dualout import data
from dualout.analysis.tables import Row, grouped, spread
from dualout.calibrated import Calibration
from dualout.data.pixels import to_model
from dualout.errors import InputError, unknown
from dualout.evaluation.features import Features, cache_directory
from dualout.evaluation.model import Model
from dualout.evaluation.reference import Reference
from dualout.evaluation.sampling import Sampling, build_sampler, parse_route
from dualout.evaluation.scoring import Results, Scoring, check_count, first_seed
from dualout.networks.device import device as find_device
from dualout.registry import described, fits
from dualout.samplers import Sampler
from dualout.schedules import Schedule
from dualout.training.calibrate import Fit, evenly, fit
from dualout.training.config import TrainConfig
from dualout.training.estimate import estimate
from dualout.training.run import Run
from dualout.training.setup import assemble


@dataclass(kw_only=True)
class Grid:
    """What is compared.

    Raises:
        InputError: for anything that cannot be used, before anything is trained.
    """

    methods: dict[str, Any] = field(default_factory=lambda: {"eps": "eps", "dual": "dual"})
    """By name: a parameterization, or a mapping of training options that differ from `train`, with `routes` if others
    than mix are to be read"""
    train: dict[str, Any] = field(default_factory=dict)
    """Options of dualout train that all methods share: data, network, steps, batch_size, …"""
    training_seeds: list[int] = field(default_factory=lambda: [0])
    """One model of each method is trained for each"""
    samplers: list[str] = field(default_factory=lambda: ["ddim", "dpmsolver"])
    """With options as in dpmsolver:order=3"""
    spacings: list[str] = field(default_factory=lambda: ["trailing", "linspace"])
    """Which time steps; the best of them is chosen for each method"""
    steps: list[int] = field(default_factory=lambda: [5, 10, 20])
    """Numbers of steps"""
    calibrated: list[bool] = field(default_factory=lambda: [False])
    """Whether samplers are calibrated: [false], [true] or [false, true]"""
    also: list[dict[str, Any]] = field(default_factory=list)
    """Further parts of the grid: mappings of samplers, spacings, steps and calibrated, where these differ"""
    calibration: dict[str, Any] = field(default_factory=dict)
    """Options of the fit: iterations, batch, lr, distance"""
    features: list[str] = field(default_factory=lambda: ["digits"])
    """What images are compared by; the first is the one that spacings are chosen by"""
    images: int = 2000
    """Made for each score"""
    split: str = "test"
    """Of the data, that samples are compared with"""
    choose_seeds: list[int] = field(default_factory=lambda: [0])
    """Sets of samples that the best spacing is chosen on"""
    report_seeds: list[int] = field(default_factory=lambda: [1])
    """Sets of samples that are reported"""
    baseline: str | None = None
    """The method that ratios are taken to; by default the first"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""
    batch_size: int = 256
    """Images sampled at a time"""

    def __post_init__(self) -> None:
        if not self.methods:
            raise InputError("a comparison needs methods: eps: eps, dual: dual, …")
        self.baseline = self.baseline or next(iter(self.methods))
        if self.baseline not in self.methods:
            raise unknown("method to compare with", self.baseline, self.methods)
        for name, method in self.methods.items():
            if "/" in name or name.startswith("."):
                raise InputError(f"a method's name is that of a directory too; {name!r} cannot be one")
            self._options(method)
        for name in ("training_seeds", "samplers", "spacings", "steps", "calibrated", "features", "report_seeds"):
            if not getattr(self, name):
                raise InputError(f"{name} names none")
        if both := set(self.choose_seeds) & set(self.report_seeds):
            raise InputError(f"the spacing is chosen on other samples than are reported; {sorted(both)} is in both")
        if len(self.spacings) > 1 and not self.choose_seeds:
            raise InputError("several spacings need choose_seeds, on which the best is chosen")
        check_count(self.images)
        known = {f.name for f in fields(Fit)}
        for key in self.calibration:
            if key not in known:
                raise unknown("option of the calibration:", key, known)
        for spec in self.features:
            Features.parse(spec)
        for part in self.parts():
            for spec, spacing, steps in product(part.samplers, part.spacings, part.steps):
                build_sampler(spec, steps, spacing)
        find_device(self.device)
        self.models()

    def parts(self) -> list[Part]:
        """The grid's parts, its own first."""
        own = Part(self.samplers, self.spacings, self.steps, self.calibrated)
        found = [own]
        for more in self.also:
            for name, value in more.items():
                if name not in Part._fields:
                    raise unknown("option of a further part of the grid:", name, Part._fields)
                if not isinstance(value, list) or not value:
                    raise InputError(
                        f"{name} of a further part of the grid is a list with something in it; got {value!r}"
                    )
            found.append(own._replace(**more))
        return found

    @staticmethod
    def _options(method: Any) -> dict[str, Any]:
        if isinstance(method, str):
            return {"parameterization": method}
        if isinstance(method, dict) and isinstance(method.get("parameterization"), str):
            return method
        raise InputError(f"a method is a parameterization, or a mapping with one; got {method!r}")

    def models(self) -> list[Training]:
        """The models that are trained."""
        known = get_type_hints(TrainConfig)
        found = []
        for (name, method), seed in product(self.methods.items(), self.training_seeds):
            options = {"sample_every": 0, **self.train, **self._options(method), "seed": seed}
            routes = options.pop("routes", ["mix"])
            for key, value in options.items():
                if key not in known:
                    raise unknown("training option", key, known)
                if not fits(value, known[key]):
                    raise InputError(f"the training option {key} is {described(known[key])}; got {value!r}")
            found.append(Training(name, seed, TrainConfig(device=self.device, **options), routes))
        return found


class Part(NamedTuple):
    """What is combined with each other in one part of a grid."""

    samplers: list[str]
    spacings: list[str]
    steps: list[int]
    calibrated: list[bool]

    def settings(self, schedule: Schedule) -> Iterator[tuple[Sampler, bool]]:
        """Every sampler, and whether it is calibrated."""
        for spec, spacing, steps, calibrated in product(*self):
            yield build_sampler(spec, steps, spacing, schedule), calibrated


class Training(NamedTuple):
    """A model of a grid."""

    method: str
    seed: int
    config: TrainConfig
    routes: Sequence[str | float]

    def directory(self, out: Path) -> Path:
        """Where it is trained: named by what it is made of."""
        own = {k: v for k, v in vars(self.config).items() if k not in _ELSEWHERE}
        content = hashlib.blake2b(json.dumps(own, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
        return out / "models" / f"{self.method}-{content}-seed{self.seed}"


_ELSEWHERE = (
    "out", "device", "fsdp", "workers", "track", "log_every", "checkpoint_every", "keep", "sample_every", "sampler",
)  # fmt: skip


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
    fits: int
    """Calibrations."""
    training: float
    """Seconds, of the models that are not there."""
    sampling: float
    """Seconds, of all scores."""


def expected(grid: Grid, out: Path) -> Expected:
    """Measure a step of each method's training; nothing is written.

    Raises:
        InputError: for a method that cannot be trained.
    """
    costs, there, training, sampling, scores, fits = {}, 0, 0.0, 0.0, 0, 0
    seeds = len([*grid.choose_seeds, *grid.report_seeds])
    models = grid.models()
    for model in models:
        if model.method not in costs:
            job = assemble(model.config)
            costs[model.method] = estimate(job), job.denoiser.schedule
        cost, schedule = costs[model.method]
        done = (model.directory(out) / "model.safetensors").exists()
        there += done
        training += 0 if done else cost.step * model.config.steps
        # of a step's three passes of its images, the network's look at them is one
        look = cost.step / (3 * model.config.batch_size)
        settings = dict.fromkeys(setting for part in grid.parts() for setting in part.settings(schedule))
        for sampler, calibrated in settings:
            sets = seeds * (1 if calibrated else len(model.routes))
            scores, fits = scores + sets, fits + calibrated
            sampling += sets * grid.images * sampler.evaluations * look
    known = [cost for cost, _ in costs.values()]
    parameters, memory = max(c.parameters for c in known), max(c.memory for c in known)
    return Expected(len(models), there, parameters, memory, scores, fits, training, sampling)


def run(grid: Grid, out: Path) -> Iterator[Doing | list[Row]]:
    """Do all of it; the last item is the table."""
    results = Results(out)
    references: list[Reference] = []
    wanted: list[tuple[Training, Scoring]] = []
    for training in grid.models():
        directory = training.directory(out)
        yield from _trained(training, directory)
        model = Model.load(directory, find_device(grid.device))
        if not references:
            references = _references(grid, model)
        settings = [setting for part in grid.parts() for setting in part.settings(model.denoiser.schedule)]
        for sampler, calibrated in dict.fromkeys(settings):
            if calibrated:
                yield from _calibrated(grid, training, model, directory, sampler)
            for route in ["mix"] if calibrated else training.routes:
                for seed in [*grid.choose_seeds, *grid.report_seeds]:
                    first = first_seed(seed, grid.images)
                    sampling = Sampling(model, sampler, parse_route(str(route)), first, calibrated=calibrated)
                    scoring = Scoring(sampling, grid.images, references, seed)
                    wanted.append((training, scoring))
                    if all(results.find(row) for row in scoring.pending()):
                        continue
                    for count in scoring.run(grid.batch_size):
                        yield Doing(f"{training.method} seed {training.seed}: {scoring.title}", count, grid.images)
                    results.add(scoring.rows())
    found = [(t, row) for t, scoring in wanted for key in scoring.pending() if (row := results.find(key))]
    yield [{"method": _method(t, row), "training_seed": t.seed, **row} for t, row in found]


def _method(training: Training, row: Row) -> str:
    return training.method if row["route"] == "mix" else f"{training.method} ({row['route']})"


def _trained(training: Training, directory: Path) -> Iterator[Doing]:
    config = TrainConfig(**{**vars(training.config), "out": str(directory)})
    with Run(config) as training_run:
        if not training_run.finished:
            directory.mkdir(parents=True, exist_ok=True)
            for step in training_run:
                yield Doing(f"training {training.method} seed {training.seed}", step.index, config.steps)


def _calibrated(grid: Grid, training: Training, model: Model, directory: Path, sampler: Sampler) -> Iterator[Doing]:
    how = Fit(**grid.calibration)
    weights = model.details["sha256"]
    try:
        known = Calibration.load(directory, sampler.config()).protocol
        if known.get("weights") == weights and known.get("fit") == vars(how):
            return
    except InputError:
        pass  # there is none yet: it is fitted
    dataset = _data(grid, model, "train")
    images = to_model(dataset.batch(evenly(len(dataset), 20_000))).to(model.device)
    last = None
    for last in fit(model.denoiser, sampler, images, how):
        yield Doing(
            f"calibrating {training.method} seed {training.seed}: {sampler.spec}", last.iteration, how.iterations
        )
    if last is not None:
        protocol = {**last.calibration.protocol, "weights": weights, "data": dataset.name}
        Calibration(sampler.config(), last.calibration.times, last.calibration.values, protocol).save(directory)


def _data(grid: Grid, model: Model, split: str) -> data.Dataset:
    config = grid.models()[0].config
    source = data.open_source(config.data, size=model.shape[1:], grey=config.grey, split=split)
    return data.load(source, cache=cache_directory() / "data")


def _references(grid: Grid, model: Model) -> list[Reference]:
    dataset = _data(grid, model, grid.split)
    name, place = grid.models()[0].config.data, find_device(grid.device)
    return [
        Reference.of(dataset, Features.parse(spec), name=name, split=grid.split, device=place) for spec in grid.features
    ]


SETTING = ("features", "sampler", "steps", "calibrated")


def chosen(rows: Sequence[Row], grid: Grid) -> list[Row]:
    """The reported rows of each method's best spacing, in each setting."""
    best = {}
    for key, own in grouped(rows, lambda r: (r["method"], r["sampler"], r["steps"], r["calibrated"])).items():
        judged = [r for r in own if r["features"] == own[0]["features"] and r["seed"] in grid.choose_seeds]
        by_spacing = {s: spread(r["fd"] for r in of) for s, of in grouped(judged, lambda r: r["spacing"]).items()}
        known = {s: v.mean for s, v in by_spacing.items() if v is not None}
        best[key] = min(known, key=known.__getitem__) if known else own[0]["spacing"]
    return [
        row
        for row in rows
        if row["seed"] in grid.report_seeds
        and row["spacing"] == best[row["method"], row["sampler"], row["steps"], row["calibrated"]]
    ]


def summary(rows: Sequence[Row], baseline: str) -> list[Row]:
    """A row for each setting and method: mean and spread of FD over training and sampling seeds, and its ratio to the
    baseline's, paired by training seed."""
    found: list[Row] = []
    for setting, own in grouped(rows, lambda r: tuple(r[k] for k in SETTING)).items():
        by_method = grouped(own, lambda r: r["method"])
        base = _by_seed(by_method.get(baseline, []))
        for method, of in by_method.items():
            fd = spread(r["fd"] for r in of)
            seeds = _by_seed(of)
            ratio = spread(seeds[s] / base[s] for s in seeds if base.get(s))
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
                    "training_seeds": len(seeds),
                    "precision": _mean(of, "precision"),
                    "recall": _mean(of, "recall"),
                }
            )
    return found


def _by_seed(rows: Sequence[Row]) -> dict[int, float]:
    groups = grouped(rows, lambda r: r["training_seed"])
    return {seed: value.mean for seed, own in groups.items() if (value := spread(r["fd"] for r in own)) is not None}


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
        "over seeds; below 1 is better. Scores of fewer than 10,000 images compare only among themselves.",
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
    return f"{mean:.3g}" + (f" ± {sd:.2g}" if sd else "")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
