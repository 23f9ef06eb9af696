"""Score the images of trained models against real ones: Fréchet distance, KID, precision, recall.

Every combination of run, route, sampler, spacing, number of steps, seed and number of images is one row of results.json
and results.csv, written when it is finished, with the protocol that tells which numbers can be compared. Given again,
an interrupted command goes on where it stopped. With torchrun, every process makes its share of the images, and the
first scores them all. Set s of N images is made from the seeds s·N … s·N + N − 1, so that sets do not overlap.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualout.card import autoencoder_in
from dualout.cli import console
from dualout.cli._images import Shape, real_images
from dualout.cli._processes import first
from dualout.cli.options import listed, out_directory, parse
from dualout.errors import InputError
from dualout.files import writable

if TYPE_CHECKING:
    import torch

    from dualout.evaluation.features import Features
    from dualout.evaluation.group import Group
    from dualout.evaluation.model import Model
    from dualout.evaluation.reference import Reference
    from dualout.evaluation.sampling import Sampling
    from dualout.evaluation.scoring import Row, Scoring
    from dualout.parameterizations.base import Parameterization, Route


@dataclass(kw_only=True)
class Options:
    """The options of ``dualout evaluate``."""

    runs: str = field(metadata={"positional": True, "commas": True})
    """Directories of runs or checkpoints, or names of Hugging Face Hub repositories; comma-separated"""
    data: str | None = None
    """The real images: digits, photos, folder:PATH, arrays:FILE, idx:FOLDER, hub:NAME; resized to the model's size; by
    default what the models were trained on, and digits where that is not recorded"""
    split: str = "test"
    """Which part of the real images: test (held out from training), train, all"""
    images: int = 2000
    """How many to make for each row; scores of fewer than 10,000 compare only among themselves"""
    samplers: str = "ddim"
    """ddim, ddpm, dpmsolver, unipc, ipndm, heun, diffusers; with options as in dpmsolver:reach=2 or ddim:clip=null"""
    steps: str = "10"
    """Numbers of steps; comma-separated, like samplers, spacings, routes, seeds, features and guidance"""
    spacings: str = "trailing"
    """trailing, leading, linspace, quadratic, logsnr"""
    routes: str = "mix"
    """Which output of a dual model to use: mix, eps, x0, velocity, flow, or a ratio from 0 to 1"""
    seeds: str = "0"
    """Which sets of images to make, as in 0,1; each has seeds of its own"""
    features: str | None = None
    """Feature networks that images are compared in: digits, pixels, random, lite0, inception, classifier:path=FILE;
    several give a row each; by default digits where the images are grey 8×8, and pixels and random elsewhere"""
    guidance: str | None = None
    """For class-conditional models: scale of classifier-free guidance; 1 is none"""
    guidance_interval: str | None = None
    """Which noise levels are guided: two values of sigma / alpha, LOW,HIGH, as in 0.2,5; by default all"""
    decode: str | None = None
    """For models of latents: the autoencoder of diffusers that decodes them, a directory or the name of a Hugging Face
    Hub repository, its own or a pipeline's; by default the one named in training. They are compared with the pictures
    of --data"""
    out: str | None = None
    """Output directory: new, empty, or of this command; by default `evaluation` in the run's directory"""
    card: bool = False
    """Write the scores on the model card of each checkpoint"""
    batch_size: int = 256
    """How many images at a time"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""
    precision: str = "fp32"
    """Number format of the model's network: fp32, bf16, fp16, auto"""
    backend: str = "eager"
    """What runs the network: eager, graph, compile, openvino, onnx, or auto, which takes the fastest"""
    calibrated: bool = False
    """Apply what dualout calibrate found for each sampler, spacing and number of steps"""
    dry_run: bool = False
    """Print the configuration, the number of parameters and what memory and time the images will take, and stop"""


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "evaluate", arguments, __doc__)
    if options.batch_size < 1:
        raise InputError(f"--batch_size is a whole number, 1 or more; got {options.batch_size}")
    # a shell completes runs/a as runs/a/, which would be another row
    options = replace(options, runs=",".join(name.rstrip("/" + os.sep) or name for name in listed(options.runs)))

    from dualout.evaluation.group import Group

    with Group.here() as group:
        return _evaluate(options, group)


