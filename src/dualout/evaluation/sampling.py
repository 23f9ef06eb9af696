"""How image i is made, for every i."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualout.calibrated import Calibrated, Calibration
from dualout.errors import InputError
from dualout.evaluation.computing import Computing
from dualout.evaluation.model import Model
from dualout.evaluation.protocol import software
from dualout.guidance import ClassifierFree
from dualout.networks import backends
from dualout.networks.precision import Precision, choose
from dualout.parameterizations.base import Route
from dualout.randomness import SeededDraw, noise
from dualout.samplers import Sampler
from dualout.samplers.base import Denoises, Moment, each_within
from dualout.schedules import Schedule


def build_sampler(
    spec: str, steps: int, spacing: str | None = None, schedule: Schedule | None = None, clip: bool = True
) -> Sampler:
    """A sampler from its options on the command line.

    Args:
        spec: its name, perhaps with options: ``ddim``, ``ddpm:variance=small``.
        steps: K.
        spacing: a name of `dualout.samplers.SPACINGS`; None leaves it to the sampler.
        schedule: checked for having K steps.
        clip: False turns the clipping of predicted clean images off.

    Raises:
        InputError: for unknown names, K < 1, K > T, or `steps` or `spacing` given twice.
    """
    asked: dict[str, Any] = {"steps": steps} if spacing is None else {"steps": steps, "spacing": spacing}
    sampler = Sampler.parse(spec, **asked, **({} if clip else {"clip": None}))
    for name, value in asked.items():
        if getattr(sampler, name) != value:
            raise InputError(f"sampler {spec!r} says {name} itself: leave it out there, --{name} says {value}")
    if schedule is not None:
        sampler.timesteps(schedule)
    return sampler


def parse_route(text: str) -> Route:
    """A route's name, or a fixed ratio from 0 to 1."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_interval(text: str | None) -> tuple[float, float] | None:
    """Two noise levels with a comma between: which are guided."""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise InputError(
            f"--guidance_interval is two noise levels (sigma / alpha) with a comma between, as in 0.2,5; got {text}"
        ) from None
    return low, high


def interval_text(interval: Sequence[float] | None) -> str:
    """As `parse_interval` reads it."""
    return ",".join(f"{level:g}" for level in interval or ())


