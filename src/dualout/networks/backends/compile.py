"""torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualout.denoiser import Denoiser
from dualout.errors import InputError, first_line
from dualout.networks.backends.base import Backend, Call, FixedBatch, Plain
from dualout.networks.backends.fused import Fused
from dualout.networks.backends.graph import recorded, replayed
from dualout.networks.backends.half import Half, plain_of
from dualout.networks.precision import Precision
from dualout.samplers import Sampler
from dualout.samplers.base import Denoises

REPAID_NUMBERS = 3e9
"""Numbers in the images of all steps from which on fusing is repaid: it takes about 3 s, and saves 1 ns of each."""


@dataclass(frozen=True)
class Compile(Backend):
    """Fused kernels; on a GPU they are replayed as CUDA graphs."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")
    seconds: ClassVar[float] = 60.0

    def prepare(self, network: nn.Module, call: Call, precision: Precision) -> nn.Module:
        """Compiled for one size of batch; the weights are shared, except in half precision on a GPU."""
        gpu = precision.device.type == "cuda"
        plain = plain_of(network, call, precision) if gpu else Plain(network, tuple(call.conditions))
        if isinstance(plain, Half):
            # where normalizations copy to another layout is in the midst of compiled kernels
            plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        compiled: Any = torch.compile(plain, dynamic=False)
        try:
            with torch.no_grad(), precision.autocast():
                compiled(*call.tensors)
        except Exception as error:  # of the compiler's own, and of the C++ compiler that it calls
            raise refused(error, "take --backend eager") from error
        return replayed(compiled, call, precision) if gpu else FixedBatch(compiled, call)

    def fuse(
        self, denoiser: Denoises, sampler: Sampler, noise: Tensor, conditions: dict[str, Any], steps: int
    ) -> Callable[..., Tensor] | None:
        """On a processor reading, blending and stepping as one kernel, unless guided or calibrated; on a GPU all steps
        as one graph."""
        if noise.is_cuda:
            return recorded(denoiser, sampler, noise, conditions, steps)
        if not isinstance(denoiser, Denoiser) or steps * noise.numel() < REPAID_NUMBERS:
            return None
        try:
            return Fused(denoiser, sampler, noise, **conditions).sample
        except InputError:
            raise
        except Exception as error:  # as above
            raise refused(error, "eager torch takes it", "step") from error


def refused(error: Exception, instead: str, what: str = "network") -> InputError:
    """The error for what the compiler cannot do.

    Args:
        error: its own.
        instead: what to do.
        what: was to be compiled.
    """
    cause = getattr(error, "inner_exception", error)
    return InputError(
        f"torch.compile cannot compile this {what} here: {first_line(cause)}; {instead}. If a compilation was "
        "killed before, what it left in torch's cache is in the way: another TORCHINDUCTOR_CACHE_DIR has none of it"
    )
