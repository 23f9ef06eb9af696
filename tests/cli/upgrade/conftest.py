"""Models that are upgraded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualout.cli.main import main
from dualout.networks import build
from upgrade_calls import NETWORK, upgraded


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An eps model of a few steps, which errs enough at high noise to be helped."""
    path = tmp_path_factory.mktemp("source") / "run"
    small = [
        "--network", NETWORK, "--batch_size", "16", "--precision", "fp32", "--sample_every", "0", "--device", "cpu",
    ]  # fmt: skip
    assert main(["train", *small, "--parameterization", "eps", "--steps", "20", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def closed(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("closed") / "run"
    assert upgraded(source, out=path) == 0
    return path


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return build(NETWORK, 1, 8, 1).eval()
