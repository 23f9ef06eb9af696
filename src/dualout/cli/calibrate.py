"""Calibrate a few-step sampler to a model: fit its time steps and a few numbers for each step, not the weights.

Takes minutes for small networks. First the time steps are moved to where the generated images are nearer to the
training images. Then the numbers (a scale on x0, on eps and on the fine detail of each; how far x0 is extrapolated from
the previous step; for dual output a gain and a shift of the ratio's logit) are fitted by gradients through all K steps.
There are two starts, and the better half-way result goes on: first-order samplers start as they are and as DPM-Solver++
2M, those of higher order with their time steps moved and kept. That choice, and when to stop, is made with noise that
the fit never uses. The result is written beside the weights; ``--calibrated`` of sample and evaluate applies it.
Evaluate it with seeds, images and features that were not used here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dualout.card import AS_THEY_ARE
from dualout.cli import console
from dualout.cli._images import real_images
from dualout.cli.options import listed, parse
from dualout.errors import InputError
from dualout.files import writable

if TYPE_CHECKING:
    from dualout.calibrated import Calibration
    from dualout.evaluation.model import Model
    from dualout.networks.precision import Precision
    from dualout.samplers import Sampler
    from dualout.training.calibrate import Fit


@dataclass(kw_only=True)
class Options:
    """The options of ``dualout calibrate``."""

    run: str = field(metadata={"positional": True})
    """A run's directory, or a checkpoint's"""
    sampler: str = "ddim"
    """ddim, ddpm, dpmsolver, unipc, ipndm, heun; with options as in dpmsolver:order=3"""
    steps: int = 5
    """Number of steps K; the calibration holds for this number only"""
    spacing: str = "trailing"
    """Which time steps: trailing, leading, linspace, quadratic, logsnr"""
    data: str | None = None
    """The real images: digits, photos, folder:PATH, arrays:FILE, idx:FOLDER, hub:NAME; resized to the model's size; by
    default what the model was trained on"""
    split: str = "train"
    """Which part of the real images; the other part is for evaluation"""
    images: int = 20000
    """How many real images at most"""
    numbers: str | None = None
    """Which numbers to fit, of x0_scale, eps_scale, x0_fine, eps_fine, x0_trend, ratio_gain, ratio_shift; by default
    all that the model has. With unipc those of eps count in the first step alone"""
    iterations: int = 300
    """Number of updates"""
    batch_size: int = 192
    """Images made for each update; they are compared with up to 2,048 real ones"""
    lr: float = 0.03
    """Adam's learning rate, which falls to 0 along a cosine"""
    distance: str = "sliced"
    """Distance between generated and real images: sliced (Wasserstein) or energy"""
    own_features: bool = True
    """Compare images in features of the model's own network, beside pixels and a fixed random network"""
    move_times: int = 3
    """Rounds of moving the time steps to lower the distance, before the numbers are fitted; 0 keeps the spacing"""
    seed: int = 0
    """Seed of the noise, the order of the images and the random features"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""
    precision: str = "fp32"
    """Number format of the network during the fit: fp32, bf16, fp16, auto"""
    dry_run: bool = False
    """Print the configuration, what is fitted and what memory and time to expect, and stop"""


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "calibrate", arguments, __doc__)

    from dualout.calibrated import DIRECTORY
    from dualout.evaluation.model import Model
    from dualout.networks.device import device
    from dualout.networks.precision import choose

    if not Path(options.run).expanduser().is_dir():
        raise InputError(f"calibrate writes beside the weights: {options.run} is no directory here")
    place = device(options.device)
    precision = choose(options.precision, place)
    model = Model.load(options.run, place, decode=AS_THEY_ARE, latents=True)
    if options.data is None and model.trained_on is None:
        raise InputError(f"{options.run} does not say what it was trained on: give --data, such as digits")
    options = replace(options, data=options.data or model.trained_on)
    if options.dry_run:
        return _dry_run(options, model)
    writable(Path(options.run).expanduser() / DIRECTORY)
    found = _fitted(options, model, precision)
    protocol = found.protocol
    before, after = protocol["held_out_before"], protocol["held_out_after"]
    rows = [
        {"step": k, "t": t, **{name: values[k] for name, values in found.values.items()}}
        for k, t in enumerate(found.times)
    ]
    console.table(rows, ["step", "t", *found.values], f"{options.run}: distance {before:.4g} → {after:.4g}")
    path = found.save(Path(options.run).expanduser())
    near = protocol["nearest"]
    console.say(
        f"distance to the nearest image of the fit: {near['before']:.3g} → {near['after']:.3g} (RMS of a "
        f"{'number' if model.latents else 'pixel'}); of unseen real images {near['held_out_images']:.3g}"
    )
    if after >= before:
        console.say("nothing better than the uncalibrated sampler was found; the numbers change nothing")
    spacing = "" if options.spacing == Options.spacing else f" --spacing {options.spacing}"
    console.wrote(path, f"use it with --sampler {options.sampler} --steps {options.steps}{spacing} --calibrated")
    return None


def _asked(options: Options, model: Model) -> tuple[Fit, Sampler]:
    from dualout.evaluation.sampling import build_sampler
    from dualout.training.calibrate import Fit

    how = Fit(
        iterations=options.iterations,
        batch=options.batch_size,
        lr=options.lr,
        distance=options.distance,
        own_features=options.own_features,
        move_times=options.move_times,
        seed=options.seed,
    )
    schedule = model.denoiser.schedule
    return how, build_sampler(options.sampler, options.steps, options.spacing, schedule, model.clips())


def _dry_run(options: Options, model: Model) -> None:
    from dualout.evaluation.cost import cost
    from dualout.evaluation.sampling import Sampling
    from dualout.training.calibrate import parameters_of

    how, sampler = _asked(options, model)
    found = cost([Sampling(model, sampler, precision=options.precision)], how.batch, how.batch)
    names = parameters_of(model.denoiser) if options.numbers is None else listed(options.numbers)
    images = how.trajectories(options.steps)
    rows = {
        "network": f"{type(model.denoiser.network).__name__}, {found.parameters:,} parameters, none of them changed",
        "fitted": f"{len(names)} numbers at each of {console.count(options.steps, 'step')}: {', '.join(names)}",
        "memory": f"about {found.memory / 2**20:,.0f} MiB to sample a batch; gradients, up to 1 GiB or one step's more",
        "work": f"as much as at most {images:,.0f} images take",
        "time": f"at most about {console.duration(found.seconds * images / how.batch)}",
    }
    console.dry_run(vars(options), rows)


def _fitted(options: Options, model: Model, precision: Precision) -> Calibration:
    from dualout.training.calibrate import Target, fit_to

    assert options.data is not None
    how, sampler = _asked(options, model)
    dataset, split = real_images(options.data, model.shape, options.split, latents=model.latents)
    target = Target.of(dataset, model.device, model.classes, options.images, name=options.data, split=split)
    numbers = None if options.numbers is None else listed(options.numbers)
    fitting = fit_to(target, model.denoiser, sampler, how, model.details["sha256"], numbers, precision)
    last = None
    with console.progress("distance") as bar:
        task = bar.add_task(f"calibrating {sampler.spec}", total=how.iterations, distance="")
        for last in fitting:
            bar.update(task, completed=last.iteration, distance=f"held-out {last.held_out:.4g} (best {last.best:.4g})")
    if last is None:
        raise InputError(f"--iterations {options.iterations} leaves nothing to fit")
    return last.calibration
