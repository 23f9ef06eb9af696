"""What every test shares: one thread, and hypothesis without a clock."""

from __future__ import annotations

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("house", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # the tensors are tiny, and test processes already use every core
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
