"""Building a network from a checkpoint takes no more memory than the checkpoint's weights say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dualout.checkpoint import reading
from dualout.errors import InputError


@contextmanager
def no_larger_than(path: Path) -> Iterator[None]:
    """Stop building a network that has far more weights than a safetensors file.

    A width that is damaged, or forged, would fill the memory before the weights are compared. Twice as many may be
    built, since layers that stand in for others come in addition to them.

    Raises:
        InputError: when there are more, or the file cannot be read.
    """
    sizes = [prod(shape) for shape in shapes(path)]
    with no_more_than(sum(sizes), str(path), tensors=len(sizes)):
        yield


@contextmanager
def no_more_than(numbers: int, source: str, tensors: int = 10**6) -> Iterator[None]:
    """Stop building a network that has more than twice as many weights, and a few.

    Args:
        numbers: how many there are.
        source: where, for the message.
        tensors: in how many tensors.

    Raises:
        InputError: when there are more.
    """
    left = {"tensors": 2 * tensors + 64, "numbers": 2 * numbers + 2**20}
    builder = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # the hook is every thread's
        if parameter is None or threading.get_ident() != builder:
            return
        left["tensors"] -= 1
        left["numbers"] -= parameter.numel()
        if min(left.values()) < 0:
            raise InputError(f"{source} does not fit this architecture, nothing was loaded; it holds far fewer weights")

    counting = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        counting.remove()


def shapes(path: Path) -> list[list[int]]:
    """The shapes of a safetensors file's tensors; only its header is read.

    Raises:
        InputError: when it is missing, truncated or no such file.
    """
    import safetensors

    with reading(path), safetensors.safe_open(path, "pt") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
