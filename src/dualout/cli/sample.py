"""Make images with a trained model.

Image i is made from seed + i, whatever the batch size. Given again, an interrupted command goes on where it stopped;
with torchrun, every process makes its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dualout import processes
from dualout.cli import console
from dualout.cli.options import parse
from dualout.errors import InputError, unknown
from dualout.files import atomically, holding

if TYPE_CHECKING:
    from dualout.evaluation.sampling import Sampling


@dataclass(kw_only=True)
class Options:
    """The options of ``dualout sample``."""

    run: str = field(metadata={"positional": True})
    """A run's directory, a checkpoint's, or the name of a Hugging Face Hub repository"""
    images: int = 64
    """How many images to make"""
    sampler: str = "ddim"
    """ddim, ddpm, dpmsolver, unipc, ipndm, heun, diffusers; with options as in dpmsolver:reach=2"""
    steps: int = 20
    """Number of steps, from 1 to the length of the model's schedule"""
    spacing: str = "trailing"
    """Which time steps: trailing, leading, linspace, quadratic, logsnr"""
    seed: int = 0
    """Seed of the first image, any whole number; image i is made from seed + i"""
    route: str = "mix"
    """Which output of a dual model to use: mix, eps, x0, velocity, flow, or a ratio from 0 to 1"""
    clip: bool | None = None
    """Clip the predicted clean image to the range of images at every step; by default yes, but for latents, which have
    no range"""
    class_label: str | None = None
    """For class-conditional models: a class, by number or name, or several, comma-separated, that images take in turn;
    by default all that training had images of, in turn"""
    guidance: float | None = None
    """For class-conditional models: scale of classifier-free guidance; 1 is none"""
    guidance_interval: str | None = None
    """Which noise levels are guided: two values of sigma / alpha, LOW,HIGH, as in 0.2,5; by default all"""
    out: str = "out"
    """Output directory: new, empty, or of the same command, interrupted"""
    format: str = "png"
    """png, one file for each image; or npz, one images.npz with `images` uint8 N×H×W or N×H×W×C, or latents as they
    are, float32 N×C×H×W"""
    decode: str | None = None
    """For models of latents: the autoencoder of diffusers that decodes them, a directory or the name of a Hugging Face
    Hub repository, its own or a pipeline's; by default the one named in training. none leaves latents as they are, for
    --format npz"""
    batch_size: int = 64
    """How many images at a time"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""
    precision: str = "fp32"
    """Number format of the network: fp32, bf16, fp16, auto"""
    backend: str = "eager"
    """What runs the network: eager, graph, compile, openvino, onnx, or auto, which takes the fastest"""
    calibrated: bool = False
    """Apply what dualout calibrate found for this sampler, spacing and number of steps"""
    dry_run: bool = False
    """Print the configuration, the number of parameters and what memory and time to expect, and stop"""


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "sample", arguments, __doc__)

    from dualout.evaluation.generate import generate
    from dualout.evaluation.model import Model
    from dualout.evaluation.sampling import Sampling, build_sampler, parse_interval, parse_route
    from dualout.evaluation.stores import PROTOCOL
    from dualout.networks.device import device

    part = processes.rank(), processes.count()
    place = device(options.device)
    model = Model.load(options.run, place, decode=options.decode, latents=True)
    clip = model.clips(options.clip)
    sampling = Sampling(
        model,
        build_sampler(options.sampler, options.steps, options.spacing, model.denoiser.schedule, clip),
        parse_route(options.route),
        options.seed,
        labels=None if options.class_label is None else _labels(options.class_label, model.class_names),
        guidance=options.guidance,
        guidance_interval=parse_interval(options.guidance_interval),
        precision=options.precision,
        calibrated=options.calibrated,
        backend=options.backend,
    )
    if options.dry_run:
        return _dry_run(options, sampling, part) if part[0] == 0 else None
    out = Path(options.out).expanduser()
    making = generate(sampling, options.images, out, store=options.format, batch_size=options.batch_size, part=part)
    already = next(making)
    if already:
        console.say(f"{console.count(already, 'image')} {'is' if already == 1 else 'are'} there already, and kept")
    with console.progress() as bar:
        task = bar.add_task("images", total=-(-options.images // part[1]), completed=already)
        for done in making:
            bar.update(task, completed=done)
    if part[0] == 0:
        what = "images.npz" if options.format == "npz" else "000000.png" + " …" * (options.images > 1)
        console.wrote(out, f"{console.count(options.images, 'image')}, {what}")
        console.wrote(out / PROTOCOL, "how they were made")
    if _grid(out, options.images, len(sampling.labels or (0,)), part[1]):
        console.wrote(out / "grid.png")
    return None


def _dry_run(options: Options, sampling: Sampling, part: tuple[int, int]) -> None:
    from dualout.cli._cost import print_cost

    told = {"times": ", ".join(map(str, sampling.stepping.timesteps(sampling.model.denoiser.schedule)))}
    print_cost(options, [sampling], options.images, part[1], told)


def _labels(text: str, names: Sequence[str]) -> list[int]:
    """Classes by number or by name."""
    known = {name: number for number, name in enumerate(names)}
    labels, parts = [], text.split(",")
    while parts:
        # a name may have commas itself
        taken = next((n for n in range(len(parts), 0, -1) if ",".join(parts[:n]).strip() in known), 1)
        label, parts = ",".join(parts[:taken]).strip(), parts[taken:]
        if not label:
            continue
        if not label.isdecimal() and label not in known:
            if not names:
                raise InputError(f"--class_label is a class's number, or several separated by commas; got {label!r}")
            raise unknown("class", label, names)
        labels.append(known[label] if label in known else int(label))
    return labels


def _grid(out: Path, images: int, turn: int, processes: int, most: int = 64) -> bool:
    """Draw the first images side by side, of which so many classes take turns.

    Of several processes the one that finds them all there draws, as no one waits for another, which may have ended: the
    last, or the first, whose directory it is, when it has come to its end too.

    Returns:
        whether it drew.
    """
    from dualout.analysis.canvas import sheet
    from dualout.evaluation.stores import stored

    made = stored(out, count := min(images, most))
    if len(made) < count or made.is_floating_point() or made.shape[1] not in (1, 3):
        return False
    with holding(out, wait=False) as ours:
        # the same request has the same grid
        if ours is False or (processes > 1 and (out / "grid.png").exists()):
            return False
        with atomically(out / "grid.png") as aside:
            aside.write_bytes(sheet(made.permute(0, 2, 3, 1).numpy(), turn))
    return True
