"""A training in a directory: it goes on from where it was, and can be stopped at any moment.

with Run(TrainConfig(data="digits", steps=1000, out="runs/digits")) as run:
    for step in run:
        print(step.index, float(step.loss))
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import yaml

from dualout.card import DECODER, autoencoder_in, decoder_of, heading
from dualout.checkpoint import entry, read_card, read_config
from dualout.data.base import Progress
from dualout.data.dataset import Dataset
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.training import tracking
from dualout.training.batches import images_of
from dualout.training.changes import refuse_changes, refuse_other_network
from dualout.training.checkpoint import RunDirectory, damaged, read_run, read_state, states
from dualout.training.config import TrainConfig
from dualout.training.learner import Learner
from dualout.training.loop import NotFinite, Step, train
from dualout.training.meter import Meter
from dualout.training.setup import (
    Job,
    about_data,
    assemble,
    data_on_card,
    describe,
    described_now,
    several_processes,
    which_images,
)


class Run:
    """A training whose directory is `config.out`.

    Entering it loads everything and resumes what is there; iterating trains, one step at a time, writing metrics and
    checkpoints on the way. What a step's consumer writes (a grid of samples) is written before that step's checkpoint.

    A run that is interrupted, at any moment, and resumed ends in the same weights as one that is not: bit for bit on
    the same machine with the same number of threads, to rounding elsewhere.

    Args:
        config: of the training.
        denoiser: to train, where it is not to be built from the configuration; weights that do not require gradients
            stay as they are.
        dataset: to learn from, where it is not to be loaded; it gives `config.data` its name where that is left out.
        about: further rows for the model card's table of the training.
        progress: called with how far loading the images is.

    Raises:
        InputError: on entering, for anything that cannot be used: also when the directory is of a run with another
            configuration, which the message compares, or is in use.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        denoiser: Denoiser | None = None,
        dataset: Dataset | None = None,
        about: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        if isinstance(dataset, Dataset) and config.data == TrainConfig.data:
            # nothing was said of the data's name, and what was not loaded by the default one is not called by it
            config = replace(config, data=dataset.name)
        self.config = config
        self.path = Path(config.out or config.default_out()).expanduser()
        self._given, self._dataset, self._about, self._progress = denoiser, dataset, about or {}, progress
        self._directory: RunDirectory | None = None
        self._stopping = False
        self._tracker: tracking.Tracker = tracking.NoTracker()

    job: Job
    """What the configuration comes to here: images, network, device, precision. Its `config` has what was left to the
    machine (channels_last, graph), and the training goes by it; the run's own is as asked for, and is written down."""
    learner: Learner
    """The weights."""
    started: int
    """The step it went on from; 0 when it is new."""

    @property
    def finished(self) -> bool:
        """Whether all its steps are done."""
        return self.learner.step >= self.job.config.steps

    @property
    def denoiser(self) -> Denoiser:
        """With the averaged weights: the one to use."""
        return self.learner.ema

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self._group is None or self._group.is_main_process

    def stop(self) -> None:
        """End after the step that is being made, with a checkpoint."""
        self._stopping = True

    def __enter__(self) -> Self:
        self._group = several_processes(self.config)
        try:
            known = self._together(self._open)
            self._prepare(known)
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, failed: type[BaseException] | None = None, *_: object) -> None:
        self._tracker.finish()
        if self._directory is not None:
            if failed is not None:
                self._directory.withdraw()
            self._directory.close()

    def __iter__(self) -> Iterator[Step]:
        """Train to the end, or until `stop`.

        Raises:
            InputError: when the loss is no number, or a checkpoint cannot be written.
        """
        if not hasattr(self, "job"):
            raise InputError("a run is entered before it trains: with Run(config) as run, and in it: for step in run")
        every, job = self.config.checkpoint_every, self.job
        try:
            for step in train(
                self.learner, job.dataset, accelerator=self._group, precision=job.precision, meter=self._meter
            ):
                if step.metrics and self._directory:
                    self._directory.log({"step": step.index, **step.metrics})
                    self._tracker.log(step.metrics, step.index)
                yield step
                stop = self._agreed_to_stop(step)
                if stop or self.finished or step.index % every == 0:
                    self.save()
                if stop:
                    return
        except NotFinite as error:
            raise InputError(f"{error}. {self._last_good()}") from error

    def save(self) -> None:
        """Write a checkpoint: the state to go on from, then the averaged weights.

        Raises:
            InputError: when weights are no numbers, or the disk is full; the checkpoint before is whole then.
        """
        bad = self._meter.first_bad() or (0 if self.learner.finite() else self.learner.step)
        if bad:
            raise NotFinite(bad, images_of(bad, self.job.dataset, self.config))
        numbers = self.learner.numbers() | {"meter": self._meter.state()}
        # of all processes, where each has a part
        tensors = self.learner.tensors()
        self.learner.gather()
        if self._directory is not None:
            self._directory.flush_log()
            self._directory.save(tensors, numbers, self.config.keep)
            self._publish()
        if self._group is not None:
            self._wait()

    def _wait(self) -> None:
        """For all processes."""
        assert self._group is not None
        if self._group.device.type == "cpu":
            # accelerate would ask for the GPU of this process's number, which there need not be
            torch.distributed.barrier()
        else:
            self._group.wait_for_everyone()

    def _together(self, work: Callable[[], Any]) -> Any:
        """Do something in the process that writes; all get its result, or its error."""
        if self._group is None:
            return work()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except InputError as error:
                outcome[1] = str(error)
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise InputError(outcome[1])
        return outcome[0]

    def _open(self) -> dict[str, Any] | None:
        """Take the directory; returns what the run in it is, None for a new one."""
        tracking.check(self.config.track)
        self._directory = RunDirectory(self.path)
        # one that never came to a checkpoint has nothing to go on from, and may begin in another way
        known = read_run(self.path) if states(self.path) else None
        if known is not None:
            refuse_changes(self.path, known, self.config)
        return known

    def _prepare(self, known: dict[str, Any] | None) -> None:
        state = read_state(self.path)
        config = self.config
        if known is not None and config.precision == "auto":
            config = replace(config, precision=known["precision"])
        if known is not None and config.decode is None:
            config = replace(config, decode=known["config"].get("decode"))
        self.job = assemble(config, denoiser=self._given, dataset=self._dataset, known=known, progress=self._progress)
        if config.precision != self.config.precision:
            self.job = self.job._replace(precision=self.job.precision._replace(why="as when the run began"))
        self.learner = Learner(self.job.denoiser, self.job.config, scaled=self.job.precision.name == "fp16")
        self._meter = Meter(self._group)
        if state is not None:
            tensors, numbers, place = state
            try:
                self._meter.load(numbers["meter"])
                self.learner.load(tensors, numbers, str(place))
            except InputError:
                raise
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise damaged(place, error) from error
        self.started = self.learner.step
        self._together(lambda: self._write_down(known))
        if self.config.fsdp:
            self.learner.shard(self.job.mesh(), first=self.main)

    def _write_down(self, known: dict[str, Any] | None) -> None:
        """Write what the run is, when it is what it was; and what a crash left half done."""
        assert self._directory is not None
        run = self._run = self._description()
        if known is not None and known["denoiser"] != run["denoiser"]:
            known = known | {"denoiser": described_now(known["denoiser"])}
            refuse_other_network(self.path, known, run["denoiser"])
        self._directory.describe(run, yaml.safe_dump(run["config"], sort_keys=False, allow_unicode=True))
        self._directory.repair_log(self.started)
        # other commands read there where images and an autoencoder lie, and these may have moved
        published = self._published()
        told = entry(published, "data").get("name"), decoder_of(published)
        if self.started and told != (self.job.dataset.name, autoencoder_in(self.job.config.decode)):
            self._publish()
        self._tracker = tracking.start(self.config.track, self.path, self.config.asdict(), self.started)

    def _description(self) -> dict[str, Any]:
        config, dataset = self.config.asdict() | {"decode": self.job.config.decode}, self.job.dataset
        config.pop("out")
        return {
            "format": 1,
            "config": config,
            "precision": self.job.precision.name,
            "denoiser": describe(self.job.denoiser),
            "data": which_images(dataset),
        }

    def _published(self) -> dict[str, Any]:
        """The configuration of the averaged weights in the directory; empty where they are not those of this step."""
        try:
            config = read_config(self.path)
        except InputError:
            return {}
        return config if entry(config, "training").get("step") == self.learner.step else {}

    def _publish(self) -> None:
        config, dataset, ema = self.config, self.job.dataset, self.learner.ema
        decoder = autoencoder_in(self.job.config.decode)
        about = {
            "data": config.data, "images": len(dataset), "step": self.learner.step, "batch size": config.batch_size,
            "images seen": self.learner.step * config.batch_size, "lr": config.lr, "warm-up": config.warmup,
            "ema": config.ema, "precision": self.job.precision.name, "seed": config.seed,
            "parameters": sum(p.numel() for p in ema.parameters()), "seconds": round(self._meter.seconds, 1),
        }  # fmt: skip
        if config.init:
            about["started from"] = config.init
        ema.card = {
            "title": f"{heading(ema.parameterization.name)} of {config.data}",
            "training": about | self._about,
            "data": data_on_card(dataset),
        } | ({DECODER: decoder} if decoder else {})
        if scores := read_card(self._published()).get("metrics"):
            ema.card["metrics"] = scores
        training = {"step": self.learner.step, **self._run["config"], "precision": self.job.precision.name}
        ema.save_pretrained(self.path, training=training, **about_data(dataset, conditional=config.conditional))

    def _agreed_to_stop(self, step: Step) -> bool:
        if self._group is None:
            return self._stopping
        if self.job.device.type != "cpu" and step.index % _ASKED_EVERY:
            return False
        wish = torch.tensor(float(self._stopping), device=self.job.device)
        return bool(self._group.reduce(wish, "sum") > 0)  # type: ignore[operator]

    def _last_good(self) -> str:
        found = states(self.path)
        if not found:
            clip = "--grad_clip" if self.config.grad_clip else "clip gradients (--grad_clip 1)"
            return f"There is no checkpoint yet. Lower --lr or {clip}, or look at these images"
        step, _ = found[-1]
        return (
            f"Nothing of it was saved: the last good checkpoint is that of step {step}, in {self.path}. To go on from "
            f"it with another --lr or --grad_clip, start a run with --init {shlex.quote(str(self.path))}; or look at "
            "these images"
        )


_ASKED_EVERY = 10
"""On GPUs, several processes agree on stopping every so many steps, since asking waits for the device."""
