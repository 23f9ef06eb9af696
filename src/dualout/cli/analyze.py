"""Analyze a trained model: the errors of its two routes, its learned ratio, and its sampling trajectories.

On held-out images: the error of x0 over t by the two routes (x0 computed from eps, and x0 as predicted) and by their
blend, where the routes cross, and the learned ratio beside the best one. On generated images: drift of the mean,
contrast beside an exact denoiser's, clipped pixels, and a film of x0 and the ratio step by step. Of single-output
models, what applies to them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualout.cli import console
from dualout.cli._images import real_images
from dualout.cli.options import out_directory, parse
from dualout.errors import InputError
from dualout.files import writable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dualout.analysis.study import Study
    from dualout.data.dataset import Dataset
    from dualout.evaluation.model import Model
    from dualout.samplers import Sampler


@dataclass(kw_only=True)
class Options:
    """The options of ``dualout analyze``."""

    run: str = field(metadata={"positional": True})
    """A run's directory, a checkpoint's, or the name of a Hugging Face Hub repository"""
    data: str | None = None
    """Real images: digits, photos, folder:PATH, arrays:FILE …; by default what the model was trained on"""
    split: str = "test"
    """test (held out from training), train or all"""
    images: int = 1000
    """How many real images, at most"""
    repeats: int = 1
    """How many times each of them is noised"""
    points: int = 20
    """Number of intervals that t is divided into"""
    sampler: str = "ddim"
    """Sampler of the film and of the trajectory statistics, with options as in ddim:eta=0.5"""
    steps: int = 10
    """Steps of the sampler"""
    spacing: str = "trailing"
    """Which time steps: trailing, leading, linspace, quadratic, logsnr"""
    samples: int = 256
    """How many images are made for the trajectory statistics"""
    film: int = 4
    """How many images get a film, every step of one image side by side; the report shows the first"""
    decode: str | None = None
    """For models of latents: the autoencoder of diffusers that decodes the films, a directory or the name of a Hugging
    Face Hub repository, its own or a pipeline's; by default the one named in training. none shows the first channels"""
    seed: int = 0
    """Seed of the noise, and of the first generated image; any whole number"""
    batch_size: int = 256
    """How many images at a time"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""
    out: str | None = None
    """Output directory: new, empty, or of an earlier analysis; by default RUN/analysis"""

    def __post_init__(self) -> None:
        least = {"images": 1, "repeats": 1, "points": 1, "samples": 2, "film": 1, "batch_size": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"--{name} is {low} or more; got {getattr(self, name)}")


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "analyze", arguments, __doc__)

    from dualout.cli import _study
    from dualout.evaluation.model import Model
    from dualout.evaluation.sampling import build_sampler
    from dualout.networks.device import device

    began = time.perf_counter()
    place = device(options.device)
    model = Model.load(options.run, place, decode=options.decode, latents=True)
    schedule = model.denoiser.schedule
    sampler = build_sampler(options.sampler, options.steps, options.spacing, schedule, model.clips())
    out = out_directory(
        options.out or _beside(options.run), holds="an analysis's tables and figures", marker=_study.PROTOCOL
    )
    writable(out)
    spec = options.data or model.trained_on
    if spec is None:
        raise InputError(f"{options.run} does not say what it was trained on: give --data, such as digits")
    grey = None if model.latents else {1: True, 3: False}.get(model.shape[0])
    dataset, split = real_images(spec, model.shape, options.split, latents=model.latents, grey=grey)
    study = measure(replace(options, split=split), model, dataset, sampler)
    written = _study.write(study, out, model.denoiser.parameterization.short)
    _tell(study)
    console.wrote(out, f"{console.count(len(written), 'file')}: tables (CSV, JSON), arrays, {_study.FIGURES}/")
    console.say(f"took {time.perf_counter() - began:.0f} s")
    return None


def _beside(run: str) -> Path:
    directory = Path(run).expanduser()
    if not directory.is_dir():
        raise InputError(f"{run!r} is no directory here: say where the analysis goes, with --out")
    return directory / "analysis"


def measure(options: Options, model: Model, dataset: Dataset, sampler: Sampler) -> Study:
    """The whole study, with a progress bar; `options.split` is that of the images."""
    import torch

    from dualout.analysis.routes import grid, routes
    from dualout.analysis.study import Study
    from dualout.analysis.trajectories import Gaussian, drift, film, seen
    from dualout.data.dataset import evenly
    from dualout.data.pixels import to_model

    denoiser = model.denoiser
    # spread over the set, which may be sorted
    chosen = evenly(len(dataset), options.images)
    images = to_model(dataset.batch(chosen)).to(model.device)
    labels = _labels(model, dataset, chosen)
    times = grid(denoiser.schedule, options.points)
    told = made_labels(model, options.samples)
    seeds = range(options.seed, options.seed + options.samples)
    torch.manual_seed(options.seed % 2**64)
    with console.progress() as bar:
        task = bar.add_task("errors over t", total=len(times))
        found = []
        for at in routes(
            denoiser, images, times,
            seed=options.seed, repeats=options.repeats, batch_size=options.batch_size, labels=labels,
        ):  # fmt: skip
            found.append(at)
            bar.advance(task)
        task = bar.add_task("on the way", total=2)
        data = Gaussian.of(images)
        way = drift(
            denoiser, sampler, data, seeds, model.shape,
            batch_size=options.batch_size, labels=told, bounds=None if model.latents else (-1.0, 1.0),
        )  # fmt: skip
        bar.advance(task)
        filmed = seeds[: options.film]
        frames = film(denoiser, sampler, filmed, model.shape, made_labels(model, len(filmed)))
        frames = [seen(f, model.output.seen) for f in frames]
        bar.advance(task)
    maps = {at.row["t"]: at.ratio_map for at in found if at.ratio_map is not None}
    reliability = [row for at in found for row in at.reliability]
    protocol = _protocol(options, model, dataset, sampler, len(images))
    return Study(protocol, [at.row for at in found], reliability, way, maps, frames)


def _protocol(options: Options, model: Model, dataset: Dataset, sampler: Sampler, images: int) -> dict[str, Any]:
    return {
        "model": {"run": model.run, **model.protocol()},
        "data": dataset.name,
        "split": options.split,
        "fingerprint": dataset.fingerprint,
        "images": images,
        "repeats": options.repeats,
        "noise": "of image i: a function of (seed, repeat, i)",
        "sampler": sampler.spec,
        "samples": options.samples,
        "seeds": f"{options.seed} … {options.seed + options.samples - 1}",
        "seed": options.seed,
    } | ({"film": model.output.protocol()} if model.latents else {})


def _labels(model: Model, dataset: Dataset, chosen: np.ndarray) -> Tensor | None:
    """What the model is told of the real images: their class, or that they have none."""
    import torch

    if model.classes is None:
        return None
    if dataset.labels is None or len(dataset.classes) != model.classes:
        return torch.full((len(chosen),), model.classes)
    return dataset.labels[torch.as_tensor(chosen)]


def made_labels(model: Model, count: int) -> list[int] | None:
    """What the model is told of images to be made: all classes in turn."""
    return None if model.classes is None else list(islice(cycle(model.turn), count))


def _tell(study: Study) -> None:
    from dualout.analysis import reading

    columns = ["t", "x0_error", "v_error"]
    if study.dual:
        columns += ["subtractive_x0_error", "direct_x0_error", "ratio_mean", "ratio_best", "slope"]
    rows = study.routes[:: max(1, len(study.routes) // 12)]
    short = {"subtractive_x0_error": "subtractive", "direct_x0_error": "direct", "ratio_mean": "r", "ratio_best": "r*"}
    console.table([{short.get(k, k): row.get(k) for k in columns} for row in rows], [short.get(k, k) for k in columns])
    for sentence in [*reading.ratio(study), *reading.paths({"the model": study})]:
        console.out.print(sentence.replace("**", "").replace("`", ""))
