"""A training whose passes are recorded, by `Replayed` in the place of a GPU, is the one that launches them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualout import Denoiser, Dual, data, schedules
from dualout.cli.main import main
from dualout.errors import InputError
from dualout.networks.backends import graph
from dualout.networks.backends.graph import NotRecorded
from dualout.training import Learner, Run, TrainConfig, train
from dualout.training.setup import first_weights
from replayed import Replayed

SMALL: dict[str, Any] = {"data": "digits", "network": "tiny:width=8", "batch_size": 16, "warmup": 3, "steps": 6}


def learnt(
    monkeypatch: pytest.MonkeyPatch, denoiser: Denoiser | None = None, recording: Any = Replayed, **fields: Any
) -> tuple[Learner, list]:
    config = TrainConfig(**(SMALL | {"precision": "fp32"} | fields))
    dataset = data.load("digits")
    learner = Learner(first_weights(config, dataset) if denoiser is None else denoiser, config)
    weights = list(learner.parameters.values())
    monkeypatch.setattr(graph, "Recording", partial(recording, weights=weights))
    return learner, [{k: float(v) for k, v in s.values().items()} for s in train(learner, dataset)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("more", [{}, {"conditional": True}, {"network": "tiny:width=8:dropout=0.5"}])
def test_learns_the_same_bit_for_bit(accumulate: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one, expected = learnt(monkeypatch, accumulate=accumulate, **more)
    two, got = learnt(monkeypatch, accumulate=accumulate, graph=True, **more)
    assert got == expected
    for own, other in zip(two.tensors().values(), one.tensors().values(), strict=True):
        assert all(torch.equal(own[key], value) for key, value in other.items())


class Counting(nn.Module):
    """A network that learns a mean without a gradient, and has a weight that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.Parameter(torch.ones(2))
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_example_teaches_nothing(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for recorded in (False, True):
        denoiser = Denoiser(Counting(), Dual(), schedules.Linear())
        learner, steps = learnt(monkeypatch, denoiser, accumulate=accumulate, weight_decay=0.5, graph=recorded)
        assert learner.denoiser.network.net[1].num_batches_tracked == 6 * accumulate  # type: ignore[union-attr, index]
        assert torch.equal(learner.denoiser.network.unused, torch.ones(2))  # type: ignore[union-attr, arg-type]
        found.append((steps, learner.denoiser.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[1][1][key], value) for key, value in found[0][1].items())


def test_what_cannot_be_recorded_is_told_and_learns_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any, *example: Tensor, weights: list[nn.Parameter]) -> None:
        function(*example)
        raise NotRecorded("it waits")

    _, expected = learnt(monkeypatch)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph .it waits.: its kernels") as told:
        assert learnt(monkeypatch, recording=refuse, graph=True)[1] == expected
    assert len(told) == 1


def test_is_for_a_gpu_and_one_process(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    small = ["--network", "tiny:width=8", "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(["train", *small, "--device", "cpu", "--graph", "true"]) == 2
    assert "--graph is for one process on an Nvidia GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="--graph"):
        TrainConfig(fsdp=True, graph=True)
    with Run(TrainConfig(**SMALL, device="cpu", out=str(tmp_path / "run"))) as run:
        assert run.job.config.graph is False
