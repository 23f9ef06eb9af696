"""Which device is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dualout
from dualout.errors import InputError
from dualout.evaluation.model import Model
from dualout.networks.backends import Call
from dualout.networks.backends import compile as compiling
from dualout.networks.backends.half import Half
from dualout.networks.build import build
from dualout.networks.device import device, layout
from dualout.networks.precision import Precision
from dualout.training import setup
from dualout.training.config import TrainConfig


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
    with pytest.raises(InputError, match=r"--device 'gpu' cannot be used here: it is cpu, cuda, cuda:1, mps or auto;"):
        device("gpu")
    with pytest.raises(InputError, match=r"--device 'cuda:77' cannot be used here.*; this machine has cpu"):
        device("cuda:77")


def test_a_network_is_trained_in_the_layout_of_the_place_and_sampled_as_it_was_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert layout(torch.device("cuda", 1)) is torch.channels_last
    network = build("tiny:width=8", 1, 8, 3)
    dualout.Denoiser(network, dualout.Dual(), dualout.schedules.Linear()).save_pretrained(tmp_path)
    config = TrainConfig(data="digits", network="tiny:width=8", batch_size=4, device="cpu")
    for form in (torch.contiguous_format, torch.channels_last):
        monkeypatch.setattr(setup, "layout", lambda place, form=form: form)
        assert all(p.is_contiguous(memory_format=form) for p in kernels(setup.assemble(config).denoiser))
    assert all(p.is_contiguous() for p in kernels(Model.load(tmp_path).denoiser))


def kernels(denoiser: nn.Module) -> list[nn.Parameter]:
    """Of convolutions; those that lie alike in both layouts are left out."""
    found = [p for p in denoiser.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert found
    return found


def test_half_precision_that_is_compiled_for_a_gpu_has_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    network, made = build("tiny:width=8", 1, 8, 3), []
    monkeypatch.setattr(compiling, "plain_of", lambda network, call, precision: Half(network, (), torch.bfloat16))
    monkeypatch.setattr(torch, "compile", lambda plain, dynamic: made.append(plain) or (lambda *tensors: None))
    monkeypatch.setattr(compiling, "replayed", lambda compiled, call, precision: compiled)
    call = Call(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long), {})
    compiling.Compile().prepare(network, call, Precision("fp32", torch.device("cuda"), "as asked"))
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels(made[0]))
    assert all(p.is_contiguous() for p in kernels(network))
