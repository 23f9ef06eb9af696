"""An upgrade in a directory: what it makes is a checkpoint, from the first moment, and each that follows is better.

config.json  model.safetensors  README.md     the best so far; at first the original, with its gate closed
upgrade.json                                   the settings, every check, and the errors at each t before and after
training/                                      the run that fine-tunes, which goes on when it was interrupted
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from dualout import checkpoint, data, processes
from dualout.card import DECODER
from dualout.data.base import Progress
from dualout.data.dataset import Dataset
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.files import alone, explained, read_json, sweep, text_path, writable, write_json
from dualout.networks import foreign
from dualout.networks.adapter import config_of
from dualout.networks.device import device
from dualout.networks.trace import Example, call
from dualout.training import opening
from dualout.training.changes import refuse_other_images, refuse_other_source
from dualout.training.closed_form import solve
from dualout.training.estimate import Estimate, estimate
from dualout.training.noised import Bins, Noised, Stream, shuffled
from dualout.training.run import Run
from dualout.training.setup import about_data, assemble, check_data, check_fit, data_on_card, which_images
from dualout.training.upgrade import open_gate, set_scope, upgrade, upgraded_of
from dualout.training.upgrade_config import UpgradeConfig, refuse_changes

RECORD = "upgrade.json"


@dataclass(frozen=True)
class Check:
    """One look at the held-out images."""

    stage: str
    """original, closed form, or fine-tuned."""
    step: int
    seconds: float
    """Of work so far, without the looks at held-out images."""
    score: float
    """The mean over t of log(error of x0 / error before): below 0 is better."""
    worse: list[int]
    """Bins of t with a larger error than the original's, by more than is tolerated."""
    kept: bool
    """Whether it is the best so far, and was written down."""
    rows: list[dict[str, Any]]
    """A bin of t each: t, error before, error of either route now, ratio, error now."""

    @property
    def open(self) -> int:
        """In how many bins the gate is open."""
        return sum(row["open"] for row in self.rows)

    def short(self) -> dict[str, Any]:
        """Without the rows."""
        return {k: v for k, v in vars(self).items() if k != "rows"} | {"open": self.open}


class Expected(NamedTuple):
    """What an upgrade will cost."""

    cost: Estimate
    """Of its network, and of a step of its fine-tuning."""
    solved: int
    """Images in the least squares."""
    steps: int
    """Of the fine-tuning."""
    seconds: float
    """For all of it."""