def _evaluate(options: Options, group: Group) -> None:
    from dualout.evaluation.card import put_on_card
    from dualout.evaluation.scoring import Results

    if options.card and (remote := [name for name in listed(options.runs) if not Path(name).expanduser().is_dir()]):
        raise InputError(f"--card writes into a checkpoint's directory; {remote[0]} is none here")
    if options.dry_run:
        if first():
            _dry_run(options, group)
        return
    # everything is looked at before anything is made
    scorings = group.in_turn(lambda: _scorings(options, group))
    out = out_directory(_out(options), holds="scores", marker="results.json")
    results = group.in_turn(lambda: Results(out))
    missing = [not all(results.find(row) for row in scoring.pending()) for scoring in scorings]
    todo = [scoring for scoring, made in zip(scorings, group.agreed(missing), strict=True) if made]
    if first() and len(todo) < len(scorings):
        console.say(f"{len(scorings) - len(todo)} of {len(scorings)} combinations are there already, and are kept")
    for place in [out] * bool(todo) + [Path(name).expanduser() for name in listed(options.runs) if options.card]:
        writable(place)
    share = len(group.share(options.images))
    with console.progress("row") as bar:
        task = bar.add_task("images", total=len(todo) * share, row="", visible=bool(todo))
        for done, scoring in enumerate(todo):
            bar.update(task, row=scoring.title)
            _prepare(scoring.sampling, todo, options, share)
            for count in scoring.run(options.batch_size):
                bar.update(task, completed=done * share + count)
            if first():
                results.add(scoring.rows())
            _release(scoring.sampling, todo[done + 1 :])
    if not first():
        return
    rows = [row for scoring in scorings for key in scoring.pending() if (row := results.find(key))]
    _print(rows, options)
    if options.card:
        for name in listed(options.runs):
            console.wrote(put_on_card(name, [row for row in rows if row["run"] == name]))
    console.wrote(results.path, console.count(len(results.rows), "row"))
    console.wrote(out / "results.csv")


def _dry_run(options: Options, group: Group) -> None:
    from dualout.cli._cost import print_cost

    samplings = [sampling for _, sampling in _samplings(options)]
    options = replace(options, data=_data(options, samplings), features=_features(options, samplings))
    scores = f"{console.count(len(samplings), 'combination')} of {options.images:,} images, each by {options.features}"
    print_cost(options, samplings, options.images, group.size, {"scores": scores, "out": str(_out(options))})


