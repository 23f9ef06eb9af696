"""What is compared: methods, training seeds, samplers, spacings and steps, looked at before anything is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from dualout.errors import InputError, unknown
from dualout.files import portable
from dualout.registry import described, fits
from dualout.training.config import TrainConfig

if TYPE_CHECKING:
    from dualout.samplers import Sampler
    from dualout.schedules import Schedule


@dataclass(kw_only=True)
class Grid:
    """What is compared.

    Raises:
        InputError: for anything that cannot be used, before anything is trained.
    """

    methods: dict[str, Any] = field(default_factory=lambda: {"eps": "eps", "dual": "dual"})
    """Methods by name: a parameterization, or a mapping of training options that differ from `train`, with `routes` to
    evaluate others than mix"""
    train: dict[str, Any] = field(default_factory=dict)
    """Options of dualout train that all methods share: data, network, steps, batch_size, …"""
    training_seeds: list[int] = field(default_factory=lambda: [0])
    """Training seeds; one model of each method is trained for each"""
    samplers: list[str] = field(default_factory=lambda: ["ddim", "dpmsolver"])
    """Samplers, with options as in dpmsolver:order=3"""
    spacings: list[str] = field(default_factory=lambda: ["trailing", "linspace"])
    """Spacings; the best is chosen for each method"""
    steps: list[int] = field(default_factory=lambda: [5, 10, 20])
    """Numbers of steps"""
    calibrated: list[bool] = field(default_factory=lambda: [False])
    """Whether samplers are calibrated: [false], [true] or [false, true]"""
    also: list[dict[str, Any]] = field(default_factory=list)
    """Further parts of the grid: mappings of samplers, spacings, steps and calibrated, where these differ"""
    calibration: dict[str, Any] = field(default_factory=dict)
    """Options of the fit: iterations, batch (images for each), lr, distance, move_times, held_out …"""
    features: list[str] = field(default_factory=lambda: ["digits"])
    """Feature networks that images are compared in; spacings are chosen by the first. digits is for grey 8×8 alone; for
    others pixels, random, lite0, inception or classifier:path=FILE"""
    images: int = 2000
    """Number of images for each score"""
    split: str = "test"
    """Split of the data that samples are compared with"""
    pictures: str | None = None
    """For latents: the pictures that they were encoded from, named as data are; samples, decoded by the autoencoder
    that is the training option `decode`, are compared with these"""
    choose_seeds: list[int] = field(default_factory=lambda: [0])
    """Sets of samples that the best spacing is chosen on"""
    report_seeds: list[int] = field(default_factory=lambda: [1])
    """Sets of samples that are reported"""
    baseline: str | None = None
    """Method that the others are divided by in the summary; by default the first"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""
    precision: str = "fp32"
    """Number format of the networks in sampling: fp32, bf16, fp16, auto; for training it is an option of `train`"""
    backend: str = "eager"
    """What runs the networks in sampling: eager, graph, compile, openvino, onnx, or auto"""
    batch_size: int = 256
    """Images sampled at a time"""

    def __post_init__(self) -> None:
        # --help and a flag that cannot be read do not wait for torch
        from dualout.evaluation.features import Features
        from dualout.evaluation.sampling import build_sampler
        from dualout.evaluation.scoring import check_count
        from dualout.networks import backends
        from dualout.networks.device import device as find_device
        from dualout.networks.precision import choose
        from dualout.schedules import Schedule
        from dualout.training.calibrate import Fit

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
        if (self.decode is None) != (self.pictures is None):
            raise InputError(
                "a comparison of latents needs train: {decode: AUTOENCODER} and pictures, which decoded samples are "
                f"compared with; got decode {self.decode} and pictures {self.pictures}"
            )
        check_count(self.images)
        known = get_type_hints(Fit)
        for key in self.calibration:
            if key not in known:
                raise unknown("option of the calibration:", key, known)
        Fit(**self.calibration)
        for spec in self.features:
            Features.parse(spec)
        for part in self.parts():
            for spec, spacing, steps in product(part.samplers, part.spacings, part.steps):
                build_sampler(spec, steps, spacing)
        backends.check(self.backend, choose(self.precision, find_device(self.device)))
        for training in self.models():
            if training.config.init is None:  # the noise levels of a checkpoint are not known yet
                list(self.settings(Schedule.parse(training.config.schedule or "linear")))

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

    def settings(self, schedule: Schedule) -> Iterator[tuple[Sampler, bool]]:
        """Every sampler, and whether it is calibrated; what parts repeat comes once."""
        clip = self.decode is None
        yield from dict.fromkeys(setting for part in self.parts() for setting in part.settings(schedule, clip))

    @staticmethod
    def routes(training: Training, calibrated: bool) -> Sequence[str | float]:
        """Which of a model's outputs are read; a calibration is of the whole."""
        return ["mix"] if calibrated else training.routes

    @property
    def decode(self) -> str | None:
        """The autoencoder that decodes the samples of all models, where these are latents."""
        return self.train.get("decode")

    @property
    def sets(self) -> list[int]:
        """The sets of samples that are made."""
        return [*self.choose_seeds, *self.report_seeds]

    @staticmethod
    def _options(method: Any) -> dict[str, Any]:
        if isinstance(method, str):
            return {"parameterization": method}
        if isinstance(method, dict) and isinstance(method.get("parameterization"), str):
            return method
        raise InputError(f"a method is a parameterization, or a mapping with one; got {method!r}")

    def models(self) -> list[Training]:
        """The models that are trained."""
        from dualout.evaluation.sampling import parse_route
        from dualout.parameterizations import Parameterization

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
            config = TrainConfig(device=self.device, **options)
            if not isinstance(routes, list) or not routes:
                raise InputError(f"routes of the method {name} is a list with something in it; got {routes!r}")
            for route in routes:
                Parameterization.parse(config.parameterization or "dual").route(parse_route(str(route)))
            found.append(Training(name, seed, config, routes))
        return found


class Part(NamedTuple):
    """What is combined with each other in one part of a grid."""

    samplers: list[str]
    spacings: list[str]
    steps: list[int]
    calibrated: list[bool]

    def settings(self, schedule: Schedule, clip: bool) -> Iterator[tuple[Sampler, bool]]:
        """Every sampler, and whether it is calibrated."""
        from dualout.evaluation.sampling import build_sampler

        for spec, spacing, steps, calibrated in product(*self):
            yield build_sampler(spec, steps, spacing, schedule, clip), calibrated


class Training(NamedTuple):
    """A model of a grid."""

    method: str
    seed: int
    config: TrainConfig
    routes: Sequence[str | float]

    def directory(self, out: Path) -> Path:
        """Where it is trained: named by what it is made of."""
        # what is at its default is left out, so that an option that is new changes no name
        usual = {f.name: f.default for f in fields(TrainConfig)}
        own = {k: v for k, v in vars(self.config).items() if k not in _ELSEWHERE and v != usual[k]}
        content = hashlib.blake2b(json.dumps(own, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
        name = f"{self.method}-{content}-seed{self.seed}"
        # one that was trained before names were made for every system keeps its own
        before = out / "models" / name
        return before if before.is_dir() else out / "models" / portable(name)


_ELSEWHERE = (
    "out", "device", "fsdp", "workers", "track", "log_every", "checkpoint_every", "keep", "sample_every", "sampler",
    "decode",
)  # fmt: skip
