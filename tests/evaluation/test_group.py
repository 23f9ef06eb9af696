"""Several processes score what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

import dualout
from dualout.cli.main import main
from dualout.evaluation.group import Group
from dualout.evaluation.statistics import Statistics


@pytest.mark.parametrize("count", [1, 2, 10, 11])
def test_shares_follow_one_another_and_leave_none_out(count):
    shares = [Group(rank, 3).share(count) for rank in range(3)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_a_group_of_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Group.here() as group:
        statistics = Statistics()
        assert group == Group(0, 1)
        assert group.merged(statistics) is statistics
        assert group.in_turn(lambda: 3) == group.agreed(3) == 3


@pytest.mark.slow
def test_two_processes_score_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALOUT_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    denoiser = dualout.Denoiser(
        dualout.networks.build("tiny:width=8", 1, 8, 3), dualout.Dual(), dualout.schedules.Linear(steps=100)
    )
    # fresh networks give zeros, and every image is alike
    for module in denoiser.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.2)
    denoiser.save_pretrained(tmp_path / "run", image={"channels": 1, "size": [8, 8]})
    command = ["evaluate", str(tmp_path / "run"), "--images", "51", "--steps", "2,3", "--features", "digits,pixels"]
    command += ["--device", "cpu", "--batch_size", "8"]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    launch += ["-m", "dualout.cli.main", *command, "--out", str(tmp_path / "two")]
    done = subprocess.run(
        launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert len(one) == len(two) == 4
    assert done.stdout.count("results.json") == 1
    for a, b in zip(one, two, strict=True):
        assert a["fd"] > 0
        for score in ("fd", "kid", "precision", "recall"):
            assert b[score] == pytest.approx(a[score], rel=1e-6, abs=1e-9)
        assert a["protocol"] == b["protocol"]
    # nothing is left to make, and all processes know it
    launch[launch.index("--master-port") + 1] = str(port + 1)
    done = subprocess.run(launch, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "4 of 4" not in done.stderr
    assert "2 of 2 combinations are there already" in done.stderr
