"""Two processes that share a batch train as one does."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import dualout
from dualout.checkpoint import read_tensors
from dualout.cli.main import main
from dualout.errors import InputError
from dualout.networks.build import build
from dualout.training.config import TrainConfig
from dualout.training.learner import Learner
from dualout.training.run import Run
from dualout.training.setup import several_processes
from processes import two

ARGUMENTS = [
    "train", "--data", "digits", "--network", "tiny:width=8", "--batch_size", "16", "--steps", "8", "--log_every", "1",
    "--checkpoint_every", "4", "--precision", "fp32", "--device", "cpu", "--sample_every", "0", "--warmup", "2",
]  # fmt: skip


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    # as accelerate launch sets them, where it is configured so
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert main([*ARGUMENTS, "--out", str(tmp_path / "one")]) == 0
    # two go on with what one began, with the batch in parts
    command = [*ARGUMENTS, "--out", str(tmp_path / "two")]
    assert main([*command, "--steps", "3"]) == 0
    done = two(*command, "--accumulate", "2", torchrun=True)
    assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stderr
    assert done.stderr.count("going on") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, other = (read_tensors(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-4)
    # a mistake is told, not traced
    done = two(*command, "--lr", "0.1")
    assert done.returncode == 2
    assert "lr 0.001 → 0.1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_that_divide_the_weights_train_as_one(tmp_path):
    assert main([*ARGUMENTS, "--out", str(tmp_path / "one")]) == 0
    # the state is that of a run like any other: two go on with what one began, and one with that
    command = [*ARGUMENTS, "--out", str(tmp_path / "two")]
    assert main([*command, "--steps", "2"]) == 0
    # the layout of GPUs, whose convolutions' weights FSDP does not divide
    more = ["--fsdp", "true", "--channels_last", "true", "--samples", "4", "--sample_every", "3"]
    done = two(*command, "--steps", "6", "--accumulate", "2", *more)
    assert done.returncode == 0, done.stderr
    assert "going on from step 2" in done.stderr
    assert (tmp_path / "two" / "samples" / "step-000006.png").stat().st_size > 100
    assert main(command) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for file in ("model", "state/step-00000008/weights", "state/step-00000008/average"):
        one, other = (read_tensors(tmp_path / name / f"{file}.safetensors") for name in ("one", "two"))
        for name, weight in one.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-4)


def test_sharding_keeps_what_was_learnt_and_divides_the_blocks():
    config = TrainConfig(batch_size=8, steps=4, fsdp=True, grad_clip=0.1, warmup=0)
    plain, divided = (Learner(denoiser(), config) for _ in range(2))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for learner in (plain, divided):
            one_step(learner)
        before = divided.tensors()
        divided.shard(torch.distributed.device_mesh.init_device_mesh("cpu", (1,)), first=True)
        assert all(type(p).__name__ == "DTensor" for p in divided.parameters.values())
        network = divided.denoiser.network
        assert all(isinstance(b, FSDPModule) for b in [*network.down_blocks, *network.up_blocks])
        after = divided.tensors()
        assert all(torch.equal(after[f][k], v) for f in before for k, v in before[f].items())
        for learner in (plain, divided):
            one_step(learner)
        divided.gather()
        for name, weight in plain.ema.state_dict().items():
            torch.testing.assert_close(divided.ema.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
        assert divided.finite()
        with torch.no_grad():
            next(iter(divided.parameters.values())).to_local().fill_(math.nan)
        assert not divided.finite()
    finally:
        torch.distributed.destroy_process_group()


def denoiser():
    torch.manual_seed(0)
    return dualout.Denoiser(build("tiny:width=8", 1, 8, 3), dualout.Dual(), dualout.schedules.Linear())


def one_step(learner):
    generator = torch.Generator().manual_seed(learner.step)
    x0, noise = torch.randn(2, 8, 1, 8, 8, generator=generator)
    learner.backward(learner.denoiser.loss(x0, torch.arange(8) * 100, noise).total)
    learner.update()


def test_sharding_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(InputError, match="this is one"):
        Run(TrainConfig(fsdp=True, out=str(tmp_path / "run"))).__enter__()
    for wrong in ({"compile": True}, {"precision": "fp16"}):
        with pytest.raises(InputError, match="neither --compile nor"):
            TrainConfig(fsdp=True, **wrong)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_accelerate_is_configured_for_are_refused(tmp_path, monkeypatch, engine):
    monkeypatch.setenv("WORLD_SIZE", "2")
    # as accelerate launch sets it
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match=rf"configured for {engine}.*--multi_gpu, or torchrun; --fsdp"):
        Run(TrainConfig(out=str(tmp_path / "run"))).__enter__()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("gpus", "hours"), [(False, 24), (True, 2)])
def test_processes_wait_while_the_first_draws_a_grid(monkeypatch, gpus, hours):
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus)
    monkeypatch.setattr("accelerate.Accelerator", lambda **how: given.update(how) or SimpleNamespace(num_processes=2))
    several_processes(TrainConfig())
    # NCCL ends all of them after ten minutes: a grid of ddpm:steps=1000 by a large network takes longer
    (patience,) = given["kwargs_handlers"]
    assert patience.to_kwargs() == {"timeout": timedelta(hours=hours)}
