"""A network computed by ONNX Runtime or OpenVINO, behind the denoiser's call."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dualout.calibrated import Calibrated, Calibration
from dualout.errors import InputError, unknown
from dualout.export.onnx import FORMAT, KEY, MODEL, RAW, require
from dualout.networks.backends import quiet
from dualout.parameterizations import Parameterization
from dualout.parameterizations.base import Route
from dualout.prediction import Prediction
from dualout.registry import Registered
from dualout.schedules import Schedule

Run = Any
"""Calls the graph: {input: array} -> array."""


@dataclass(frozen=True, kw_only=True)
class Runtime(Registered, ABC):
    """A program that computes ONNX graphs.

    Attributes:
        threads: how many; None leaves it to the runtime.
    """

    kind: ClassVar[str] = "runtime"
    threads: int | None = None

    @abstractmethod
    def open(self, path: Path, output: str) -> Run:
        """Make the graph ready to compute one of its values, whether it is an output or not."""


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime(Runtime):
    """ONNX Runtime.

    Attributes:
        provider: what it computes with, say "CUDA"; those that are there, by its own names less "ExecutionProvider".
    """

    name = "onnxruntime"
    aliases = ("onnx",)

    provider: str = "CPU"

    def open(self, path: Path, output: str) -> Run:
        """A session of the graph, cut off behind the value."""
        require("onnx", "onnxruntime")
        import onnx

        onnxruntime = quiet.onnxruntime()
        provider = f"{self.provider}ExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            here = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
            raise unknown("provider of ONNX Runtime here:", self.provider, here)
        model = _model(path)
        del model.graph.output[:]
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
        return lambda inputs: session.run([output], inputs)[0]


@dataclass(frozen=True, kw_only=True)
class OpenVino(Runtime):
    """OpenVINO: on processors with AMX, `precision` "bf16" is several times faster than float32.

    Attributes:
        precision: "f32", "bf16" or "f16".
        device: "CPU", "GPU" …
    """

    name = "openvino"

    precision: str = "f32"
    device: str = "CPU"

    def __post_init__(self) -> None:
        if self.precision not in ("f32", "bf16", "f16"):
            raise unknown("precision of OpenVINO:", self.precision, ["f32", "bf16", "f16"])

    def open(self, path: Path, output: str) -> Run:
        """The graph, cut off behind the value and compiled."""
        require("openvino")
        openvino = quiet.openvino()
        core = openvino.Core()
        model = core.read_model(path)
        value = model.add_outputs(output)[0]
        cut = openvino.Model([value], model.get_parameters())
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self.precision, "PERFORMANCE_HINT": "LATENCY"}
        if self.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        compiled = core.compile_model(cut, self.device, settings)
        return lambda inputs: compiled(inputs)[0]


class OnnxDenoiser(nn.Module):
    """What `write_onnx` wrote, as a denoiser: every sampler, guidance and calibration takes it. It has no gradients.

    The network is computed by the runtime; its output is read here, in float32, so that routes can be chosen, and the
    runtime's half precision does not reach the division by alpha.

    Args:
        path: the directory, or the file itself.
        runtime: "onnxruntime" or "openvino", perhaps with options: "openvino:precision=bf16:threads=2".

    Raises:
        InputError: when the file or the runtime is missing, or the file is another program's.
    """

    def __init__(self, path: str | Path, runtime: str | Runtime = "onnxruntime") -> None:
        super().__init__()
        file = Path(path).expanduser()
        file = file / MODEL if file.is_dir() else file
        self.record = read_record(file)
        self.parameterization: Parameterization = Parameterization.from_config(self.record["parameterization"])
        self.schedule: Schedule = Schedule.from_config(self.record["schedule"])
        self.runtime = Runtime.parse(runtime) if isinstance(runtime, str) else runtime
        self.network: Run = self.runtime.open(file, RAW)

    if TYPE_CHECKING:  # torch's is of Any
        __call__: Callable[..., Prediction]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image, (C, H, W)."""
        return (self.record["image"]["channels"], *self.record["image"]["size"])

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: int | Tensor, **conditions: Any) -> Prediction:
        """Look at noisy images; see `Denoiser`."""
        if x_t.shape[1:] != self.shape:
            raise InputError(f"this graph is for images of shape {self.shape}, got {tuple(x_t.shape[1:])}")
        x_t = x_t.float()
        level = self.schedule.scalars(t) if isinstance(t, int) else self.schedule.level(t).like(x_t)
        time = torch.as_tensor(t).expand(len(x_t))
        raw = torch.from_numpy(self.network(self._inputs(x_t, time, conditions)))
        return self.parameterization.read(raw.to(x_t.device), x_t, level)

    def _inputs(self, x_t: Tensor, time: Tensor, conditions: Mapping[str, Any]) -> dict[str, np.ndarray]:
        wanted = {"class_labels"} if self.record["classes"] else set()
        if conditions.keys() != wanted:
            raise InputError(
                f"this graph takes {', '.join(wanted) or 'no conditions'}; got {', '.join(conditions) or 'none'}"
            )
        inputs = {"x_t": x_t, "t": time, **conditions}
        return {name: _array(torch.as_tensor(value), len(x_t)) for name, value in inputs.items()}

    def route(self, route: Route) -> OnnxDenoiser:
        """The same network with only one of its outputs used; see `Denoiser.route`."""
        view = copy.copy(self)
        view.parameterization = self.parameterization.route(route)
        return view

    @property
    def calibration(self) -> Calibration | None:
        """The calibration that was exported with it."""
        return None if self.record["calibration"] is None else Calibration(**self.record["calibration"])

    def calibrated(self) -> Calibrated:
        """This denoiser, corrected by its calibration.

        Raises:
            InputError: when it has none.
        """
        if self.calibration is None:
            raise InputError("this graph was exported without a calibration: dualout export … --calibrated")
        return Calibrated.of(self, self.calibration)


def read_record(path: Path) -> dict[str, Any]:
    """What `write_onnx` wrote into the metadata.

    Raises:
        InputError: when there is none.
    """
    require("onnx")
    if not path.is_file():
        raise InputError(f"no ONNX file at {path}; dualout export … --format onnx makes one")
    written = {entry.key: entry.value for entry in _model(path).metadata_props}
    if KEY not in written:
        raise InputError(f"{path} was not written by dualout: its metadata have no {KEY!r}")
    try:
        record = json.loads(written[KEY])
        missing = {"format", "schedule", "parameterization", "image", "classes", "calibration"} - record.keys()
    except (ValueError, AttributeError) as error:
        raise InputError(f"the metadata {KEY!r} of {path} are damaged: {error}") from error
    if missing or not isinstance(record["format"], int) or record["format"] > FORMAT:
        raise InputError(f"{path} is of another version of dualout ({record.get('dualout', '?')}); export it again")
    return record


def _model(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise InputError(f"{path} is no ONNX file, or it is damaged: {error}") from error


def _array(value: Tensor, count: int) -> np.ndarray:
    return value.detach().expand(count, *value.shape[1:]).cpu().contiguous().numpy()
