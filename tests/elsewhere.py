"""The meta device in a GPU's place: its tensors have no values, so that what asks for one fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TAKES_NUMBERS = frozenset(f"aten::{name}" for name in ("add", "sub", "rsub", "mul", "div", "pow"))
"""Whose kernels take a tensor of the host without dimensions as an argument; others copy it, and wait, or refuse it."""


class _NoCopies(TorchFunctionMode):
    """Notices what is made of Python's numbers, which is copied to the device below the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            assert not out.is_meta, f"{func.__name__} copies {args[0]!r} to the device"
        return out


class NoSynchronisation(TorchDispatchMode):
    """Fails where the host waits for the device or sends it data, and where tensors of both meet."""

    def __enter__(self) -> NoSynchronisation:
        self.copies = _NoCopies()
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.copies.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if not any(isinstance(v, Tensor) and v.is_meta for v in [*given, *tree_leaves(out)]):
            return out
        takes = func.name().partition(".")[0].removesuffix("_") in TAKES_NUMBERS
        for v in given:
            assert v.is_meta or (takes and v.ndim == 0), (
                f"{func.name()} on the device is given a tensor from {v.device}"
            )
        return out
