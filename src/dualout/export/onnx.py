"""A denoiser as an ONNX graph, with the noise levels and the blend inside.

    x_t (B, C, H, W), t (B,)  ->  x0, eps (B, C, H, W), and ratio or variance, where the network gives them

What the graph holds is written into its metadata, under the key "dualout". A file is put in place after ONNX Runtime
has agreed with torch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dualout.calibrated import Calibration, corrected
from dualout.card import public, render
from dualout.denoiser import Denoiser
from dualout.errors import InputError, first_line
from dualout.export.directory import whole
from dualout.levels import Level, per_image
from dualout.networks.adapter import config_of
from dualout.networks.backends import quiet
from dualout.version import __version__

MODEL, KEY, FORMAT = "model.onnx", "dualout", 1
RAW = "raw"
"""The network's output in the graph: no output of it, but to be made one (`OnnxDenoiser`)."""
TOLERANCE = 1e-4
"""How far ONNX Runtime may be from torch: in ratio and variance; in x0, times 1 + sigma/alpha; in eps, times 1 +
alpha/sigma, because either route divides what float32 leaves by them."""
LARGEST = 1_500_000_000
"""Bytes of weights within the file; above, they go beside it, because a file of ONNX ends at 2 GiB."""
NEEDS = ("onnx", "onnxscript", "onnxruntime")


def require(*packages: str) -> None:
    """Refuse to go on without these packages.

    Raises:
        InputError: with how to install them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise InputError(
            f"this needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'dualout[onnx]'"
        )


def write_onnx(
    denoiser: Denoiser,
    directory: str | Path,
    shape: Sequence[int],
    *,
    calibration: Calibration | None = None,
    opset: int = 20,
    tolerance: float = TOLERANCE,
    beside: bool | None = None,
) -> dict[str, Any]:
    """Write DIRECTORY/model.onnx and README.md.

    The batch is of any size; the images are of one. Class-conditional networks have a third input, class_labels.

    Args:
        denoiser: the model; it is computed in float32.
        directory: made if it is missing.
        shape: of one image, (C, H, W).
        calibration: corrects what the graph gives at the K time steps of a calibrated sampler, x0 and eps; at others it
            gives NaN. A sampler must take both from the graph, and not x_t as it was. An x0_trend is not in it: with
            d = clip(x0) − clip(x0 of the step before), the sampler adds x0_trend·d to x0, and takes
            x0_trend·(alpha/sigma)·d from eps.
        opset: the version of ONNX's operators.
        tolerance: how far ONNX Runtime may be from torch.
        beside: whether the weights go into a file beside; None does so where they are too large.

    Returns:
        what was checked: the largest difference of each output, in units of the tolerance's, and the tolerance.

    Raises:
        InputError: without the extra "onnx", for networks that need other conditions or cannot be translated, and when
            ONNX Runtime does not agree.
    """
    require(*NEEDS)
    denoiser = copy.deepcopy(denoiser).float().cpu().eval().requires_grad_(False)
    graph = _Graph(denoiser, calibration)
    inputs, labels = _example(denoiser, shape, graph.times)
    expected = graph(*inputs)
    program = _translate(graph, inputs, [*graph.outputs, RAW], opset)
    _hide(program, RAW)
    bytes_of_weights = sum(v.numel() * v.element_size() for v in denoiser.state_dict().values())
    record = {
        "format": FORMAT,
        "dualout": __version__,
        "schedule": denoiser.schedule.config(),
        "parameterization": denoiser.parameterization.config(),
        "image": {"channels": shape[0], "size": list(shape[1:])},
        "classes": labels,
        "calibration": None if calibration is None else public(calibration.record()),
        "tolerance": tolerance,
    }
    _forget(program)
    program.model.metadata_props[KEY] = json.dumps(record, ensure_ascii=False)
    with whole(directory, last=MODEL) as aside:
        program.save(str(aside / MODEL), external_data=bytes_of_weights > LARGEST if beside is None else beside)
        checked = _check(aside / MODEL, graph, inputs, expected, tolerance)
        (aside / "README.md").write_text(_card(denoiser, record), encoding="utf-8", newline="\n")
    return {"difference": checked, "tolerance": tolerance}


class _Graph(nn.Module):
    """What is translated: everything from noisy images to the prediction."""

    def __init__(self, denoiser: Denoiser, calibration: Calibration | None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.times = list(range(denoiser.schedule.steps)) if calibration is None else list(calibration.times)
        # x0_trend is of two steps: whoever calls the graph adds it
        self.numbers = [] if calibration is None else sorted(calibration.values.keys() - {"x0_trend"})
        for name in self.numbers:
            # one number a time step, NaN where the calibration knows none
            table = torch.full((denoiser.schedule.steps,), torch.nan)
            table[self.times] = torch.tensor(calibration.values[name])  # type: ignore[union-attr]
            self.register_buffer(f"table_{name}", table)
        self.outputs = ["x0", "eps"]

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor, ...]:
        conditions = {} if class_labels is None else {"class_labels": class_labels}
        level = self.denoiser.schedule.level(t).like(x_t)
        raw = self.denoiser.raw(x_t, t, level, **conditions)
        p = self.denoiser.parameterization.read(raw, x_t, level)
        if self.numbers:
            p = corrected(p, **{name: per_image(getattr(self, f"table_{name}")[t], x_t) for name in self.numbers})
        parts = [name for name in ("ratio", "variance") if name in p.parts]
        self.outputs = ["x0", "eps", *parts]
        return p.x0, p.eps, *(p.parts[name].contiguous() for name in parts), raw


def _example(denoiser: Denoiser, shape: Sequence[int], times: Sequence[int]) -> tuple[tuple[Tensor, ...], int | None]:
    """A batch to trace and to check with, from the first time step to the last, and how many classes
    it is told, besides "none"."""
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([times[0], times[-1], *times[:: max(len(times) // 3, 1)]])
    x = torch.randn(len(t), *shape, generator=generator)
    level: Level = denoiser.schedule.level(t).like(x)
    x_t = level.alpha * x.clamp(-1, 1) + level.sigma * torch.randn(x.shape, generator=generator)
    # "none" included
    embedded = config_of(denoiser.network).get("num_class_embeds")
    conditions = {"class_labels": torch.arange(len(t)) % embedded} if embedded else {}
    try:
        denoiser(x_t, t, **conditions)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise InputError(
            f"this {type(denoiser.network).__name__} cannot be called with images of shape {tuple(shape)} and their "
            f"time steps{' and classes' if conditions else ''} alone: {error}"
        ) from error
    return (x_t, t, *conditions.values()), embedded - 1 if embedded else None


def _translate(graph: _Graph, inputs: tuple[Tensor, ...], outputs: list[str], opset: int) -> Any:
    names = ["x_t", "t", "class_labels"][: len(inputs)]
    batch = {name: {0: torch.export.Dim.AUTO} for name in names}
    try:
        with quiet.exporter(), torch.no_grad():
            exported = torch.export.export(graph, inputs, dynamic_shapes=(*batch.values(),), strict=False)
            program: Any = torch.onnx.export(
                exported,
                input_names=names,
                output_names=outputs,
                opset_version=opset,
                dynamo=True,
                verbose=False,
                dynamic_shapes=tuple({0: "batch"} for _ in names),
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        kind = type(graph.denoiser.network).__name__
        raise InputError(f"this {kind} cannot be translated to ONNX (opset {opset}): {first_line(error)}") from error
    # where torch cannot convert it, it logs that and gives another
    if (got := program.model.opset_imports[""]) != opset:
        raise InputError(
            f"this {type(graph.denoiser.network).__name__} cannot be translated to ONNX with opset {opset}, only with "
            f"{got}; nothing was written"
        )
    return program


def _hide(program: Any, name: str) -> None:
    """Take an output from the graph's signature; the value stays, by its name."""
    outputs = program.model.graph.outputs
    outputs.remove(next(v for v in outputs if v.name == name))


