"""Several processes score what one does."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dualout
from dualout.cli.main import main
from dualout.evaluation.group import Group
from dualout.evaluation.statistics import Statistics
from processes import two


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


def test_processes_wait_for_the_first_as_long_as_it_takes(monkeypatch):
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: given.update(options))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with Group.here() as group:
        assert group == Group(1, 2)
    # 50,000 real images in Inception's features take hours on a processor
    assert given["timeout"] > timedelta(hours=12)


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
    command = ["evaluate", str(tmp_path / "run"), "--images", "51", "--features", "digits,pixels"]
    command += ["--device", "cpu", "--batch_size", "8"]
    for out, steps in (("one", "2,3"), ("two", "2")):
        assert main([*command, "--steps", steps, "--out", str(tmp_path / out)]) == 0
    # what one process has made already, both know; the rest they make together
    done = two(*command, "--steps", "2,3", "--out", str(tmp_path / "two"), torchrun=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("1 of 2 combinations are there already") == 1
    assert done.stdout.count("results.json") == 1
    alone, together = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert [row["steps"] for row in together] == [2, 2, 3, 3]
    for a, b in zip(alone, together, strict=True):
        assert a["fd"] > 0
        for score in ("fd", "kid", "precision", "recall"):
            assert b[score] == pytest.approx(a[score], rel=1e-6, abs=1e-9)
        assert a["protocol"] == b["protocol"]
