"""What a training will cost, from a few images of it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dualout.data import pixels
from dualout.networks.device import seconds
from dualout.training.activations import Kept
from dualout.training.batches import Batch, Batches
from dualout.training.learner import Learner
from dualout.training.loop import Part
from dualout.training.setup import Job

_IMAGES, _REPEATS, _SECONDS = 32, 3, 2.0
"""At most so many images, so often, and fewer where a pass of them would take longer."""
_LONG = 5.0
"""Seconds of a pass after which it is not made again."""


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
    timed: int
    """Images of the pass that the times are of."""
    compiled: bool
    """Whether the network was compiled for it."""


def estimate(job: Job) -> Estimate:
    """Measure forward and backward passes of a few images; the job's weights are not changed.

    On a processor the network is not compiled: that takes minutes, and makes a step at most 1.2 times faster.
    """
    compiled = job.config.compile and job.device.type != "cpu"
    # a recording is of one size of batch, and here there are several
    config, denoiser = replace(job.config, graph=False, compile=compiled), job.denoiser
    processes = job.accelerator.num_processes if job.accelerator else 1
    learner = Learner(denoiser, config)
    images = config.batch_size // config.accumulate // processes
    with closing(Batches(job.dataset, config, denoiser.schedule.steps).after(0)) as coming:
        few = next(coming)[0].cut(0, min(images, _IMAGES))
    one = few.cut(0, 1)
    # before it may be compiled
    flops = _flops(job, one)
    part = Part(learner, job.precision)

    def timed(some: Batch) -> float:
        return seconds(lambda: part(some, last=True), job.device)

    with (kept := Kept(denoiser)):
        took = timed(one)
    activations = kept.bytes
    if images > 1:
        # not the first of all, which takes longer
        quick = took if took > _LONG and not compiled else timed(one)
        few = few.cut(0, max(2, min(len(few.samples), int(_SECONDS / quick))))
        with (kept := Kept(denoiser)):
            took = timed(few)
        # some is kept once, however many images there are: weights in half precision
        activations += (kept.bytes - activations) * (images - 1) // (len(few.samples) - 1)
    if took <= _LONG or compiled:
        # the quickest: what else the machine does is not of this training
        took = min(timed(few) for _ in range(_REPEATS))
    each = took / len(few.samples)
    learner.optimizer.zero_grad(set_to_none=True)
    parameters = sum(p.numel() for p in denoiser.parameters())
    trained = sum(p.numel() for p in learner.parameters.values())
    held = 2 * parameters + 3 * trained
    # of shards, the first process also holds the averaged weights whole
    memory = 4 * (held // processes + parameters if config.fsdp else held) + activations
    step = each * config.batch_size / processes
    return Estimate(parameters, trained, memory, step, each / 3, flops, len(few.samples), compiled)


def _flops(job: Job, batch: Batch) -> int:
    batch = batch.to(job.device)
    # the counter does not know every fused kernel of attention
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        job.denoiser(pixels.to_model(batch.images), batch.t, **batch.conditions)
    return counter.get_total_flops() // len(batch.samples)
