"""A training whose passes are recorded is the one that launches them.

Where there is no GPU, a stand-in plays its part: it computes from the tensors that a recording holds, and leaves its
results where the recorded function did, as a replay does.
"""

from __future__ import annotations

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

SMALL: dict[str, Any] = {"data": "digits", "network": "tiny:width=8", "batch_size": 16, "warmup": 3, "steps": 6}


class Standin:
    """A function that adds to gradients, computed anew in place of every replay.

    Args:
        weights: whose gradients are left where they were when it was recorded.
    """

    def __init__(self, weights: list[nn.Parameter], function: Any, *example: Tensor) -> None:
        self.function, self.weights, self.given = function, weights, [v.clone() for v in example]
        for _ in range(3):  # twice before the recording, and for it
            function(*self.given)
        self.grads = [p.grad for p in weights]

    def __call__(self, *tensors: Tensor) -> Tensor:
        for kept, v in zip(self.given, tensors, strict=True):
            kept.copy_(v)
        made = self.function(*self.given)
        for p, grad in zip(self.weights, self.grads, strict=True):
            if grad is not None and p.grad is not grad:
                grad.copy_(p.grad)
                p.grad = grad
        return made.clone()


def learnt(monkeypatch: pytest.MonkeyPatch, denoiser: Denoiser | None = None, **fields: Any) -> tuple[Learner, list]:
    config = TrainConfig(**(SMALL | {"precision": "fp32"} | fields))
    dataset = data.load("digits")
    learner = Learner(first_weights(config, dataset) if denoiser is None else denoiser, config)
    weights = list(learner.parameters.values())
    monkeypatch.setattr(graph, "Recording", lambda function, *example: Standin(weights, function, *example))
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
    def refuse(function: Any, *example: Tensor) -> None:
        function(*example)
        raise NotRecorded("it waits")

    def steps(**fields: Any) -> list[float]:
        config = TrainConfig(**(SMALL | {"precision": "fp32"} | fields))
        dataset = data.load("digits")
        learner = Learner(first_weights(config, dataset), config)
        monkeypatch.setattr(graph, "Recording", refuse)
        return [float(step.loss) for step in train(learner, dataset)]

    expected = steps()
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph .it waits.: its kernels") as told:
        assert steps(graph=True) == expected
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
