"""In which number format a network is computed, and why.

The weights stay float32. `Precision.autocast` computes the network's matrix products and convolutions in half
precision. On processors attention is kept in float32: its backward pass in bfloat16 is two to four times slower there
(see docs/results/performance.md), and is what makes bfloat16 training look slow. Its narrow heads are widened with
zeros, which costs less than the matrix products of narrow ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dualout.errors import InputError, unknown

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(NamedTuple):
    """A number format for a device."""

    name: str
    """fp32, bf16 or fp16."""
    device: torch.device
    why: str
    """In words, for the log."""

    @property
    def dtype(self) -> torch.dtype:
        """The format of matrix products and convolutions."""
        return DTYPES[self.name]

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute what is called inside in this format."""
        with ExitStack() as stack:
            if self.name != "fp32":
                stack.enter_context(torch.autocast(self.device.type, dtype=self.dtype))
                if self.device.type == "cpu":
                    stack.enter_context(_Attention())
            yield


def choose(name: str, device: torch.device) -> Precision:
    """The precision called `name`, or for "auto" the fastest that is safe on this device.

    Raises:
        InputError: for an unknown name, or a precision that the device does not compute.
    """
    if name == "auto":
        return _fastest(device)
    if name not in DTYPES:
        raise unknown("precision", name, ["auto", *DTYPES])
    if name == "fp16" and device.type == "cpu":
        raise InputError("fp16 is for GPUs; on a processor take --precision bf16 or fp32")
    return Precision(name, device, "as asked")


def _fastest(device: torch.device) -> Precision:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", device, f"{torch.cuda.get_device_name(device)} computes it natively")
        return Precision("fp16", device, f"{torch.cuda.get_device_name(device)} has no bf16")
    if device.type == "cpu":
        units = processor_units()
        if units:
            return Precision("bf16", device, f"this processor has {units}")
        return Precision("fp32", device, "this processor has no bfloat16 units")
    return Precision("fp32", device, f"the safe choice on {device.type}")


def processor_units() -> str:
    """Which units of this processor compute in bfloat16; empty when it has none."""
    probes: dict[str, Callable[[], bool] | None] = {
        "AMX": getattr(torch.cpu, "_is_amx_tile_supported", None),
        "AVX512-BF16": getattr(torch.cpu, "_is_avx512_bf16_supported", None),
    }
    return next((name for name, probe in probes.items() if probe is not None and probe()), "")


class _Attention(TorchFunctionMode):
    """Attention in float32 and in heads of no fewer than `_WIDTH` channels, whatever is around it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(_PLACES, args, strict=False)) | (kwargs or {})
        dtype, width, values = given["query"].dtype, given["query"].shape[-1], given["value"].shape[-1]
        given = {name: _single(value) for name, value in given.items()}
        if width == values < _WIDTH:
            given |= {name: pad(given[name], (0, _WIDTH - width)) for name in ("query", "key", "value")}
            # zeros change no product of a query and a key, but the number of channels, by which those are scaled
            given["scale"] = width**-0.5 if given.get("scale") is None else given["scale"]
        with torch.autocast("cpu", enabled=False):
            out = func(**given)
        return out[..., :values].to(dtype)


_WIDTH = 16
"""Channels of a head, of float32, that fill a vector of AVX-512. 64 images of 256 positions in 8 heads of width 8 take
0.73 of the time in heads of 16, forward and backward (AVX512-BF16)."""

_PLACES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""What attention takes by position."""


def _single(value: Any) -> Any:
    """In float32 where it is a tensor of floats; a mask may be one of bools, or none."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
