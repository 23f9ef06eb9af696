"""Export a model as a diffusers pipeline or ONNX, or convert other code's weights into a checkpoint.

A pipeline is loaded with dualout.export.DualOutputPipeline.from_pretrained; its network is an ordinary model of
diffusers. An ONNX file takes noisy images and their time steps and returns clean images, noise and ratio; it is written
only if ONNX Runtime agrees with torch. --format dualout takes any source of dualout upgrade, a file of weights for
instance, and writes a checkpoint that sample, evaluate and the other commands read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dualout.card import AS_THEY_ARE, public
from dualout.cli import console
from dualout.cli.options import out_directory, parse
from dualout.errors import InputError, unknown
from dualout.files import write_json

if TYPE_CHECKING:
    from dualout.calibrated import Calibration
    from dualout.denoiser import Denoiser
    from dualout.evaluation.model import Model
    from dualout.samplers import Sampler

FORMATS = ("diffusers", "onnx", "dualout")
RESULTS = "results.json"


@dataclass(kw_only=True)
class Options:
    """The options of ``dualout export``."""

    run: str = field(metadata={"positional": True})
    """A run's directory, a checkpoint's, or the name of a Hugging Face Hub repository; with --format dualout also a
    file of weights, or a directory of diffusers"""
    format: str = "diffusers"
    """diffusers, onnx or dualout"""
    adapter: str | None = None
    """With --format dualout, of a file of weights: plain (with options, as in plain:network=small:size=28),
    starter-cnn, mnist-ddpm"""
    parameterization: str | None = None
    """With --format dualout, of a diffusers model without its scheduler: what it was trained to predict, eps, x0 or
    velocity"""
    schedule: str | None = None
    """With --format dualout, of a diffusers model without its scheduler: linear, scaledlinear, cosine …"""
    out: str | None = None
    """Output directory: new, empty, or of the same command before; by default RUN-FORMAT"""
    route: str = "mix"
    """Which output of a dual model to use: mix, eps, x0, velocity, flow, or a ratio from 0 to 1"""
    sampler: str = "ddim"
    """Whose scheduler a pipeline gets: ddim, ddpm, dpmsolver, unipc; with --calibrated, whose calibration is taken"""
    steps: int = 20
    """With --calibrated, the number of steps that it is for; a pipeline gets its number of steps when it is called"""
    spacing: str = "trailing"
    """Which time steps: trailing, leading, linspace"""
    clip: bool | None = None
    """Clip the predicted clean image to the range of images at every step; by default yes, but for latents, which have
    no range"""
    calibrated: bool = False
    """Export the calibration for this sampler, spacing and number of steps too"""
    opset: int = 20
    """With --format onnx, the version of the ONNX operator set"""
    tolerance: float = 1e-4
    """Largest difference between the model and the exported pipeline or ONNX file"""
    push_to_hub: str | None = None
    """Also upload it to this repository of the Hugging Face Hub, NAME/REPOSITORY"""
    private: bool | None = None
    """With --push_to_hub, whether a new repository is private"""
    dry_run: bool = False
    """Print the options, and what would be written and uploaded, and stop"""


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "export", arguments, __doc__)
    if options.format not in FORMATS:
        raise unknown("format", options.format, FORMATS)
    name = Path(options.run).expanduser().resolve().name
    out = out_directory(options.out or f"{name}-{options.format}", holds="exports", marker=RESULTS)
    _check_format(out, options.format)
    _check_told(options)

    from dualout import hub

    if options.push_to_hub is not None:
        hub.check(options.push_to_hub)
    if options.format == "onnx":
        from dualout.export.onnx import NEEDS, require

        require(*NEEDS)
    if options.dry_run:
        return _dry_run(options, out)
    if options.format == "dualout":
        record = _checkpoint(options, out)
    else:
        record = _program(options, out)
    write_json(out / RESULTS, public(record))
    console.wrote(out / RESULTS, "what was written, and how it was checked")
    if options.push_to_hub is not None:
        url = hub.upload(
            out, options.push_to_hub, private=options.private, commit_message=f"Upload a model ({options.format})"
        )
        console.wrote(url)
    return None


def _check_format(out: Path, kind: str) -> None:
    """Two exports in one directory would be neither."""
    try:
        before = json.loads((out / RESULTS).read_text(encoding="utf-8")).get("format")
    except (OSError, ValueError, AttributeError):
        return
    if before != kind:
        raise InputError(f"--out {out} holds an export to {before}; one to {kind} goes to another directory")


def _check_told(options: Options) -> None:
    """How a foreign model is read, and how a program samples, are told each for their own formats."""
    foreign = {k: getattr(options, k) for k in ("adapter", "parameterization", "schedule")}
    told = [k for k, v in foreign.items() if v is not None]
    if options.format != "dualout" and told:
        raise InputError(f"--{told[0]} is for --format dualout, whose checkpoint is then exported to {options.format}")
    if options.format == "dualout" and (options.calibrated or options.route != "mix"):
        raise InputError("--format dualout writes the model as it is: leave out --route and --calibrated")
    if options.format == "onnx" and not options.calibrated:
        sampling = [k for k in ("sampler", "steps", "spacing", "clip") if getattr(options, k) != getattr(Options, k)]
        if sampling:
            raise InputError(
                f"an ONNX file is one call of the model, whatever samples with it: leave out --{sampling[0]}, or say "
                "whose calibration it shall have by --calibrated"
            )


def _dry_run(options: Options, out: Path) -> None:
    """Refuse what would be refused before anything is written, and say what would be."""
    from dualout import hub
    from dualout.export import DualOutputPipeline
    from dualout.networks import foreign

    if options.format == "dualout":
        if not foreign.own_pipeline(options.run):
            foreign.find(options.run, options.adapter, options.parameterization, options.schedule)
        told = f"{options.run} can be read, as far as is known without its weights"
    else:
        program = _read(options, out)
        if options.format == "diffusers":
            DualOutputPipeline.from_denoiser(program.denoiser, program.sampler, calibration=program.calibration)
        size = sum(p.nbytes for p in program.denoiser.parameters())
        told = f"{program.model.denoiser.parameterization.spec}, {size / 2**20:,.1f} MiB of weights"
    rows = {"model": told, "writes": f"{options.format} to {out}"}
    if (repository := options.push_to_hub) is not None:
        new = "" if options.private is None else f" ({'private' if options.private else 'public'}, if it is new)"
        rows["uploads"] = f"all of that to {repository}{new}, in one commit"
        rows["login"] = "there is one" if hub.logged_in() else "there is none: hf auth login, or set HF_TOKEN"
    console.dry_run(vars(options), rows)


class _Read(NamedTuple):
    """A model, and how it is to be sampled elsewhere."""

    model: Model
    denoiser: Denoiser
    """By the route that was asked for."""
    sampler: Sampler
    calibration: Calibration | None


def _checkpoint(options: Options, out: Path) -> dict[str, Any]:
    """What somebody trained, as a checkpoint."""
    from dualout.checkpoint import CONFIG
    from dualout.evaluation.model import Model
    from dualout.export.directory import whole
    from dualout.networks import foreign

    if foreign.own_pipeline(options.run):
        from dualout.export import DualOutputPipeline

        denoiser = DualOutputPipeline.from_pretrained(Path(options.run).expanduser()).denoiser
    else:
        denoiser = foreign.load(options.run, options.adapter, options.parameterization, options.schedule)
    source = Path(options.run).name
    if not denoiser.card:
        denoiser.card = {"title": source, "training": {"taken from": source}}
    if options.push_to_hub is not None:
        denoiser.card = public(denoiser.card)
    with whole(out, last=CONFIG) as aside:
        denoiser.save_pretrained(aside)
        # what cannot be read again is not left there
        model = Model.load(aside, decode=AS_THEY_ARE, latents=True).protocol() | {"name": out.name}
    console.wrote(out, f"a checkpoint of {source}")
    return {"format": options.format, "model": model}


def _program(options: Options, out: Path) -> dict[str, Any]:
    """A model for another program, of the formats that sample."""
    program = _read(options, out)
    write = _pipeline if options.format == "diffusers" else _onnx
    return {"format": options.format, "model": program.model.protocol(), "route": options.route} | write(
        options, program, out
    )


def _read(options: Options, out: Path) -> _Read:
    from dualout.evaluation.model import Model
    from dualout.evaluation.sampling import Sampling, build_sampler, parse_route

    model = Model.load(options.run, decode=AS_THEY_ARE, latents=True)
    sampler = build_sampler(options.sampler, options.steps, options.spacing, clip=model.clips(options.clip))
    route = parse_route(options.route)
    sampling = Sampling(model, sampler, route, calibrated=True) if options.calibrated else None
    denoiser = model.denoiser.route(route)
    denoiser.card = model.denoiser.card | {"path": options.push_to_hub or out.name}
    return _Read(model, denoiser, sampler, sampling and sampling.calibration)


def _pipeline(options: Options, program: _Read, out: Path) -> dict[str, Any]:
    import torch
    from diffusers.utils import logging

    from dualout.export import DualOutputPipeline
    from dualout.export.diffusers import INDEX
    from dualout.export.directory import whole
    from dualout.randomness import noise

    model, denoiser, sampler, calibration = program
    logging.disable_progress_bar()
    pipeline = DualOutputPipeline.from_denoiser(denoiser, sampler, calibration=calibration)
    t = denoiser.schedule.steps // 2
    told = {} if model.classes is None else {"class_labels": torch.tensor([0])}
    with whole(out, last=INDEX) as aside:
        pipeline.save_pretrained(aside)
        # what lies there is read again, and looks at an image as the model does
        again = DualOutputPipeline.from_pretrained(aside).denoiser.eval()
        with torch.no_grad():
            a, b = (d.float()(noise([0], model.shape), t, **told) for d in (denoiser, again))
        difference = float((a.x0 - b.x0).abs().max())
        # its weights are the file's own bytes, and Windows does not rename what is used
        del again
        if not difference <= options.tolerance:
            raise InputError(
                f"the pipeline, read again, predicts other images, by {difference:.2g}, which is more than "
                f"--tolerance {options.tolerance:g}; nothing was written"
            )
    console.wrote(out, f"a pipeline of diffusers with {type(pipeline.scheduler).__name__}")
    return {"scheduler": type(pipeline.scheduler).__name__, "calibrated": calibration is not None,
            "difference": {"x0": difference}, "tolerance": options.tolerance}  # fmt: skip


def _onnx(options: Options, program: _Read, out: Path) -> dict[str, Any]:
    from dualout.export import write_onnx
    from dualout.export.onnx import MODEL

    model, denoiser, _, calibration = program
    console.say("translating, which takes a minute or so …")
    checked = write_onnx(
        denoiser, out, model.shape, calibration=calibration, opset=options.opset, tolerance=options.tolerance
    )
    worst = ", ".join(f"{name} {value:.1g}" for name, value in checked["difference"].items())
    console.wrote(out / MODEL, f"ONNX Runtime agrees with torch: {worst}; tolerance {options.tolerance:g}")
    return {"opset": options.opset, "calibrated": calibration is not None, **checked}
