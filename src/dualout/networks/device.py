"""Where networks are computed, and how long that takes there."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dualout import processes
from dualout.errors import InputError, first_line


def device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the accelerator of this machine, or else its processor.

    Of several processes that torchrun started on a machine with several GPUs, each takes its own. A GPU that is taken
    by its number becomes torch's current one, which is what CUDA graphs, compiled kernels and pinned memory are of.

    Raises:
        InputError: when there is no such device here.
    """
    if name == "auto":
        local = processes.local_rank()
        if local is not None and torch.cuda.device_count() > local:
            return _current(torch.device("cuda", local))
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        asked = torch.device(name)
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = torch.accelerator.current_accelerator(check_available=True)
        said = first_line(error)
        # torch lists some twenty kinds that hardly anyone has
        why = "it is cpu, cuda, cuda:1, mps or auto" if said.startswith("Expected one of") else said
        raise InputError(
            f"--device {name!r} cannot be used here: {why}; this machine has cpu"
            + (f" and {here.type}" if here else "")
        ) from error
    return _current(asked)


def _current(place: torch.device) -> torch.device:
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    return place


def layout(place: torch.device) -> torch.memory_format:
    """How a network's weights and its images lie in memory while it is trained.

    Tensor cores convolve with channels last. On processors that is 11% slower for a small network, and no faster for a
    larger one. Sampled, a network is as it was loaded unless it is compiled: every group normalization makes its input
    contiguous on a GPU, and 256 images a batch are made 14% slower with channels last (docs/results/performance.md).
    """
    return torch.channels_last if place.type == "cuda" else torch.contiguous_format


def exact(place: torch.device | str) -> torch.device:
    """Where float64 is computed of what is at a place: there, or on the processor for Apple's GPUs, which have none."""
    place = torch.device(place)
    return torch.device("cpu") if place.type == "mps" else place


def double(x: Tensor) -> Tensor:
    """In float64, where that is (`exact`)."""
    return x.to(exact(x.device)).double()


def seconds(work: Callable[[], object], place: torch.device) -> float:
    """How long some work takes, its last operation on the device included."""
    _wait(place)
    begun = time.perf_counter()
    work()
    _wait(place)
    return time.perf_counter() - begun


def _wait(place: torch.device) -> None:
    if place.type != "cpu":
        torch.accelerator.synchronize(place)