def _prepare(sampling: Sampling, todo: Sequence[Scoring], options: Options, share: int) -> None:
    """Get the backend ready, knowing of all that the model will be called for."""
    if share:
        batch_size, batches = min(options.batch_size, share), -(-share // options.batch_size)
        same = [s.sampling.sampler.evaluations for s in todo if s.sampling.model is sampling.model]
        sampling.prepare(batch_size, batches * sum(same), batches * sampling.sampler.evaluations)


def _release(sampling: Sampling, left: Sequence[Scoring]) -> None:
    """Let go of what was recorded or compiled for a row, and with the last row of a model of its network's too: rows
    may be many, and a GPU's memory holds a few recordings."""
    sampling.release()
    if not any(other.sampling.model is sampling.model for other in left):
        sampling.model.release()


def _print(rows: Sequence[Row], options: Options) -> None:
    """The table; what is equal in all rows is said above it."""
    from dualout.evaluation.scoring import COLUMNS, KEY, OPTIONAL
    from dualout.parameterizations import Parameterization

    rows = [row | {"parameterization": Parameterization.shortened(str(row["parameterization"]))} for row in rows]
    told = [column for column in KEY if len({str(row.get(column)) for row in rows}) == 1]
    hidden = set(told) | ({"nfe"} if all(row["nfe"] == row["steps"] for row in rows) else set())
    said = {c: rows[0].get(c) for c in told if c != "images"}
    equal = ", ".join(f"{c} {value}" for c, value in said.items() if value is not None and value is not False)
    real = rows[0]["protocol"]["reference"]
    title = f"{options.images:,} images against {real['data']} ({real['split']}); {equal}"
    console.table(rows, [column for column in (*COLUMNS, *OPTIONAL) if column not in hidden], title)
    for text in sorted({row["protocol"]["warning"] for row in rows if "warning" in row["protocol"]}):
        console.say(f"note: {text}")


def _out(options: Options) -> Path:
    if options.out is not None:
        return Path(options.out)
    runs = listed(options.runs)
    return (
        Path(runs[0]).expanduser() / "evaluation" if len(runs) == 1 and Path(runs[0]).is_dir() else Path("evaluation")
    )


def _scorings(options: Options, group: Group) -> list[Scoring]:
    """Every combination, checked; the references, which take longer, come last."""
    from dualout.evaluation.features import Features
    from dualout.evaluation.scoring import Scoring

    samplings = _samplings(options)
    named = _features(options, [sampling for _, sampling in samplings])
    features = [Features.parse(spec) for spec in _some(named, "features")]
    shapes, place = [sampling.model.image for _, sampling in samplings], samplings[0][1].device
    options = replace(options, data=_data(options, [sampling for _, sampling in samplings]))
    references = _references(options, shapes, features, place)
    return [
        Scoring(sampling, options.images, references[sampling.model.image], seed, group) for seed, sampling in samplings
    ]


def _samplings(options: Options) -> list[tuple[int, Sampling]]:
    """Every combination, with the seed that it is called by."""
    from dualout.evaluation.autoencoder import Autoencoder
    from dualout.evaluation.model import Model
    from dualout.evaluation.sampling import Sampling, build_sampler, parse_interval, parse_route
    from dualout.evaluation.scoring import check_count, first_seed
    from dualout.networks.device import device

    check_count(options.images)
    routes = [parse_route(text) for text in _some(options.routes, "routes")]
    samplers = list(product(_some(options.samplers, "samplers"), _some(options.spacings, "spacings")))
    steps, seeds = _numbers(options.steps, "steps"), _numbers(options.seeds, "seeds")
    scales = [None] if options.guidance is None else _numbers(options.guidance, "guidance", float)
    place = device(options.device)
    named = autoencoder_in(options.decode)
    # read once, for all models
    decoder = options.decode if named is None else Autoencoder(named, place)
    models = [Model.load(name, place, decode=decoder) for name in _some(options.runs, "runs")]
    readable = _routes(models, routes)
    return [
        (
            seed,
            Sampling(
                model,
                sampler,
                route,
                first_seed(seed, options.images),
                guidance=scale,
                guidance_interval=parse_interval(options.guidance_interval),
                precision=options.precision,
                calibrated=options.calibrated,
                backend=options.backend,
            ),
        )
        for model in models
        for route in readable[model.run]
        for (spec, spacing), k in product(samplers, steps)
        for sampler in [build_sampler(spec, k, spacing, model.denoiser.schedule, model.clips())]
        for scale in scales
        for seed in seeds
    ]


def _routes(models: Sequence[Model], routes: Sequence[Route]) -> dict[str, list[Route]]:
    """Those that each model has, but for those that read it as an earlier one does; one that none has is an error."""
    found: dict[str, dict[Parameterization, Route]] = {model.run: {} for model in models}
    for route in routes:
        refused: dict[str, InputError] = {}
        for model in models:
            try:
                reading = model.denoiser.parameterization.route(route)
            except InputError as error:
                refused[model.run] = error
                continue
            same = found[model.run].setdefault(reading, route)
            if same != route and first():
                console.say(f"{model.run}: the route {route} is the same as {same}, and is not repeated")
        if len(refused) == len(models):
            raise next(iter(refused.values()))
        for name in refused if first() else ():
            console.say(f"{name} has no route {route}: those rows are left out")
    return {name: list(readings.values()) for name, readings in found.items()}


def _data(options: Options, samplings: Sequence[Sampling]) -> str:
    """What the models' images are compared with."""
    if options.data is None and any(sampling.model.latents for sampling in samplings):
        raise InputError(
            "latents are decoded to pictures, which are compared with pictures: say by --data what the latents that "
            "the models learned from were encoded from, as in --data folder:PATH"
        )
    known = sorted({name for sampling in samplings if (name := sampling.model.trained_on)})
    if options.data is None and len(known) > 1:
        raise InputError(f"these models were trained on different data ({', '.join(known)}): give --data")
    return options.data or (known[0] if known else "digits")


def _features(options: Options, samplings: Sequence[Sampling]) -> str:
    """What images are compared by: what is asked for, or what takes those of these models."""
    small = all(sampling.model.image == (1, 8, 8) for sampling in samplings)
    return options.features if options.features is not None else "digits" if small else "pixels,random"


def _references(
    options: Options, shapes: Sequence[Shape], features: Sequence[Features], place: torch.device
) -> dict[Shape, list[Reference]]:
    """For each shape of images, what the features make of the real ones."""
    from dualout.evaluation.reference import Reference

    for (channels, *size), look in product(shapes, features):
        look.check(channels, (size[0], size[1]))
    assert options.data is not None
    found: dict[Shape, list[Reference]] = {}
    with console.stages() as told:
        for shape in dict.fromkeys(shapes):
            dataset, split = real_images(options.data, shape, options.split, progress=told)
            names = {"name": options.data, "split": split}
            found[shape] = [
                Reference.of(dataset, look, **names, device=place, batch_size=options.batch_size, progress=told)
                for look in features
            ]
    return found


def _some(text: str, name: str) -> list[str]:
    if not (found := list(dict.fromkeys(listed(text)))):
        raise InputError(f"--{name} names none")
    return found


def _numbers(text: str, name: str, kind: type = int) -> list[Any]:
    numbers, sort = _some(text, name), "whole numbers" if kind is int else "numbers"
    try:
        return [kind(number) for number in numbers]
    except ValueError:
        raise InputError(f"--{name} are {sort} separated by commas, got {text!r}") from None
