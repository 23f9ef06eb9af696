"""A small network of diffusers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dualout.networks import build


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(1)
    return build("tiny", 3, 8, 3).eval()
