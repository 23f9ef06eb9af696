"""An Apple GPU in a processor's place: what it lacks is refused, everything else is computed.

A tensor that is "there" wraps one that is here. torch takes it for one of the meta device, whose guards every build
has, and the package for one of "mps".
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo  # torch imports it where it is first needed, which fails in a mode that answers for torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LACKING = frozenset({"aten::special_log_ndtr"})
"""What torch has no kernel for."""
TAKES_INDICES = frozenset({"aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_"})
"""What takes tensors of the host beside its own."""


class There(Tensor):
    """A tensor of the device."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        if here.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Apple's GPUs have no {here.dtype}")
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device="meta",
        )  # fmt: skip

    def __init__(self, here: Tensor) -> None:
        self.here = here

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("mps", 0)

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"There({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _meant(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("meta", "mps")


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, device = func.name(), kwargs.get("device")
    given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    there = {id(v.here): v for v in given if isinstance(v, There)}
    if not there and not _meant(device):
        return func(*args, **kwargs)
    if name in LACKING:
        raise NotImplementedError(f"{name} is not implemented for Apple's GPUs")
    if kwargs.get("non_blocking") or (name == "aten::copy_" and True in args[2:]):
        raise RuntimeError("what is copied without waiting is read when it may be gone (pytorch issue 83015)")
    stays = _meant(device) if device is not None else True
    if stays and there and name.partition(".")[0] not in TAKES_INDICES:
        strange = [v for v in given if not isinstance(v, There) and v.ndim]
        assert not strange, f"{name} on the device is given a tensor of the host, {tuple(strange[0].shape)}"
    told = kwargs | ({} if device is None else {"device": "cpu" if stays else device})
    out = func(*tree_map(_here, args), **tree_map(_here, told))
    # what is written in place is the same tensor as before
    return tree_map(lambda v: there[id(v)] if id(v) in there else _there(v), out) if stays else out


def _here(value: Any) -> Any:
    return value.here if isinstance(value, There) else value


def _there(value: Any) -> Any:
    return There(value) if isinstance(value, Tensor) else value


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Function(TorchFunctionMode):
    """What is done before the dispatcher, which knows no device of that name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.device, torch._C._nn._parse_to):  # type: ignore[attr-defined]
            return func(*args, **kwargs)
        if func is Tensor.tolist and isinstance(args[0], There):
            return args[0].here.tolist()
        if func in (torch.tensor, torch.as_tensor) and _meant(kwargs.get("device")) and not isinstance(args[0], Tensor):
            wanted = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs | {"device": "cpu"}).to("meta").requires_grad_(wanted)
        return func(*tree_map(_meta, args), **tree_map(_meta, kwargs))


def _meta(value: Any) -> Any:
    named = isinstance(value, str) and value.partition(":")[0] == "mps"
    return torch.device("meta") if named or (isinstance(value, torch.device) and value.type == "mps") else value


class Apple:
    """Within, "mps" is such a device."""

    def __enter__(self) -> Apple:
        self._patched = pytest.MonkeyPatch()
        known = clip_grad._device_has_foreach_support
        self._patched.setattr(clip_grad, "_device_has_foreach_support", lambda d: d.type != "meta" and known(d))
        self._patched.setattr(torch.mps, "manual_seed", torch.default_generator.manual_seed)
        self._modes = _Dispatch(), _Function()
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        self._patched.undo()


def here(values: Any) -> Any:
    """The same with every tensor on the host."""
    return tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, values)
