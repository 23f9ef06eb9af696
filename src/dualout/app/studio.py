"""What the page shows: images of several settings from the same seeds, step by step, and the film of one of them.

Nothing here knows of the page. A request is a value, and all that is made for it belongs to it alone, so that two
browsers do not disturb each other.
"""

from __future__ import annotations

import math
import shlex
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dualout.analysis import canvas, pictures
from dualout.analysis.trajectories import Frame, frame, seen
from dualout.calibrated import DIRECTORY
from dualout.errors import InputError, unknown
from dualout.evaluation.model import Model
from dualout.evaluation.sampling import Sampling, build_sampler
from dualout.parameterizations.base import Route
from dualout.samplers import Sampler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUTES: dict[str, str | None] = {
    "as trained": "mix",
    "eps only": "eps",
    "x0 only": "x0",
    "velocity (r = σ²)": "velocity",
    "fixed r": None,
}
"""What the page calls them."""
MOST_IMAGES = 64
_SIDE = 128
"""Small images are shown at least this large, in pixels."""


@dataclass(frozen=True)
class Setting:
    """How images are made: what the controls of one column say."""

    run: str
    sampler: str = "ddim"
    spacing: str = "trailing"
    steps: int = 10
    eta: float = 0.0
    route: str = "as trained"
    ratio: float = 0.5
    calibrated: bool = False
    guidance: float = 1.0
    label: str | None = None
    """A class by name, or None for all in turn."""

    @property
    def spec(self) -> str:
        """The sampler with its options."""
        return f"{self.sampler}:eta={self.eta:g}" if self.eta and takes_eta(self.sampler) else self.sampler

    @property
    def sampling_route(self) -> Route:
        """The route by its name in `dualout`, or the fixed ratio."""
        if self.route not in ROUTES:
            raise unknown("route", self.route, ROUTES)
        return self.ratio if (route := ROUTES[self.route]) is None else route


@dataclass(frozen=True)
class Request:
    """What is asked for with one press of the button."""

    settings: Sequence[Setting]
    """Side by side, from the same seeds."""
    seed: int = 0
    images: int = 16
    filmed: int = 0
    """The number of the image whose film is shown."""

    def __post_init__(self) -> None:
        if not self.settings:
            raise InputError("there is no setting to make images with")
        if not 1 <= self.images <= MOST_IMAGES:
            raise InputError(f"the page makes 1 to {MOST_IMAGES} images at a time, got {self.images}")
        if not 0 <= self.filmed < self.images:
            raise InputError(f"the film is of one of images 0 to {self.images - 1}, got {self.filmed}")
        if self.seed < 0:
            raise InputError(f"the seed is 0 or more, got {self.seed}")


class Progress(NamedTuple):
    """How far a request is."""

    setting: int
    step: int
    steps: int
    picture: np.ndarray
    """The clean images as predicted so far, all images side by side, uint8 (H, W, C)."""


@dataclass
class Made:
    """What became of one setting."""

    setting: Setting
    command: str
    images: np.ndarray
    """uint8 (N, H, W, C)."""
    filmed: int
    """The number of the image of the film."""
    frames: list[Frame] = field(default_factory=list)
    """Of that image alone."""
    ratios: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """Each step's t, and r of all images and pixels; empty for single outputs."""

    @property
    def picture(self) -> np.ndarray:
        """All images side by side."""
        return sheet(self.images)

    def film(self) -> Figure:
        """The filmed image, a column a step."""
        return pictures.film(self.frames, title=f"Image {self.filmed}, step by step (t above)")

    def ratio(self) -> Figure | None:
        """r over t: mean and middle nine tenths of the pixels; None for single outputs."""
        if not self.ratios:
            return None
        t = [t for t, _ in self.ratios]
        low, high = np.array([np.quantile(r, (0.05, 0.95)) for _, r in self.ratios]).T

        def draw(axes: Any) -> None:
            axes.fill_between(t, low, high, color=canvas.COLOURS["blue"], alpha=0.2, label="90% of the pixels")
            axes.plot(t, [r.mean() for _, r in self.ratios], "o-", color=canvas.COLOURS["blue"], label="mean")
            axes.set(xlabel="t", ylabel="r", ylim=(-0.03, 1.03))
            canvas.legend_below(axes)

        return canvas.plot(draw, "r over t, in these images", height=2.6)


