"""The configuration: what it refuses, what may change, what it is called."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dualout.data import Digits
from dualout.errors import InputError
from dualout.parameterizations import Dual
from dualout.samplers import DDIM
from dualout.schedules import Cosine
from dualout.training import TrainConfig


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("steps", 0, "--steps"),
        ("batch_size", 2.5, "--batch_size"),
        ("seed", 2**64, "--seed is a whole number from 0 to 18446744073709551615"),
        ("lr", 0.0, "--lr"),
        ("lr", float("nan"), "--lr"),
        ("ema", 1.0, "--ema"),
        ("grad_clip", -1.0, "--grad_clip"),
        ("betas", (0.9, 1.0), "--betas"),
        ("label_dropout", 1.5, "--label_dropout"),
        ("precision", "bf61", "did you mean 'bf16'"),
        ("track", "tensorbord", "did you mean 'tensorboard'"),
        ("parameterization", "dul", "did you mean 'dual'"),
        ("schedule", "linar", "did you mean 'linear'"),
        ("sampler", "ddmi", "sampler"),
    ],
)
def test_a_bad_value_is_refused_by_its_flag(field, value, says):
    with pytest.raises(InputError, match=says):
        TrainConfig(**{field: value})


def test_the_sampler_of_grids_that_are_not_made_is_checked_too():
    with pytest.raises(InputError, match="did you mean 'ddim'"):
        TrainConfig(sampler="dim", sample_every=0)


def test_parts_of_a_batch_are_equal():
    with pytest.raises(InputError, match="batch_size 10 cannot be taken in --accumulate 4"):
        TrainConfig(batch_size=10, accumulate=4)


def test_round_trip_through_json():
    config = TrainConfig(data="photos", betas=(0.8, 0.9), network={"name": "tiny", "width": 8}, parameterization="v")
    assert TrainConfig.fromdict(json.loads(json.dumps(config.asdict()))) == config
    with pytest.raises(InputError, match="did you mean 'lr'"):
        TrainConfig.fromdict({"lrr": 1})


def test_what_python_has_at_hand_is_written_down() -> None:
    config = TrainConfig(
        data=Digits(split="all"), parameterization=Dual(gate="balanced"), schedule=Cosine(50), sampler=DDIM(5),  # type: ignore[arg-type]
        steps=np.int64(7), lr=np.float32(0.5), cache=Path("kept"), out=Path("runs"), init=Path("old"),  # type: ignore[arg-type]
    )  # fmt: skip
    assert config == TrainConfig(
        data="digits:split=all", parameterization="dual:gate=balanced", schedule="cosine:steps=50",
        sampler="ddim:steps=5", steps=7, lr=0.5, cache="kept", out="runs", init="old",
    )  # fmt: skip
    assert TrainConfig.fromdict(json.loads(json.dumps(config.asdict()))) == config


def test_specs_are_compared_by_meaning():
    assert not TrainConfig(parameterization="dual").differences(TrainConfig(parameterization="dual:ratio=pixel"))


def test_what_may_change_and_what_not():
    before = TrainConfig()
    free = TrainConfig(steps=9000, log_every=1, checkpoint_every=7, keep=3, sample_every=0, out="x", device="cpu")
    assert not before.differences(free)
    assert before.differences(TrainConfig(lr=0.1, batch_size=7)) == {"lr": (1e-3, 0.1), "batch_size": (128, 7)}


def test_learning_rate_rises_then_stays():
    config = TrainConfig(lr=0.5, warmup=10)
    assert config.learning_rate(1) == pytest.approx(0.05)
    assert config.learning_rate(10) == config.learning_rate(10**6) == 0.5
    assert TrainConfig(lr=0.5, warmup=0).learning_rate(1) == 0.5


@pytest.mark.parametrize(
    ("data", "parameterization", "out"),
    [
        ("digits", None, "runs/digits-dual"),
        ("folder:/home/me/My Pictures/", "epsilon", "runs/My-Pictures-eps"),
        ("arrays:x.npz", "dual:gate=balanced", "runs/arrays-x.npz-dual-gate=balanced"),
    ],
)
def test_default_out(data, parameterization, out):
    assert TrainConfig(data=data, parameterization=parameterization).default_out() == out
