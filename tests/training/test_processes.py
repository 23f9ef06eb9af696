"""Two processes that share a batch train as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dualout.checkpoint import read_tensors
from dualout.cli.main import main

ARGUMENTS = [
    "train", "--data", "digits", "--network", "tiny:width=8", "--batch_size", "16", "--steps", "8", "--log_every", "1",
    "--checkpoint_every", "4", "--precision", "fp32", "--device", "cpu", "--sample_every", "0", "--warmup", "2",
]  # fmt: skip


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def two(out: Path, *more: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
        "-m", "dualout.cli.main",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, *ARGUMENTS, "--out", str(out), *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    assert main([*ARGUMENTS, "--out", str(tmp_path / "one")]) == 0
    done = two(tmp_path / "two", "--steps", "4")
    assert done.returncode == 0, done.stderr
    # and go on, together, with the batch in parts
    done = two(tmp_path / "two", "--accumulate", "2")
    assert done.returncode == 0, done.stderr
    assert "going on from step 4" in done.stderr
    assert done.stderr.count("going on") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, other = (read_tensors(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-4)
    # a mistake is told, not traced
    done = two(tmp_path / "two", "--lr", "0.1")
    assert done.returncode != 0
    assert "lr 0.001 → 0.1" in done.stderr
    assert "dualout/cli/main.py" not in done.stderr
