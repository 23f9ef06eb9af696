"""Which device is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dualout
from dualout.errors import InputError
from dualout.evaluation import model as loading
from dualout.evaluation.sampling import Sampling
from dualout.networks.build import build
from dualout.networks.device import device, layout
from dualout.samplers import DDIM
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


def test_a_network_is_sampled_in_the_layout_that_it_is_trained_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert layout(torch.device("cuda", 1)) is torch.channels_last
    torch.manual_seed(0)
    network = build("tiny:width=8", 1, 8, 3)
    for weights in network.parameters():  # the last layer's are 0
        torch.nn.init.normal_(weights, std=0.1)
    dualout.Denoiser(network, dualout.Dual(), dualout.schedules.Linear()).save_pretrained(tmp_path)
    config = TrainConfig(data="digits", network="tiny:width=8", batch_size=4, device="cpu")
    images = {}
    for form in (torch.contiguous_format, torch.channels_last):
        monkeypatch.setattr(loading, "layout", lambda place, form=form: form)
        monkeypatch.setattr(setup, "layout", lambda place, form=form: form)
        model, job = loading.Model.load(tmp_path), setup.assemble(config)
        for denoiser in (model.denoiser, job.denoiser):
            kernels = [p for p in denoiser.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
            assert kernels
            assert all(p.is_contiguous(memory_format=form) for p in kernels)
        images[form] = Sampling(model, DDIM(steps=3)).images(range(4)).int()
    assert (images[torch.channels_last] - images[torch.contiguous_format]).abs().max() <= 1
