"""OpenVINO, for Intel's processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualout.errors import InputError, first_line
from dualout.networks.backends import quiet
from dualout.networks.backends.base import Backend, Call, FixedBatch, Plain
from dualout.networks.precision import Precision


@dataclass(frozen=True)
class OpenVINO(Backend):
    """Translated by torch.export, and compiled for one size of batch and torch's number of threads."""

    packages: ClassVar[tuple[str, ...]] = ("openvino",)
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16")
    seconds: ClassVar[float] = 10.0

    def prepare(self, network: nn.Module, call: Call, precision: Precision) -> nn.Module:
        """The translated network; its weights are a copy."""
        openvino = quiet.openvino()
        call = call._replace(x=call.x.float())
        settings = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision.name],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            with torch.no_grad():
                plain = Plain(network, tuple(call.conditions), single=True)
                exported = torch.export.export(plain, call.tensors, strict=False)
            compiled = openvino.compile_model(openvino.convert_model(exported), "CPU", settings)
        except Exception as error:  # its errors have no base class of their own
            raise InputError(
                f"OpenVINO cannot translate this network: {first_line(error)}; take --backend eager"
            ) from error
        request: Any = compiled.create_infer_request()

        def run(x: Tensor, *others: Tensor) -> Tensor:
            found = request.infer([v.contiguous().numpy() for v in (x.float(), *others)])
            # its memory is written to again by the next call
            return torch.from_numpy(found[0].copy())

        return FixedBatch(run, call)