def _forget(program: Any) -> None:
    """Where in whose files each node was traced is nobody's affair, and most of a small file."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(program.model)


def _check(
    path: Path, graph: _Graph, inputs: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float
) -> dict[str, float]:
    """The largest difference of each output between ONNX Runtime and torch, for a batch and for single images."""
    session = quiet.onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    level = graph.denoiser.schedule.level_for(inputs[0], inputs[1])
    units = dict.fromkeys(graph.outputs, torch.ones_like(level.alpha))
    units |= {"x0": 1 + level.sigma / level.alpha, "eps": 1 + level.alpha / level.sigma}
    worst = dict.fromkeys(graph.outputs, 0.0)
    for rows in (slice(None), slice(0, 1), slice(1, 2)):
        try:
            got = session.run(graph.outputs, {n: v[rows].numpy() for n, v in zip(names, inputs, strict=True)})
        except Exception as error:  # its errors have no base class of their own
            raise InputError(f"ONNX Runtime does not compute the graph, nothing was written: {error}") from error
        for name, ours, theirs in zip(graph.outputs, expected, got, strict=False):
            difference = (torch.from_numpy(np.asarray(theirs)) - ours[rows]).abs() / units[name][rows]
            if not difference.isfinite().all():
                raise InputError(f"ONNX Runtime gives {name} that is not finite; nothing was written")
            worst[name] = max(worst[name], float(difference.max()))
    if max(worst.values()) > tolerance:
        said = ", ".join(f"{name} {value:.2g}" for name, value in worst.items())
        raise InputError(f"ONNX Runtime differs from torch by more than {tolerance:g}: {said}; nothing was written")
    return worst


def _card(denoiser: Denoiser, record: dict[str, Any]) -> str:
    network = {"class": f"{type(denoiser.network).__name__}, as ONNX", "arguments": config_of(denoiser.network)}
    more = {"calibrated for": str(record["calibration"]["sampler"])} if record["calibration"] else {}
    return render({**record, "network": network, "card": denoiser.card, "more": more}, "onnx")
