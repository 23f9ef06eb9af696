"""Which device is taken."""

from __future__ import annotations

import pytest
import torch

from dualout.errors import InputError
from dualout.networks.device import device


def test_every_process_takes_a_gpu_of_its_own_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    found = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        found.append(device())
    assert found == [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda")]
    # CUDA graphs and pinned memory are of the current one
    assert current == found[:2]


def test_the_processor_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert device() == device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=r"--device 'cuda:77' cannot be used here.*; this machine has cpu"):
        device("cuda:77")