@dataclass(eq=False)
class Sampling:
    """A model, a sampler and seeds: all that image i depends on.

    Attributes:
        model: the denoiser, with its checkpoint.
        sampler: how it goes from noise to images.
        route: which of the network's outputs is used.
        seed: of image 0; image i is made from seed + i, whatever batch it is in.
        labels: the class of image i is labels[i mod their number]; None is all classes that it was trained on, in turn.
        guidance: scale of classifier-free guidance; None is none, and so is 1.
        guidance_interval: the noise levels that are guided, sigma / alpha from above the first number to the second;
            None is all.
        precision: of the network: "fp32", "bf16", "fp16", "auto".
        calibrated: apply the calibration that was found for this sampler.
        backend: what computes the network: "eager", "graph", "compile", "openvino", "onnx", or "auto", the one that
            measures fastest. Images are eager's within `dualout.networks.backends.TOLERANCE` of the network's output.

    Raises:
        InputError: for a route that the model has not, labels that it does not know, or a precision or backend that
            its device does not compute.
    """

    model: Model
    sampler: Sampler
    route: Route = "mix"
    seed: int = 0
    labels: Sequence[int] | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    precision: str = "fp32"
    calibrated: bool = False
    backend: str = "eager"
    calibration: Calibration | None = field(init=False, default=None)
    """What is applied, when it is."""
    stepping: Sampler = field(init=False, repr=False)
    """The sampler at the time steps that are visited: its own, or those of the calibration."""
    view: Denoises = field(init=False, repr=False)
    """The denoiser as it is read: by one route, guided."""
    computed_in: Precision = field(init=False, repr=False)
    """The number format of the network, and its device."""

    def __post_init__(self) -> None:
        self.labels = self._checked_labels()
        self.sampler.timesteps(self.model.denoiser.schedule)
        self.computed_in = choose(self.precision, self.device)
        backends.check(self.backend, self.computed_in)
        routed = self.model.denoiser.route(self.route)
        self.stepping = self.sampler
        view: Denoises = routed
        if self.calibrated:
            self.calibration = self._own_calibration()
            view = Calibrated.of(view, self.calibration)
            if list(self.calibration.times) != self.sampler.timesteps(self.model.denoiser.schedule):
                self.stepping = self.sampler.at(self.calibration.times)
        if self.guidance is None and self.guidance_interval is not None:
            raise InputError("an interval of guidance needs a scale: say --guidance too, such as --guidance 2")
        if self.guidance not in (None, 1) and self.model.classes is not None:
            if self.model.classes in self.model.unseen:
                raise InputError(
                    f"{self.model.run} was trained with --label_dropout 0, never without a class, which is what "
                    "guidance leads away from: leave out --guidance, or train with --label_dropout 0.1"
                )
            view = ClassifierFree(view, self.guidance, interval=self.guidance_interval, class_labels=self.model.classes)
            self._check_guided(view)
        self.view = view
        self._computing = Computing(self.model, routed, view, self.stepping, self.backend, self.computed_in)

    def _check_guided(self, view: ClassifierFree) -> None:
        schedule = self.model.denoiser.schedule
        times = self.stepping.timesteps(schedule)
        if not any(map(view.guides, times)):
            sigma_alpha = [schedule.scalars(t).sigma / schedule.scalars(t).alpha for t in times]
            raise InputError(
                f"--guidance_interval {interval_text(view.interval)} holds none of the noise levels (sigma / alpha) of "
                f"{self.sampler.spec}: {', '.join(f'{level:.3g}' for level in sigma_alpha)}"
            )

    def _own_calibration(self) -> Calibration:
        if self.route != "mix":
            raise InputError(f"calibrations are fitted to the trained blend, route mix; got route {self.route}")
        # a name that is no directory any more could be that of a repository
        found = Calibration.load(self.model.directory or self.model.run, self.sampler.config())
        if found.protocol.get("weights", self.model.details["sha256"]) != self.model.details["sha256"]:
            raise InputError(
                f"the calibration of {self.model.run} for {self.sampler.spec} was fitted to other weights; run dualout "
                "calibrate again"
            )
        return found

    def _checked_labels(self) -> tuple[int, ...] | None:
        classes, run = self.model.classes, self.model.run
        if classes is None:
            if self.labels is not None or self.guidance is not None:
                raise InputError(f"{run} was trained without classes: leave out --class_label and --guidance")
            return None
        labels = tuple(self.model.turn if self.labels is None else self.labels)
        wrong = [label for label in labels if not 0 <= label <= classes]
        if wrong or not labels:
            raise InputError(f"class labels of {run} are 0 to {classes - 1}, and {classes} for none; got {wrong}")
        return labels

    @property
    def device(self) -> torch.device:
        """Where the images are made."""
        return self.model.device

    @property
    def evaluations(self) -> int:
        """How many times the network is evaluated for an image (NFE); twice at a step that is guided."""
        if not isinstance(self.view, ClassifierFree):
            return self.sampler.evaluations
        looks = self.stepping.looks(self.stepping.timesteps(self.model.denoiser.schedule))
        return sum(1 + self.view.doubles(t) for t in looks)

    def images(self, indices: Sequence[int]) -> Tensor:
        """The images with these numbers, as one batch: uint8 (B, C, H, W), on the CPU; latents are float32.

        Raises:
            InputError: when an image is not finite.
        """
        self.prepare(len(indices), self.sampler.evaluations)
        x0 = self._computing.sample(*self._inputs(indices))
        if not torch.isfinite(x0).all():
            bad = [i for i, x in zip(indices, x0, strict=True) if not torch.isfinite(x).all()]
            raise InputError(
                f"{self.model.run}: {len(bad)} of {len(x0)} images are not finite (image {bad[0]} is one), sampled by "
                f"{self.sampler.spec} in {self.computed_in.name}; try --precision fp32, or another sampler"
            )
        return self.model.output(x0)

    def trajectory(self, indices: Sequence[int]) -> Generator[Moment, None, None]:
        """The way of these images, one step at a time: eager torch's steps, by the network as it was prepared."""
        start, draw, conditions = self._inputs(indices)
        moments = self.stepping.trajectory(self.view, start, draw, **conditions)
        yield from each_within(self.computed_in.autocast, moments)

    def _inputs(self, indices: Sequence[int]) -> tuple[Tensor, SeededDraw | None, dict[str, Any]]:
        """What a sampler is given for these images: their noise, the fresh noise of each step, and their conditions."""
        seeds, shape = [self.seed + i for i in indices], self.model.shape
        draw = SeededDraw(seeds, shape, device=self.device) if self.sampler.stochastic else None
        return noise(seeds, shape, device=self.device), draw, dict(self._conditions(indices))

    def _conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        if self.labels is None:
            return {}
        chosen = [self.labels[i % len(self.labels)] for i in indices]
        return {"class_labels": torch.tensor(chosen, device=self.device)}

    def prepare(self, batch_size: int, calls: int, own: int | None = None) -> None:
        """Get the backend ready, unless it is.

        Args:
            batch_size: how many images will be made at a time.
            calls: how often the network will be called, by this sampling and others of the model; "auto" prepares
                what so many calls repay.
            own: of these, by this sampling; None is all.

        Raises:
            InputError: when the backend cannot compute this network, or not near enough to eager.
        """
        if not self._computing.ready:
            start, _, conditions = self._inputs(range(batch_size))
            self._computing.prepare(start, conditions, calls, own or calls)

    def release(self) -> None:
        """Let go of what `prepare` made, which of a GPU's memory is more than the network; what computed the images
        stays known, and images that are asked for again prepare it again."""
        self._computing.release()

    def batches(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """Images 0 … count − 1, in batches, as of `images`."""
        for start in range(0, count, batch_size):
            yield self.images(range(start, min(start + batch_size, count)))

    def protocol(self) -> dict[str, Any]:
        """All that the images depend on, as plain JSON values."""
        return {
            "model": self.model.protocol(),
            "route": self.route,
            "sampler": self.sampler.config(),
            "times": self.stepping.timesteps(self.model.denoiser.schedule),
            "spacing": self.sampler.config()["spacing"],
            "steps": self.sampler.steps,
            "nfe": self.evaluations,
            "seed": self.seed,
            "seeds": "image i is made from seed + i",
            "class_labels": None if self.labels is None else list(self.labels),
            "guidance": self.guidance,
            "precision": self.computed_in.name,
            "calibration": None if self.calibration is None else self.calibration.record(),
            **self.model.output.protocol(),
            **({} if self.guidance_interval is None else {"guidance_interval": list(self.guidance_interval)}),
        } | ({} if self.backend == "eager" else {"backend": self.backend})

    def computed(self) -> dict[str, Any]:
        """What computed the images, as plain JSON values: software, device, and the backends of the network and of the
        rest of a step."""
        return software(self.device) | {"computed_by": self._computing.record()}
