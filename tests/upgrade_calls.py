"""How the tests of dualout upgrade call it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

import dualout
from dualout.cli.main import main
from dualout.samplers import DDIM

NETWORK = "tiny:width=8"
FEW = [
    "--data", "digits", "--bins", "4", "--held_out", "32", "--images", "128", "--batch_size", "8",
    "--precision", "fp32", "--device", "cpu",
]  # fmt: skip


def upgraded(source, *arguments, out) -> int:
    return main(["upgrade", str(source), *FEW, "--out", str(out), *map(str, arguments)])


def digest(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "lock"]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def first_of(denoiser) -> torch.Tensor:
    return DDIM(steps=5).sample(denoiser, dualout.noise(range(4), (1, 8, 8)))
