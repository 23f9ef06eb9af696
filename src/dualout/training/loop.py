"""The loop: a generator of steps.

    for step in train(learner, dataset):
        print(step.index, float(step.loss))

Progress bars, metrics, pictures and checkpoints are made by who consumes it; it knows of none, and prints nothing.
Nothing in a step waits for the device, except every `log_every` steps, where the means since the last such step are
read, and checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dualout.data import pixels
from dualout.data.dataset import Dataset, check_dataset
from dualout.denoiser import Denoiser, Loss
from dualout.errors import InputError
from dualout.networks.backends.compile import refused
from dualout.networks.backends.graph import NotRecorded
from dualout.networks.norms import write_out
from dualout.networks.precision import Precision, choose
from dualout.training import draws
from dualout.training.batches import Batch, Batches, images_of
from dualout.training.learner import Learner
from dualout.training.meter import Meter
from dualout.training.recorded import RecordedGradient

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True)
class Step:
    """One update of the weights. Tensors lie on the device; reading one waits for it."""

    index: int
    """Its number, counted from 1."""
    loss: Tensor
    """The loss before it, of this process's images: a scalar."""
    parts: dict[str, Tensor]
    """The loss's parts by name, unweighted: scalars."""
    grad_norm: Tensor
    """The norm of the gradient, before it was clipped: a scalar; 0 where fp16 overflowed, and no update was made."""
    lr: float
    """The learning rate."""
    metrics: dict[str, float] | None
    """Every `log_every` steps, and at the last: means since then over all processes, as numbers: loss, parts as
    ``loss/NAME``, grad_norm, and lr, images_per_s, seconds."""
    learner: Learner
    """The weights after it, and their average (`learner.ema`)."""

    def values(self) -> dict[str, Tensor]:
        """All that was measured, by the names that metrics use."""
        return {"loss": self.loss, **{f"loss/{k}": v for k, v in self.parts.items()}, "grad_norm": self.grad_norm}


class NotFinite(InputError):
    """The loss, or its gradient, is no number."""

    def __init__(self, step: int, images: list[int]) -> None:
        self.step, self.images = step, images
        super().__init__(f"the loss is not finite at step {step}, whose batch is of the images {images}")


class Objective(nn.Module):
    """A denoiser's loss as a module's forward, which is what data parallelism wraps."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x0: Tensor, t: Tensor, noise: Tensor, conditions: dict[str, Tensor]) -> Loss:
        """The loss of clean images with given noise."""
        return self.denoiser.loss(x0, t, noise, **conditions)


def train(
    learner: Learner,
    dataset: Dataset,
    *,
    accelerator: Accelerator | None = None,
    precision: Precision | None = None,
    meter: Meter | None = None,
) -> Generator[Step, None, None]:
    """Train from `learner.step` to `learner.config.steps`.

    Args:
        learner: what is trained, with its configuration.
        dataset: the images.
        accelerator: of several processes; None is this one alone.
        precision: of the network; None chooses by the configuration.
        meter: the sums since the last metrics, when a run goes on.

    Raises:
        NotFinite: when the loss or its gradient is no number; on a GPU it is noticed at the next `log_every`.
    """
    check_dataset(dataset)
    config = learner.config
    device = next(iter(learner.parameters.values())).device
    processes, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    part = Part(learner, precision or choose(config.precision, device), accelerator if processes > 1 else None)
    meter = Meter(accelerator) if meter is None else meter
    cuda = device.type == "cuda"
    batches = Batches(dataset, config, learner.denoiser.schedule.steps, rank=rank, processes=processes, cuda=cuda)
    with closing(batches.after(learner.step)) as coming:
        meter.resume()
        for batch in coming:
            step = _step(learner, part, batch)
            meter.add(step.index, step.values(), config.batch_size)
            due = step.index % config.log_every == 0 or step.index == config.steps
            # on a processor it is free to look; a GPU would be waited for
            if (due or device.type == "cpu") and (bad := meter.first_bad()):
                raise NotFinite(bad, images_of(bad, dataset, config))
            metrics = meter.read() | {"lr": step.lr} if due else None
            meter.pause()
            yield replace(step, metrics=metrics)
            meter.resume()


class Part:
    """The gradient of one part of a batch.

    Args:
        learner: gets it.
        precision: of the network.
        together: the processes that the gradient is averaged over; None for one alone.
    """

    def __init__(self, learner: Learner, precision: Precision, together: Accelerator | None = None) -> None:
        self.learner, self.precision = learner, precision
        self.device = next(iter(learner.parameters.values())).device
        objective: nn.Module = Objective(learner.denoiser)
        self.apart: Callable[[], AbstractContextManager[Any]] = nullcontext
        # shards average their gradients themselves
        if together is not None and not learner.sharded:
            objective = together.prepare_model(objective, device_placement=False)
            self.apart = objective.no_sync  # type: ignore[assignment]
        self.objective = objective
        self.compiled: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.layout = torch.channels_last if learner.config.channels_last else torch.contiguous_format
        if learner.config.compile:
            network: nn.Module = learner.denoiser.network  # type: ignore[assignment]
            # a step of DDPM's network for CIFAR-10 takes 23.9 instead of 27.6 ms of an H200
            if self.device.type == "cuda" and self.layout is torch.channels_last:
                write_out(network)
            network.compile()
            self.compiled = _compiled
        self.seed = _seeding(self.device)
        self.record = bool(learner.config.graph)
        """Whether its work is to be recorded."""
        self.recorded: RecordedGradient | None = None

    def __call__(self, batch: Batch, last: bool) -> Loss:
        """Add to the gradient; the last part of a batch also averages it over the processes."""
        if self.record and self.recorded is None:
            self._record(batch)
        # dropout draws from torch's own generator
        self.seed(draws.dropout(self.learner.config.seed, int(batch.samples[0])))
        if self.recorded is not None:
            return self.recorded(batch)
        with self.compiled(), nullcontext() if last else self.apart():
            return self.gradient(batch.to(self.device))

    def _record(self, batch: Batch) -> None:
        try:
            self.recorded = RecordedGradient(self.learner, self.gradient, batch.to(self.device))
        except NotRecorded as error:
            self.record = False
            warnings.warn(
                f"a step cannot be recorded as a CUDA graph ({error.said}): its kernels are launched one by one",
                stacklevel=2,
            )

    def gradient(self, batch: Batch) -> Loss:
        """Add to the gradient by a batch that lies on the device."""
        x0 = pixels.to_model(batch.images).contiguous(memory_format=self.layout)
        with self.precision.autocast():
            loss = self.objective(x0, batch.t, batch.noise, batch.conditions)
        self.learner.backward(loss.total / self.learner.config.accumulate)
        return loss


def _seeding(device: torch.device) -> Callable[[int], object]:
    """Seeds the generator that a device's own random numbers come from."""
    if device.type == "cpu":
        return torch.default_generator.manual_seed
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0].manual_seed
    return torch.get_device_module(device).manual_seed


@contextmanager
def _compiled() -> Iterator[None]:
    """Tell why a network cannot be compiled, which shows when it is first used, forward or backward."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise refused(error, "leave out --compile") from error


def _step(learner: Learner, part: Part, batches: list[Batch]) -> Step:
    losses = [part(batch, last=batch is batches[-1]) for batch in batches]
    lr, norm = learner.update()
    with torch.no_grad():
        total = torch.stack([loss.total for loss in losses]).mean()
        parts = {k: torch.cat([loss.parts[k] for loss in losses]).mean() for k in losses[0].parts}
    return Step(learner.step, total.detach(), parts, norm, lr, None, learner)
