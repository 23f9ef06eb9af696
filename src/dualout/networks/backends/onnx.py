"""ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dualout.errors import InputError, first_line
from dualout.networks.backends import quiet
from dualout.networks.backends.base import Backend, Call, FixedBatch, Plain
from dualout.networks.precision import Precision


@dataclass(frozen=True)
class Onnx(Backend):
    """The network as an ONNX graph in memory; `dualout export --format onnx` writes one with the blend inside."""

    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    seconds: ClassVar[float] = 15.0

    def prepare(self, network: nn.Module, call: Call, precision: Precision) -> nn.Module:
        """The translated network; its weights are a copy."""
        onnxruntime = quiet.onnxruntime()
        call = call._replace(x=call.x.float())
        names = [f"input{i}" for i in range(len(call.tensors))]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            with quiet.exporter(), torch.no_grad():
                plain = Plain(network, tuple(call.conditions), single=True)
                exported = torch.export.export(plain, call.tensors, strict=False)
                program = torch.onnx.export(exported, input_names=names, output_names=["output"], verbose=False)
            assert program is not None
            graph = program.model_proto.SerializeToString()
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # neither side's errors have a base class of their own
            raise InputError(
                f"this network cannot be translated to ONNX: {first_line(error)}; take --backend eager"
            ) from error

        def run(x: Tensor, *others: Tensor) -> Tensor:
            tensors = (x.float(), *others)
            given = {name: v.contiguous().numpy() for name, v in zip(names, tensors, strict=True)}
            return torch.from_numpy(session.run(None, given)[0])

        return FixedBatch(run, call)
