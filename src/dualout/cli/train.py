"""Train a diffusion model, or resume a run.

A run resumes when it is given the same --out; Ctrl-C and SIGTERM write a checkpoint first.
With torchrun or accelerate launch, several processes share each batch.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dualout.card import autoencoder_in
from dualout.cli import console
from dualout.cli.options import parse
from dualout.errors import InputError, some
from dualout.files import atomically, explained
from dualout.training.config import TrainConfig

if TYPE_CHECKING:
    from dualout.evaluation.sampling import Sampling
    from dualout.training import Run, Step
    from dualout.training.setup import Job

_LOG_SECONDS = 10.0
"""Where there is no progress bar, a line is logged about as often."""
_GLIMPSED = 64
"""Images that a dry run decodes."""
_MUCH_LEFT = 0.2
"""Alpha over sigma at the last level, above which samples, which begin with noise alone, begin with something else than
what was trained: 0.07 is Stable Diffusion's, 0.3 that of DDPM's betas in 250 steps."""


@dataclass(kw_only=True)
class Options(TrainConfig):
    """The options of ``dualout train``."""

    dry_run: bool = False
    """Print the configuration, the number of parameters and what memory and time to expect, and stop"""


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "train", arguments, __doc__)

    from dualout.training.interrupt import interruptible
    from dualout.training.run import Run

    if options.dry_run:
        return _dry_run(options)
    with console.stages() as told, Run(options, progress=told) as training:
        _announce(training)
        if training.finished:
            if training.main:
                console.say(f"{training.path} has its {training.learner.step} steps; a higher --steps goes on")
            return 0
        with interruptible(training.stop) as asked:
            _train(training)
        if training.main:
            step = training.learner.step
            if not training.finished:
                console.say(f"stopped after step {step}: the same command goes on from there")
            console.wrote(training.path, f"{'finished' if training.finished else 'interrupted'}, step {step}")
        return 0 if training.finished else asked.code


def _train(training: Run) -> None:
    every, steps = training.config.sample_every, training.config.steps
    # there is memory to sample as many images as are trained on at a time
    part = training.config.batch_size // training.config.accumulate // _processes(training.job)
    sampling = _sampling(training) if every and training.main else None
    with console.progress("loss", "speed") as bar:
        task = bar.add_task("training", total=steps, completed=training.started, loss="", speed="")
        logged, first = time.monotonic(), training.started
        begun = logged
        for step in training:
            bar.update(task, completed=step.index)
            if step.metrics and training.main:
                bar.update(task, loss=_losses(step), speed=f"{step.metrics['images_per_s']:.0f} images/s")
                if bar.disable and (time.monotonic() - logged >= _LOG_SECONDS or step.index == steps):
                    logged = time.monotonic()
                    left = (logged - begun) / (step.index - first) * (steps - step.index)
                    speed = f"{step.metrics['images_per_s']:.0f} images/s"
                    console.say(f"step {step.index}/{steps}  {_losses(step)}  {speed}  {console.duration(left)} left")
            if not every or (step.index % every and step.index != steps):
                continue
            training.learner.gather()
            if sampling is not None:
                picture = training.path / "samples" / f"step-{step.index:06d}.png"
                _draw_samples(sampling, picture, training.config.samples, min(part, 64))


def _losses(step: Step) -> str:
    metrics = step.metrics or {}
    parts = [f"{k.removeprefix('loss/')} {v:.4g}" for k, v in metrics.items() if k.startswith("loss/")]
    return f"loss {metrics['loss']:.4f} ({', '.join(parts)})"


def _announce(training: Run) -> None:
    if not training.main:
        return
    job = training.job
    kind, schedule = job.denoiser.parameterization.short, job.denoiser.schedule
    parameters = sum(p.numel() for p in job.denoiser.parameters())
    last = schedule.scalars(schedule.steps - 1)
    console.say(repr(job.dataset))
    for note in job.dataset.notes:
        console.say(note)
    if training.config.conditional and (empty := [job.dataset.classes[c] for c in job.dataset.empty_classes]):
        console.say(f"no image is of class {some(empty)}: that is not learned, and sampled only where it is asked for")
    console.say(
        f"{kind}, {type(job.denoiser.network).__name__} of {parameters:,} parameters, on "
        f"{job.device}{f' and {n - 1} more' if (n := _processes(job)) > 1 else ''}, "
        f"{job.precision.name} ({job.precision.why})"
    )
    if last.alpha > _MUCH_LEFT * last.sigma:
        console.say(
            f"--schedule {schedule} leaves {last.alpha:.2g} of the image at its last step, and samples begin with "
            "noise alone: fewer steps need a larger beta_end in proportion, or --schedule cosine"
        )
    if training.started:
        console.say(f"{training.path}: going on from step {training.started}")


def _processes(job: Job) -> int:
    return job.accelerator.num_processes if job.accelerator else 1


def _sampling(training: Run) -> Sampling | None:
    """How the grids are sampled: from the averaged weights, with the same seeds each time."""
    from dualout.evaluation.autoencoder import Autoencoder, named_by
    from dualout.evaluation.model import Model
    from dualout.evaluation.output import Decoded, Output, Pixels
    from dualout.evaluation.sampling import Sampling
    from dualout.samplers import Sampler

    job, config = training.job, training.config
    output: Output = Pixels()
    if job.dataset.latents:
        decoder = autoencoder_in(job.config.decode)
        if decoder is None:
            return None
        with nullcontext() if config.decode is not None else named_by(config.init or training.path):
            output = Decoded(Autoencoder(decoder, job.device), job.dataset.shape)
    if output.shape(job.dataset.shape)[0] not in (1, 3):
        return None
    clip = {} if output.bounded else {"clip": None}
    sampler, levels = Sampler.parse(config.sampler, **clip), training.denoiser.schedule.steps
    if sampler.steps > levels and config.sampler == TrainConfig.sampler:
        sampler = replace(sampler, steps=levels)
    if sampler.steps > levels:
        raise InputError(
            f"the grids' --sampler {config.sampler} takes {sampler.steps} steps, and the schedule has "
            f"{levels} noise levels: give it {levels} or fewer, or --sample_every 0"
        )
    classes, unseen = len(job.dataset.classes) if config.conditional else None, tuple(job.dataset.empty_classes)
    model = Model(str(training.path), training.denoiser, job.dataset.shape, classes, {}, unseen=unseen, output=output)
    return Sampling(model, sampler, precision=job.precision.name)


def _draw_samples(sampling: Sampling, path: Path, count: int, batch_size: int) -> None:
    import torch

    from dualout.analysis.canvas import sheet

    images = torch.cat(list(sampling.batches(count, batch_size))).permute(0, 2, 3, 1).numpy()
    with explained(path):
        path.parent.mkdir(exist_ok=True)
    with atomically(path) as aside:
        aside.write_bytes(sheet(images, len(sampling.labels or (0,))))


def _dry_run(options: Options) -> None:
    from dualout.cli._processes import first
    from dualout.training.changes import refuse_changes
    from dualout.training.checkpoint import read_run, states
    from dualout.training.estimate import estimate
    from dualout.training.setup import assemble

    path = Path(options.out or options.default_out()).expanduser()
    if known := read_run(path) if states(path) else None:
        refuse_changes(path, known, options)
    with console.stages() as told:
        # a run that goes on knows its images again, all of them
        job = assemble(options, known=known, few=None if known else _GLIMPSED, progress=told)
    cost = estimate(job)
    if not first():
        return
    done = states(path)[-1][0] if known else 0
    seconds = cost.step * max(options.steps - done, 0)
    denoiser = job.denoiser
    resolved = options.asdict() | {
        "parameterization": denoiser.parameterization.spec, "schedule": denoiser.schedule.spec, "out": str(path),
        "network": options.network or ("tiny" if options.init is None else None), "decode": job.config.decode,
    }  # fmt: skip
    trained = "" if cost.trained == cost.parameters else f", of which {cost.trained:,} are trained"
    uncompiled = ""
    if options.compile and not cost.compiled:
        uncompiled = ", not compiled, which takes minutes; compiled, a step is up to 1.2 times faster on a processor"
    rows = {
        "images": repr(job.dataset),
        "network": f"{type(denoiser.network).__name__}, {cost.parameters:,} parameters{trained}",
        "computed": f"on {job.device}, in {job.precision.name} ({job.precision.why}), {_processes(job)} process(es)",
        "memory": f"about {cost.memory / 2**20:,.0f} MiB beside the images and the libraries",
        "work": f"{cost.flops:.3g} floating-point operations an image forward, three times that to train: "
        f"{3.0 * cost.flops * options.batch_size * options.steps:.2g} in all",
        "time": f"about {console.duration(seconds)}: {cost.step:.3g} s a step, "
        f"{console.rate(options.batch_size / cost.step)}",
        "measured": f"by passes of {console.count(cost.timed, 'image')}{uncompiled}",
        "run": f"goes on from step {done}" if done else "is new",
    }
    console.dry_run(resolved, rows)