class Upgrade:
    """An upgrade, from entering it: what can be refused is refused then, before any work.

    with Upgrade(UpgradeConfig(source="run", data="digits", out="run2")) as work:
        for check in work:
            print(check.stage, check.score)

    Args:
        config: of the upgrade.
        progress: told how far loading the images is, and the least squares.

    Raises:
        InputError: for a source, images or settings that cannot be used, or a directory of something else.
    """

    config: UpgradeConfig
    """From entering it on with the data that the source was trained on, where none were named."""
    dataset: Dataset
    """The images: this and what follows is there from entering it."""
    conditional: bool
    """Whether the network is told their classes."""
    held: np.ndarray
    """The numbers of the images that decide."""
    rest: np.ndarray
    """Of those that are learned from."""
    validation: Stream
    """The images that decide, each in every bin of t."""
    example: Example
    """Two of them, as the network is called."""
    denoiser: Denoiser
    """With its gate closed; the weights are changed in place."""
    closed: float
    """The ratio that uses its trained output alone."""
    before: Tensor
    """The original's errors of x0, (bins, images), once they are measured."""
    best: float
    """The score of what is written down."""
    table: list[dict[str, Any]]
    """Its rows, a bin of t each."""

    def __init__(self, config: UpgradeConfig, progress: Progress | None = None) -> None:
        self.config, self.path = config, config.path
        self.progress = progress or (lambda *_: None)
        self.run: Run | None = None
        self.checks: list[Check] = []
        self.earlier: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._stopping = False

    def stop(self) -> None:
        """End after the step that is being made, with a checkpoint."""
        self._stopping = True
        if self.run is not None:
            self.run.stop()

    def __enter__(self) -> Self:
        data_of = self.config.data or foreign.trained_on(self.config.source)
        self.config = replace(self.config, data=data_of)
        if processes.count() > 1:
            raise InputError("an upgrade is made by one process: start it without torchrun or accelerate launch")
        self._known = read_record(self.path)
        refuse_changes(self.path, self._known, self.config)
        source = self._source()
        self._divide()
        first = next(iter(self.validation))
        # a network that has a table of times may have a shorter one than the schedule
        last = torch.full_like(first.t[:2], source.schedule.steps - 1)
        self.example = (first.x0[:2], last, {k: v[:2] for k, v in first.conditions.items()})
        call(source.network, self.example)  # type: ignore[arg-type]
        self.denoiser = upgrade(source, layer=self.config.layer, example=self.example).eval()
        self.closed = upgraded_of(self.denoiser).closed
        checkpoint.describe(self.denoiser.network)
        return self

    def _source(self) -> Denoiser:
        """The original, on its device, once the images are loaded and seen to be of its kind."""
        config = self.config
        read = foreign.find(config.source, config.adapter, config.parameterization, config.schedule)
        if config.data is None:
            raise InputError(f"{config.source} does not say what it was trained on: give --data, such as digits")
        source = read()
        self._original = _fingerprint(source)
        if self._known is not None:
            refuse_other_source(self.path, self._known, config.source, self._original)
        self.conditional = bool(config_of(source.network).get("num_class_embeds"))
        training = config.training(conditional=self.conditional)
        self.dataset = data.load(
            config.data, size=config.size, grey=config.grey, cache=config.cache, progress=self.progress
        )
        if self._known is not None and self._known["data"]:
            refuse_other_images(self.path, self._known, config.data, which_images(self.dataset))
        check_data(training, self.dataset)
        check_fit(training, source, self.dataset)
        _check_size(config.source, source.network, self.dataset.size)
        self._decoder = source.card.get(DECODER)
        self._noise_levels = source.schedule.steps
        self._place = device(config.device)
        return source.to(self._place, torch.float32).eval()

    def _divide(self) -> None:
        """Set the images apart that decide."""
        config = self.config
        if config.bins > self._noise_levels:
            raise InputError(
                f"--bins {config.bins} are more than the {self._noise_levels} noise levels of {config.source}"
            )
        order = shuffled(len(self.dataset), config.seed)
        held = min(config.held_out, len(order) // 4)
        if held < opening.FEWEST:
            raise InputError(f"an upgrade needs {4 * opening.FEWEST} images or more, {config.data} has {len(order)}")
        self.held, self.rest = order[:held], order[held:]
        self.validation = self._stream(self.held, each=True)

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def finished(self) -> bool:
        """Whether the directory has all that was asked for."""
        if self._known is None or not self._known["checks"]:
            return False
        last = self._known["checks"][-1]
        if self.config.scope == "closed":
            return last["stage"] == "closed form"
        return last["step"] >= self.config.steps

    def expected(self) -> Expected:
        """Measure a step of the fine-tuning on a copy."""
        config = self.config
        tuned = 0 if config.scope == "closed" else config.steps
        denoiser = copy.deepcopy(self.denoiser)
        if tuned:
            set_scope(denoiser, config.scope, self.example)
        training = config.training(conditional=self.conditional)
        cost = estimate(assemble(training, denoiser=denoiser, dataset=self.dataset.select(self.rest)))
        solved = min(config.images, len(self.rest)) if config.start == "closed" else 0
        checks = 2 + tuned // config.check_every
        looks = solved + checks * len(self.held) * config.bins
        return Expected(cost, solved, tuned, cost.step * tuned + cost.look * looks)

    def __iter__(self) -> Iterator[Check]:
        """Do the work; yields after each look at the held-out images, the first time at the original.

        Raises:
            InputError: when the directory cannot be written in, or another process upgrades in it.
        """
        text_path(self.path)
        writable(self.path)
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with alone(self.path, "upgrading"):
            sweep(self.path)
            yield from self._stages()

    def _stages(self) -> Iterator[Check]:
        errors = self._measured(self.denoiser)
        self.before = errors.of(self.closed)
        self.best = 0.0
        if self._known is not None and self._known["checks"]:
            self.earlier = self._known["checks"]
            self.best = min(c["score"] for c in self.earlier if c["kept"])
            self.seconds = self.earlier[-1]["seconds"]
            self.table = self._known["table"]
        else:
            # before the first checkpoint: one that is killed while that is written goes on
            self.table = []
            self._record()
            yield self._check("original", 0, self.denoiser, errors)
        going_on = (self.path / "training" / "state" / "run.json").exists()
        if self.config.start == "closed":
            began = time.perf_counter()
            self._solve()
            if not going_on:
                self.seconds += time.perf_counter() - began
                yield self._check("closed form", 0, self.denoiser)
        if self.config.scope != "closed" and not self._stopping:
            yield from self._tuned()

    def _solve(self) -> None:
        """Put the new rows where least squares has them."""
        config = self.config
        stream = self._stream(self.rest[: config.images], each=False)
        told = self._told("solving", stream)
        solve(self.denoiser, told, self.before, self.dataset.channels, pixels=config.pixels, seed=config.seed)

    def _tuned(self) -> Iterator[Check]:
        config = self.config
        trained = set_scope(self.denoiser, config.scope, self.example)
        about = {"upgraded from": Path(config.source).name, "scope": config.scope, "trained parameters": trained}
        training = Run(
            config.training(conditional=self.conditional),
            denoiser=self.denoiser.train(),
            dataset=self.dataset.select(self.rest),
            about=about,
        )
        with training as self.run:
            began = time.perf_counter()
            for step in training:
                done = step.index == config.steps
                self.progress("training", step.index, config.steps)
                if done or step.index % config.check_every == 0 or self._stopping:
                    self.seconds += time.perf_counter() - began
                    yield self._check("fine-tuned", step.index, training.denoiser)
                    began = time.perf_counter()
                if self._stopping:
                    training.stop()

    def _check(self, stage: str, step: int, denoiser: Denoiser, errors: opening.Errors | None = None) -> Check:
        """Look at the held-out images, open the gate where they say so, and keep what is better."""
        errors = self._measured(denoiser) if errors is None else errors
        # before anything is trained, the new rows are zero: nothing to open the gate for
        original = stage == "original"
        found = opening.look(
            errors, self.before, self.closed, self._noise_levels, shut=original, tolerance=self.config.tolerance
        )
        kept = original or (found.score < self.best and not found.worse)
        check = Check(stage, step, round(self.seconds, 3), found.score, found.worse, kept, found.rows)
        self.checks.append(check)
        if kept:
            self.best, self.table = found.score, check.rows
            self._write(open_gate(denoiser, found.ratios), check)
        self._record()
        return check

    def _write(self, denoiser: Denoiser, check: Check) -> None:
        config, dataset = self.config, self.dataset
        denoiser.card = {
            "title": f"The dual-output upgrade of {Path(config.source).name}",
            "training": {
                "upgraded from": Path(config.source).name, "scope": config.scope, "stage": check.stage,
                "step": check.step, "seconds": check.seconds, "batch size": config.batch_size, "lr": config.lr,
                "ema": config.ema if check.stage == "fine-tuned" else None, "seed": config.seed,
                "x0 error, mean of log(after / before)": round(check.score, 4),
                "gate open in": f"{check.open} of {config.bins} parts of the noise levels",
            },
            "data": data_on_card(dataset),
        } | ({DECODER: self._decoder} if self._decoder else {})  # fmt: skip
        denoiser.save_pretrained(self.path, **about_data(dataset, conditional=self.conditional))

    def _record(self) -> None:
        content = {
            "config": self.config.asdict() | {"out": None},
            "data": which_images(self.dataset),
            "source": self._original,
            "checks": [*self.earlier, *(c.short() for c in self.checks)],
            "table": self.table,
        }
        write_json(self.path / RECORD, content, indent=1)

    def _measured(self, denoiser: Denoiser) -> opening.Errors:
        return opening.measure(denoiser, self.validation, self.config.bins)

    def _stream(self, rows: np.ndarray, *, each: bool) -> Stream:
        # what is fitted and what is looked at are noised differently
        bins = Bins(self._noise_levels, self.config.bins, self.config.seed + each)
        return Stream(self.dataset, rows, bins, self._place, conditional=self.conditional, each=each)

    def _told(self, what: str, stream: Stream) -> Iterator[Noised]:
        for done, batch in enumerate(stream, 1):
            yield batch
            self.progress(what, done, len(stream))


def read_record(path: Path) -> dict[str, Any] | None:
    """What upgrade.json says; None when there is none."""
    file = path / RECORD
    if not file.exists():
        return None
    try:
        content = read_json(file)
        # earlier versions did not say which images and which source
        told = {k: content.get(k) for k in ("data", "source")}
        return {k: content[k] for k in ("config", "checks", "table")} | told
    except (InputError, KeyError) as error:
        raise InputError(f"{file} is damaged ({error}); take another --out") from error


def _fingerprint(source: Denoiser) -> str:
    """A hash of a model's weights, and of how they are read, wherever it comes from."""
    tensors = checkpoint.tensors_of(source)
    kinds = [(x.dtype, tuple(x.shape)) for x in tensors.values()]
    return checkpoint.content_hash(repr((source.parameterization.config(), source.schedule.config(), kinds)), tensors)


def _check_size(source: str, network: Any, size: tuple[int, int]) -> None:
    """Refuse images of another size than the network was made for, which a convolutional one would take unnoticed."""
    made = config_of(network).get("sample_size")
    height, width = made if isinstance(made, list | tuple) else (made, made)
    if height is not None and (height, width) != tuple(size):
        fit = f"--size {height} makes them fit" if height == width else "give the data that size"
        raise InputError(f"{source} makes images of {height}×{width}, the data are {size[0]}×{size[1]}; {fit}")
