"""What making images will cost, from a few of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dualout.evaluation.sampling import Sampling
from dualout.networks.device import seconds

_IMAGES, _REPEATS = 16, 3
"""At most so many images are looked at, so often."""


class Cost(NamedTuple):
    """Of making images, by eager torch."""

    parameters: int
    """Of the network."""
    memory: int
    """Bytes: the weights, and what lives at once while a batch is looked at."""
    evaluations: int
    """How many times the network looks at an image, for all of them."""
    seconds: float
    """For all of them."""


def cost(samplings: Sequence[Sampling], images: int, batch_size: int) -> Cost:
    """Measure the step of each sampling with a few images.

    Args:
        samplings: of the same or of several models.
        images: how many of each.
        batch_size: how many at a time.
    """
    parts = [_of_one(sampling, images, min(batch_size, images)) for sampling in samplings]
    models = {id(s.model): s.model for s in samplings}.values()
    parameters = max(sum(p.numel() for p in model.denoiser.parameters()) for model in models)
    return Cost(
        parameters, max(p.memory for p in parts), sum(p.evaluations for p in parts), sum(p.seconds for p in parts)
    )


def _of_one(sampling: Sampling, images: int, batch: int) -> Cost:
    few, steps = min(batch, _IMAGES), sampling.sampler.steps
    weights = list(sampling.model.denoiser.parameters())
    _step(sampling, few)  # makes the tables
    with Living(weights) as living:
        _step(sampling, few)
    # the quickest: what else the machine does is not of this
    each = min(seconds(lambda: _step(sampling, few), sampling.device) for _ in range(_REPEATS)) / few
    memory = sum(p.numel() * p.element_size() for p in weights) + living.most * batch // few
    return Cost(sum(p.numel() for p in weights), memory, images * sampling.evaluations, each * images * steps)


def _step(sampling: Sampling, images: int) -> None:
    """The first step of a trajectory."""
    steps = sampling.trajectory(range(images))
    next(steps)
    steps.close()


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once.

    Args:
        known: tensors that are not counted.
    """

    most: int = 0

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._now = 0
        self._addresses = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and count what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (address := tensor.untyped_storage().data_ptr()) not in self._addresses:
                size = tensor.untyped_storage().nbytes()
                self._addresses.add(address)
                self._now += size
                self.most = max(self.most, self._now)
                weakref.finalize(tensor, self._gone, address, size)
        return result

    def _gone(self, address: int, size: int) -> None:
        self._addresses.discard(address)
        self._now -= size
