"""A denoiser that is saved comes back as it was, whatever its parameterization and schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dualout
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.networks.build import build
from dualout.parameterizations import Dual, Parameterization
from dualout.schedules import Cosine, Schedule
from variants import parameterizations, schedules

T = 50


def denoiser(parameterization: Parameterization, schedule: Schedule) -> Denoiser:
    network = build("tiny:width=8", 1, 8, parameterization.channels(1))
    made = Denoiser(network, parameterization, schedule).eval()
    with torch.no_grad():
        for weight in made.parameters():  # some begin at zero
            weight.copy_(torch.randn_like(weight) * 0.2)
    return made


def same(a: Denoiser, b: Denoiser) -> None:
    assert (a.parameterization, a.schedule) == (b.parameterization, b.schedule)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 20, T - 1])
    p, q = a(x, t), b(x, t)
    assert torch.equal(p.x0, q.x0)
    assert p.parts.keys() == q.parts.keys()
    assert all(torch.equal(part, q.parts[name]) for name, part in p.parts.items())


@pytest.mark.parametrize("parameterization", parameterizations())
def test_every_parameterization(parameterization: Parameterization, tmp_path: Path) -> None:
    made = denoiser(parameterization, Cosine(T))
    made.save_pretrained(tmp_path / "model")
    same(made, Denoiser.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize("schedule", schedules(T))
def test_every_schedule(schedule: Schedule, tmp_path: Path) -> None:
    made = denoiser(Dual(), schedule)
    made.save_pretrained(tmp_path)
    loaded = Denoiser.from_pretrained(tmp_path)
    same(made, loaded)
    assert not loaded.training
    assert torch.equal(loaded.schedule.log_snr, schedule.log_snr)  # to the last bit, betas included


def test_what_a_checkpoint_is(tmp_path: Path) -> None:
    made = denoiser(Dual(ratio="channel", gate="balanced"), Cosine(T))
    made.card["title"] = "A test"
    made.save_pretrained(tmp_path, image={"channels": 1, "size": 8})
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["schedule"] == {"name": "cosine", "steps": T, "offset": 0.008, "beta_max": 0.999}
    assert config["parameterization"]["ratio"] == "channel"
    assert config["image"] == {"channels": 1, "size": 8}
    readme = (tmp_path / "README.md").read_text()
    assert "# A test" in readme
    assert "gate=balanced" in readme
    assert Denoiser.from_pretrained(tmp_path).card["title"] == "A test"


def test_a_loaded_one_samples_the_same(tmp_path: Path) -> None:
    made = denoiser(Dual(), Cosine(T))
    made.save_pretrained(tmp_path)
    noise = dualout.noise(range(4), (1, 8, 8))
    sampler = dualout.samplers.DPMSolver(steps=4)
    assert torch.equal(sampler.sample(made, noise), sampler.sample(Denoiser.from_pretrained(tmp_path), noise))


def test_what_has_no_class_of_ours_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for network in (torch.nn.Conv2d(1, 3, 1), lambda x, t: x):
        with pytest.raises(InputError):
            Denoiser(network, Dual(), Cosine(T)).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    denoiser(Dual(), Cosine(T)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["parameterization"] = {"name": "dual", "ratio": "step", "gate": "posterior", "detach": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"missing: head\.logit"):
        Denoiser.from_pretrained(tmp_path)
