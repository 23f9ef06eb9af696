"""A training's forward and backward passes as a CUDA graph, which the host launches as one.

A network of a thousand kernels takes the host longer to launch, forward and backward, than a GPU to compute. The
optimizer and the average take a few launches each, and are not of the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dualout.denoiser import Loss
from dualout.networks.backends import graph
from dualout.training.batches import Batch
from dualout.training.learner import Learner


class RecordedGradient:
    """The gradient of a part of a batch, recorded once.

    Args:
        learner: gets it.
        gradient: adds to the gradient by a batch that lies on the device; returns the loss.
        example: a batch on the device, of the size of all. Its gradient is not left behind.

    Raises:
        NotRecorded: when the network waits for the GPU, or does what cannot be recorded; nothing has changed then.
    """

    def __init__(self, learner: Learner, gradient: Callable[[Batch], Loss], example: Batch) -> None:
        self.weights = list(learner.parameters.values())
        self.names: list[str] = []
        """Of the loss's parts."""
        self.adds = learner.config.accumulate > 1
        """Whether it adds to the gradient, as parts of a batch do, instead of making it anew."""
        buffers = list(learner.denoiser.buffers())
        before = [b.clone() for b in buffers]
        told = list(example.conditions)

        def function(images: Tensor, t: Tensor, noise: Tensor, *conditions: Tensor) -> Tensor:
            if not self.adds:
                self._forget()
            loss = gradient(Batch(example.samples, images, t, noise, dict(zip(told, conditions, strict=True))))
            self.names = list(loss.parts)
            return torch.cat([loss.total.detach()[None], *(part.detach() for part in loss.parts.values())])

        try:
            self.recording = graph.Recording(function, *_tensors(example))
            self.grads = [p.grad for p in self.weights]
            """Where the graph leaves the gradient."""
        finally:
            self._forget()
            # what a network learns without a gradient, such as the means of a batch norm, it learns of no example
            for b, value in zip(buffers, before, strict=True):
                b.copy_(value)

    def _forget(self) -> None:
        for p in self.weights:
            p.grad = None

    def __call__(self, batch: Batch) -> Loss:
        """Make the gradient, or add to it, by a batch that may lie on the host."""
        if all(p.grad is None for p in self.weights):
            for p, grad in zip(self.weights, self.grads, strict=True):
                p.grad = grad
            if self.adds:
                torch._foreach_zero_([g for g in self.grads if g is not None])  # type: ignore[attr-defined]
        total, *parts = self.recording(*_tensors(batch)).split([1, *[len(batch.t)] * len(self.names)])
        return Loss(total[0], dict(zip(self.names, parts, strict=True)))


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.images, batch.t, batch.noise, *batch.conditions.values()]
