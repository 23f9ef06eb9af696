"""What --dry_run expects of making images."""

from __future__ import annotations

import torch
import yaml

from dualout import Denoiser, Dual
from dualout.cli.main import main
from dualout.evaluation.cost import Living, cost
from dualout.evaluation.sampling import Sampling, build_sampler
from dualout.networks import build
from dualout.schedules import Linear


def test_what_lives_at_once_is_counted():
    x = torch.zeros(1000)
    with Living([x]) as living:
        a = x + 1  # 4,000 bytes
        b = a * 2  # 8,000 at once
        del a
        b.view(10, 100).add_(1)  # the same memory
        c = b + 1  # 8,000 again
        del b, c
        _ = x[:250] + 1
    assert living.most == 8000


def test_every_look_of_the_network_is_counted(make_model):
    heun, ddim = (Sampling(make_model(), build_sampler(name, 5)) for name in ("heun", "ddim"))
    assert cost([ddim], 10, 4).evaluations == 50
    assert cost([ddim, heun], 10, 4).evaluations == 10 * (5 + heun.sampler.evaluations)
    # a batch of four lives four times as large as one of one
    large = Sampling(make_model((3, 32, 32)), build_sampler("ddim", 5))
    assert 3.8 < cost([large], 8, 4).memory / cost([large], 8, 1).memory <= 4


def test_a_dry_run_tells_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = build("tiny:width=4", 1, 8, 3)
    Denoiser(network, Dual(), Linear()).save_pretrained("model", image={"channels": 1, "size": [8, 8]})
    before = sorted(tmp_path.rglob("*"))
    for command in (["sample", "--steps", "3", "--images", "8"], ["evaluate", "--steps", "3,4", "--images", "8"]):
        assert main([command[0], "model", *command[1:], "--device", "cpu", "--dry_run"]) == 0
        text = capsys.readouterr().out
        assert yaml.safe_load(text)["images"] == 8
        assert f"{sum(p.numel() for p in network.parameters()):,} parameters" in text
        assert f"{8 * sum(map(int, command[2].split(',')))} times" in text
        assert "# memory     about" in text
        assert "# time       about" in text
    assert sorted(tmp_path.rglob("*")) == before
