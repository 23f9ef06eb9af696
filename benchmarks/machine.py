"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dualout.version import __version__

PACKAGES = (
    "torch", "numpy", "diffusers", "accelerate", "torchmetrics", "scipy",
    "denoising-diffusion-pytorch", "azula", "k-diffusion", "smalldiffusion",
)  # fmt: skip


def describe() -> dict[str, str]:
    """The processor, the GPU where there is one, and the versions of what takes part."""
    found = {"processor": processor(), "cores": f"{os.cpu_count()}, of which {torch.get_num_threads()} used"}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    found["system"] = f"{platform.system()}, Python {platform.python_version()}"
    versions = {"dualout": __version__} | {name: v for name in PACKAGES if (v := installed(name))}
    return found | {"versions": ", ".join(f"{name} {v}" for name, v in versions.items())}


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, and what it has for matrix products."""
    name, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
        name, flags = fields.get("model name", name), fields.get("flags", "")
        if "family" not in name and "cpu family" in fields:
            name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    units = {"AMX": "amx_tile", "AVX512-BF16": "avx512_bf16", "AVX-512": "avx512f", "AVX2": "avx2"}
    present = [unit for unit, flag in units.items() if flag in flags.split()]
    return f"{name}, {', '.join(present)}" if present else name
