"""What a training will cost, from a few images of it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dualout.data import pixels
from dualout.networks.device import seconds
from dualout.training.batches import Batch, Batches
from dualout.training.learner import Learner
from dualout.training.loop import Part
from dualout.training.setup import Job

_IMAGES, _REPEATS, _SECONDS = 32, 3, 2.0
"""At most so many images, so often, and fewer where a pass of them would take longer."""


class Estimate(NamedTuple):
    """Of one process."""

    parameters: int
    """Of the network."""
    trained: int
    """How many of them are trained."""
    memory: int
    """Bytes: weights, their averages, gradients, the optimizer's two moments and what the backward pass keeps."""
    step: float
    """Seconds."""
    look: float
    """Seconds that the network takes to look at one image: of the three passes of a step, its first."""
    flops: int
    """Floating-point operations of the network's forward pass, for one image; a multiplication and an addition are two.
    A step of training makes about three times as many for each image of the batch."""


def estimate(job: Job) -> Estimate:
    """Measure forward and backward passes of a few images; the job's weights are not changed."""
    # a recording is of one size of batch, and here there are several
    config, denoiser = replace(job.config, graph=False), job.denoiser
    learner = Learner(denoiser, config)
    images = config.batch_size // config.accumulate
    with closing(Batches(job.dataset, config, denoiser.schedule.steps).after(0)) as coming:
        few = next(coming)[0].cut(0, min(images, _IMAGES))
    one = few.cut(0, min(len(few.samples), 2))
    # before it may be compiled
    flops = _flops(job, one)
    part = Part(learner, job.precision)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        part(one, last=True)
    each = seconds(lambda: part(one, last=True), job.device) / len(one.samples)
    few = few.cut(0, max(1, min(len(few.samples), int(_SECONDS / each))))
    # the quickest: what else the machine does is not of this training
    each = min(seconds(lambda: part(few, last=True), job.device) for _ in range(_REPEATS)) / len(few.samples)
    learner.optimizer.zero_grad(set_to_none=True)
    weights = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    activations = sum(size for place, size in kept.items() if place not in weights) * images / len(one.samples)
    parameters = sum(p.numel() for p in denoiser.parameters())
    trained = sum(p.numel() for p in learner.parameters.values())
    processes = job.accelerator.num_processes if job.accelerator else 1
    held = 2 * parameters + 3 * trained
    # of shards, the first process also holds the averaged weights whole
    memory = 4 * (held // processes + parameters if config.fsdp else held) + int(activations)
    return Estimate(parameters, trained, memory, each * config.batch_size / processes, each / 3, flops)


def _flops(job: Job, batch: Batch) -> int:
    batch = batch.to(job.device)
    # the counter does not know every fused kernel of attention
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        job.denoiser(pixels.to_model(batch.images), batch.t, **batch.conditions)
    return counter.get_total_flops() // len(batch.samples)
