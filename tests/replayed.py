"""What plays a CUDA graph's part where there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Replayed:
    """In the place of `graph.Recording`: a replay computes the function from the tensors that it was given first,
    filled anew, and leaves what it makes where the recorded function did.

    Args:
        function: tensors -> a tensor.
        example: what it is called with.
        weights: whose gradients it makes, or adds to.
    """

    def __init__(self, function: Any, *example: Tensor, weights: Sequence[nn.Parameter] = ()) -> None:
        self.function, self.weights, self.given = function, weights, [v.clone() for v in example]
        for _ in range(3):  # twice before the recording, and for it
            function(*self.given)
        self.grads = [p.grad for p in weights]

    def __call__(self, *tensors: Tensor) -> Tensor:
        for kept, v in zip(self.given, tensors, strict=True):
            kept.copy_(v)
        made = self.function(*self.given)
        for p, grad in zip(self.weights, self.grads, strict=True):
            if grad is not None and p.grad is not grad:
                grad.copy_(p.grad)
                p.grad = grad
        return made.clone()