class Studio:
    """The models of a page.

    Args:
        runs: directories of runs or checkpoints.
        device: where they are computed.
        decode: for models of latents, as `Model.load` takes it.

    Raises:
        InputError: for a run that cannot be used.
    """

    def __init__(self, runs: Sequence[str], device: torch.device | str = "cpu", decode: str | None = None) -> None:
        self.decode = decode
        self.models = {run: Model.load(run, device, decode=decode) for run in dict.fromkeys(runs)}
        for run, model in self.models.items():
            if model.image[0] not in (1, 3):
                raise InputError(f"{run} makes images of {model.image[0]} channels; the page shows grey or colour ones")

    def routes(self, run: str) -> list[str]:
        """The routes that a model has, "as trained" first; one that reads it as an earlier one does is left out."""
        parameterization = self.models[run].denoiser.parameterization
        found: dict[Any, str] = {}
        for name in ROUTES:
            try:
                found.setdefault(parameterization.route(Setting(run, route=name).sampling_route), name)
            except InputError:
                continue  # a route that this model has not
        return list(found.values())

    def calibrations(self, run: str) -> list[str]:
        """What a model's steps are calibrated for."""
        directory = self.models[run].directory or Path(run)
        return sorted(p.stem for p in (directory / DIRECTORY).glob("*.json"))

    def sampling(self, setting: Setting, seed: int) -> Sampling:
        """A setting, checked.

        Raises:
            InputError: for what the model or the sampler has not.
        """
        if setting.run not in self.models:
            raise unknown("model", setting.run, self.models)
        model = self.models[setting.run]
        labels = None
        if model.classes is not None and setting.label is not None:
            names = model.class_names or tuple(map(str, range(model.classes)))
            if setting.label not in names:
                raise unknown("class", setting.label, names)
            labels = [names.index(setting.label)]
        return Sampling(
            model,
            build_sampler(setting.spec, setting.steps, setting.spacing, model.denoiser.schedule, model.clips()),
            setting.sampling_route,
            seed,
            labels=labels,
            guidance=setting.guidance if model.classes is not None and setting.guidance != 1 else None,
            calibrated=setting.calibrated,
        )

    def make(self, request: Request) -> Iterator[Progress | Made]:
        """Do what is asked: every step's prediction, and after each setting's last step what became of it.

        Closing the iterator stops the work at the step that is being made.

        Raises:
            InputError: before anything is made, for a setting that cannot be used.
        """
        samplings = [self.sampling(setting, request.seed) for setting in request.settings]
        for k, (setting, sampling) in enumerate(zip(request.settings, samplings, strict=True)):
            yield from self._one(k, setting, sampling, request)

    def _one(self, k: int, setting: Setting, sampling: Sampling, request: Request) -> Iterator[Progress | Made]:
        decode = self.decode if sampling.model.latents else None
        made = Made(setting, command(setting, request, decode), np.empty(0), request.filmed)
        x, output = None, sampling.model.output
        for moment in sampling.trajectory(range(request.images)):
            step = frame(moment, sampling.sampler)
            made.frames.append(seen(_only(step, request.filmed), output.seen))
            if step.ratio is not None:
                made.ratios.append((step.t, step.ratio.float().cpu().numpy()))
            x = moment.x_next
            yield Progress(k, moment.k + 1, setting.steps, sheet(_pictures(output(step.x0))))
        assert x is not None
        if not torch.isfinite(x).all():
            raise InputError(f"{setting.run}: images are not finite with {sampling.sampler.spec}; try another sampler")
        made.images = _pictures(output(x))
        yield made


def command(setting: Setting, request: Request, decode: str | None = None) -> str:
    """The command line that makes the same images."""
    parts = [
        "dualout", "sample", setting.run, "--images", str(request.images), "--seed", str(request.seed),
        "--sampler", setting.spec, "--spacing", setting.spacing, "--steps", str(setting.steps),
    ]  # fmt: skip
    if setting.sampling_route != "mix":
        parts += ["--route", str(setting.sampling_route)]
    if setting.label is not None:
        parts += ["--class_label", setting.label]
    if setting.guidance != 1:
        parts += ["--guidance", f"{setting.guidance:g}"]
    if setting.calibrated:
        parts += ["--calibrated"]
    if decode is not None:
        parts += ["--decode", decode]
    return shlex.join([*parts, "--out", "out"])


def archive(made: Sequence[Made], path: Path) -> Path:
    """Write every image as a PNG, with the command that makes it, into one zip file."""
    with zipfile.ZipFile(path, "w") as out:
        for letter, one in zip("ABCDEFGH", made, strict=False):
            out.writestr(f"{letter}/command.txt", one.command + "\n")
            out.writestr(f"{letter}/grid.png", canvas.png_of(one.picture))
            for i, image in enumerate(one.images):
                out.writestr(f"{letter}/{i:06d}.png", canvas.png_of(image))
    return path


def sheet(images: np.ndarray) -> np.ndarray:
    """Images side by side, in a square, small ones enlarged: uint8 (N, H, W, C) -> (H', W', C)."""
    columns = math.isqrt(len(images) - 1) + 1
    scale = max(1, _SIDE // images.shape[1])
    return canvas.tiles(images.repeat(scale, 1).repeat(scale, 2), columns, gap=max(1, scale // 4), fill=255)


def _pictures(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def _only(seen: Frame, image: int) -> Frame:
    """The frame of one image."""

    def one(x: Any) -> Any:
        return x[image : image + 1].cpu() if isinstance(x, torch.Tensor) else x

    return Frame(*map(one, seen))


def takes_eta(sampler: str) -> bool:
    """Whether a sampler has a number that says how much fresh noise a step adds."""
    kind = Sampler.kinds().get(sampler)
    return kind is not None and any(f.name == "eta" for f in fields(kind))


def samplers() -> list[str]:
    """The samplers that the page offers: all that need no more than their name."""
    return [name for name in Sampler.kinds() if name != "diffusers"]
