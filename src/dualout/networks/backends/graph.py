"""CUDA graphs: what a GPU is told to do is recorded once, and then replayed without the host.

A network of a thousand kernels takes the host longer to launch than a GPU to compute, unless the batch is large. A
call of the network is recorded; and so are all K steps of a trajectory, as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualout.errors import InputError, first_line
from dualout.networks.backends.base import Backend, Call, FixedBatch
from dualout.networks.backends.half import plain_of
from dualout.networks.backends.trajectory import FixedTrajectory
from dualout.networks.precision import Precision
from dualout.randomness import Draw
from dualout.samplers import Sampler
from dualout.samplers.base import Denoises

MOST = 100
"""Evaluations of a trajectory that is recorded as a whole: a graph of 100 networks has about 100,000 kernels."""
REPAID_TRAJECTORIES = 4
"""Trajectories from which on recording one is repaid: it takes about three that are not recorded."""

_whole: ContextVar[bool] = ContextVar("whole", default=False)
"""Whether a trajectory is being recorded: the network in it is a part of that, and no recording of its own."""


@dataclass(frozen=True)
class Graph(Backend):
    """The network, and all steps of a sampler, each replayed as a CUDA graph."""

    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")
    seconds: ClassVar[float] = 0.5

    def prepare(self, network: nn.Module, call: Call, precision: Precision) -> nn.Module:
        """Recorded for one size of batch, in half precision throughout where that is asked for and the network allows
        it. In float32 the weights are shared, and may be changed where they are."""
        return replayed(plain_of(network, call, precision), call, precision)

    def fuse(
        self, denoiser: Denoises, sampler: Sampler, noise: Tensor, conditions: dict[str, Any], steps: int
    ) -> Callable[..., Tensor] | None:
        """All steps as one graph."""
        return recorded(denoiser, sampler, noise, conditions, steps)


def replayed(function: Callable[..., Tensor], call: Call, precision: Precision) -> nn.Module:
    """A network's function, recorded; while a trajectory that calls it is recorded, it is only computed.

    Args:
        function: tensors of `call`'s shapes -> the output, (B, …).
        call: an example.
        precision: that it is computed in.

    Raises:
        InputError: when it cannot be recorded.
    """
    with torch.no_grad(), precision.autocast():
        recording = Recording(function, *call.tensors)

    def run(*tensors: Tensor) -> Tensor:
        return recording.computed(*tensors) if _whole.get() else recording(*tensors)

    return FixedBatch(run, call)


def recorded(
    denoiser: Denoises, sampler: Sampler, noise: Tensor, conditions: dict[str, Any], steps: int
) -> Callable[..., Tensor] | None:
    """A sampler's trajectory, recorded; None where so few steps do not repay it. Arguments are those of `Backend.fuse`.

    Raises:
        InputError: when it cannot be recorded.
    """
    if steps < REPAID_TRAJECTORIES * sampler.evaluations:
        return None
    if sampler.evaluations > MOST:
        raise InputError(f"trajectories of more than {MOST} evaluations are not recorded as a whole")
    return RecordedTrajectory(denoiser, sampler, noise, **conditions).sample


class NotRecorded(InputError):
    """What cannot be recorded; `said` tells why."""

    def __init__(self, said: str) -> None:
        self.said = said
        super().__init__(f"this cannot be recorded as a CUDA graph: {said}; take --backend eager")


class Recording:
    """A function of tensors that tells the GPU the same work each time, recorded once.

    Args:
        function: tensors -> a tensor; never waits for the GPU.
        example: what it is called with, of the shapes and types of every call.

    Raises:
        NotRecorded: when the function waits, or does what cannot be recorded.
    """

    def __init__(self, function: Callable[..., Tensor], *example: Tensor) -> None:
        self.function = function
        self.given = [v.clone(memory_format=torch.preserve_format) for v in example]
        device = self.given[0].device
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            try:
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    # the first call may wait: for tables that are copied, and kernels that are chosen or compiled
                    function(*self.given)
                    _without_waiting(function, *self.given)
                current.wait_stream(side)
                # weights that autocast made half precision before are not of the graph, and those of the graph hold
                # nothing until it is replayed
                torch.clear_autocast_cache()
                with _generator_kept(device), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.made = function(*self.given)
            except RuntimeError as error:
                raise NotRecorded(first_line(error)) from error
            finally:
                torch.clear_autocast_cache()

    def computed(self, *tensors: Tensor) -> Tensor:
        """What the function makes of these tensors, without the recording; to the function they are those of it, so
        that what was compiled for these fits."""
        self._given(tensors)
        return self.function(*self.given)

    def _given(self, tensors: Sequence[Tensor]) -> None:
        for kept, v in zip(self.given, tensors, strict=True):
            kept.copy_(v, non_blocking=True)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """What the function makes of these tensors."""
        self._given(tensors)
        self.graph.replay()
        # the next replay writes where this one did
        return self.made.clone()


@contextmanager
def _generator_kept(device: torch.device) -> Iterator[None]:
    """After a recording that failed, torch takes its random numbers for recorded ones (pytorch issue 171263), and gives
    none any more: then go on with a copy of the generator's state."""
    generator = torch.cuda.default_generators[device.index or 0]
    spare = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(spare)
        raise


def _without_waiting(function: Callable[..., Tensor], *given: Tensor) -> None:
    """Call a function where waiting for the GPU is an error: one that is met while recording spoils the process."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*given)
    finally:
        torch.cuda.set_sync_debug_mode(before)


class RecordedTrajectory(FixedTrajectory):
    """Makes images as a sampler does, all steps one launch.

    Args:
        denoiser: plain, guided or calibrated.
        sampler: how it goes from noise to images.
        noise: an example, (B, C, H, W), on a GPU.
        conditions: that go with it; tensors are of each call, all else is as here.

    Raises:
        InputError: when the trajectory cannot be recorded.
    """

    @torch.no_grad()
    def __init__(self, denoiser: Denoises, sampler: Sampler, noise: Tensor, **conditions: Any) -> None:
        super().__init__(noise)
        noise = noise.contiguous()
        self.names = names = [name for name, v in conditions.items() if isinstance(v, Tensor)]
        self.fresh = fresh = dict[int, Tensor]()
        """By step, the fresh noise that it adds; filled before each replay."""

        # not methods: a recording that its own function held would keep its memory until the collector comes
        def draw(k: int) -> Tensor:
            if k not in fresh:
                fresh[k] = torch.zeros_like(noise)
            return fresh[k]

        def trajectory(noise: Tensor, *told: Tensor) -> Tensor:
            return sampler.sample(denoiser, noise, draw, **conditions | dict(zip(names, told, strict=True)))

        before = _whole.set(True)
        try:
            self.recording = Recording(trajectory, noise, *(conditions[name] for name in names))
        finally:
            _whole.reset(before)

    def _batch(self, noise: Tensor, draw: Draw | None, conditions: dict[str, Any]) -> Tensor:
        for k, kept in self.fresh.items():
            if draw is None:
                kept.normal_()
            else:
                kept.copy_(draw(k), non_blocking=True)
        return self.recording(noise, *(conditions[name] for name in self.names))
