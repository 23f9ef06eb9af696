"""dualout train, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import yaml
from PIL import Image

import dualout
from dualout.cli.analyze import made_labels
from dualout.cli.main import main
from dualout.data import cache, decode
from dualout.evaluation.model import Model
from dualout.evaluation.sampling import Sampling
from dualout.training import checkpoint as files

SMALL = ["--network", "tiny:width=8", "--batch_size", "4", "--log_every", "2", "--precision", "fp32"]


def train(*arguments, out) -> int:
    return main(["train", *SMALL, "--out", str(out), *map(str, arguments)])


def test_leaves_a_checkpoint_metrics_and_grids(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--steps", 5, "--sample_every", 4, "--samples", 5, "--sampler", "ddim:steps=2", out=out) == 0
    said = capsys.readouterr()
    assert f"wrote {out}" in said.out
    assert "fp32 (as asked)" in said.err
    assert "step 5/5" in said.err
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert {"loss", "loss/eps", "loss/x0", "loss/mu", "lr", "grad_norm", "images_per_s", "seconds"} <= rows[0].keys()
    assert train("--steps", 3, out=out) == 0
    assert f"{out} has its 5 steps; a higher --steps goes on" in capsys.readouterr().err
    # five images of 8×8 in three columns, each pixel eight wide, and gaps
    for step in (4, 5):
        assert Image.open(out / "samples" / f"step-{step:06d}.png").size == (26 * 8, 17 * 8)
    assert yaml.safe_load((out / "train.yaml").read_text())["batch_size"] == 4
    denoiser = dualout.Denoiser.from_pretrained(out)
    x = dualout.samplers.Sampler.parse("ddim", steps=2).sample(denoiser, dualout.noise([0], (1, 8, 8)))
    assert x.shape == (1, 1, 8, 8)
    assert x.isfinite().all()


def test_same_command_again_does_nothing_and_a_longer_one_goes_on(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--steps", 2, "--sample_every", 0, out=out) == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "lock"}
    assert train("--steps", 2, "--sample_every", 0, out=out) == 0
    assert "has its 2 steps" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "lock"}
    assert train("--steps", 4, "--sample_every", 0, out=out) == 0
    assert "going on from step 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lr", "0.5"], "lr 0.001 → 0.5"),
        (["--parameterization", "eps"], "parameterization dual → eps|parameterization None → eps"),
        (["--data", "photos"], "data digits → photos"),
        (["--seed", "1"], "seed 0 → 1"),
    ],
)
def test_changed_settings_are_refused(tmp_path_factory, capsys, arguments, says):
    out = tmp_path_factory.getbasetemp() / "changed"
    if not out.exists():
        assert train("--steps", 1, "--sample_every", 0, out=out) == 0
    before = (out / "model.safetensors").read_bytes()
    assert train("--steps", 1, *arguments, out=out) == 2
    assert re.search(says, capsys.readouterr().err)
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--parameterization", "dul"], "did you mean 'dual'"),
        (["--data", "digit"], "did you mean 'digits'"),
        (["--network", "tinny"], "did you mean 'tiny'"),
        (["--batchsize", "3"], "did you mean '--batch_size'"),
        (["--sampler", "ddim:steps=5000"], "1000"),
        (["--init", "nowhere/at all/x"], "no checkpoint"),
        (["--device", "tpu9"], "--device 'tpu9' cannot be used"),
        (["--precision", "fp16", "--device", "cpu"], "fp16 is for GPUs"),
        (["--steps", "many"], "steps"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(tmp_path, capsys, arguments, says):
    out = tmp_path / "run"
    code = main(["train", "--batch_size", "4", "--steps", "1", "--sample_every", "1", "--out", str(out), *arguments])
    said = capsys.readouterr().err
    assert code == 2
    assert says in said
    assert not (out / "model.safetensors").exists()


def test_directory_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert train("--steps", 1, out=tmp_path) == 2
    assert "holds something else (thesis.tex)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_dry_run_writes_nothing_and_prints_a_configuration(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--dry_run", "--steps", 7, out=out) == 0
    said = capsys.readouterr().out
    assert not out.exists()
    printed = yaml.safe_load(said)
    assert printed["parameterization"] == "dual"
    assert printed["steps"] == 7
    assert "45,115 parameters" in said
    assert "MiB" in said
    # what it prints is a configuration
    (tmp_path / "again.yaml").write_text(said)
    assert main(["train", "--config", str(tmp_path / "again.yaml"), "--dry_run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == printed


def test_a_dry_run_decodes_a_few_images(tmp_path, capsys, monkeypatch):
    decoded, counted = decode.decoded, []
    monkeypatch.setattr(decode, "decoded", lambda *given: counted.append(1) or decoded(*given))
    for i in range(150):
        (folder := tmp_path / "images" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f"{i}.png")
    # one that is damaged is not in the way
    first = tmp_path / "images" / "0" / "0.png"
    first.write_bytes(first.read_bytes()[:-30])
    arguments = ["train", "--data", f"folder:{tmp_path / 'images'}", "--device", "cpu", "--conditional", "true"]
    arguments += ["--network", "tiny:width=8", "--steps", "1", "--batch_size", "100", "--sample_every", "0"]
    command = [*arguments, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    assert main([*command, "--dry_run"]) == 0
    assert "150 images 1×8×8, 3 classes" in capsys.readouterr().out
    assert 1 < len(counted) <= 64
    assert [p.name[:6] for p in (tmp_path / "cache").iterdir()] == ["index-"]
    # what goes on is seen to have the same images
    assert main(command) == 0
    assert main([*command, "--steps", "2", "--dry_run"]) == 0
    assert "goes on from step 1" in capsys.readouterr().out
    first.unlink()
    assert main([*command, "--steps", "2", "--dry_run"]) == 0
    (tmp_path / "images" / "1" / "1.png").unlink()
    assert main([*command, "--steps", "2", "--dry_run"]) == 2
    assert "began with other images: images 149 → 148" in capsys.readouterr().err
    # what the training would refuse is refused
    monkeypatch.setattr(cache, "IN_MEMORY", 5000)
    assert main([*arguments, "--out", str(tmp_path / "new"), "--dry_run"]) == 2
    assert "too much to keep in memory" in capsys.readouterr().err


def test_a_grid_takes_no_more_memory_than_training_does(tmp_path, monkeypatch):
    images, sizes = Sampling.images, []
    monkeypatch.setattr(Sampling, "images", lambda self, which: sizes.append(len(which)) or images(self, which))
    out = tmp_path / "run"
    assert train("--steps", 1, "--accumulate", 2, "--samples", 5, "--sampler", "ddim:steps=1", out=out) == 0
    # of a batch of 4 in two parts
    assert sizes == [2, 2, 1]
    assert Image.open(out / "samples" / "step-000001.png").size[0] > 8


def test_its_own_yaml_goes_on_with_a_run(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--steps", 1, "--sample_every", 0, out=out) == 0
    assert main(["train", "--config", str(out / "train.yaml"), "--steps", "2", "--out", str(out)]) == 0
    assert "going on from step 1" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_a_checkpoint(tmp_path, capsys, number, code):
    out = tmp_path / "run"

    def send():
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    sender = threading.Thread(target=send)
    sender.start()
    assert train("--steps", 100_000, "--sample_every", 0, out=out) == code
    sender.join()
    assert signal.getsignal(number) is before
    ((step, _),) = files.states(out)
    assert step >= 2
    assert f"stopped after step {step}" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["training"]["step"] == step


def test_colour_classes_and_mirrors(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(12) % 2)
    data = f"arrays:{tmp_path / 'x.npz'}"
    out = tmp_path / "run"
    grid = ["--sample_every", 1, "--samples", 4, "--sampler", "ddim:steps=1"]
    assert train("--data", data, "--conditional", "--flip", "--steps", 1, *grid, out=out) == 0
    written = json.loads((out / "config.json").read_text())
    assert written["image"] == {"channels": 3, "size": [8, 8], "latents": False}
    assert written["conditions"] == {"class_labels": {"classes": ["0", "1"], "null": 2}}
    assert written["network"]["arguments"]["num_class_embeds"] == 3
    assert Image.open(out / "samples" / "step-000001.png").mode == "RGB"


def test_as_many_files_may_be_unreadable_later_as_in_training(tmp_path):
    (tmp_path / "x").mkdir()
    for i in range(8):
        Image.fromarray(np.full((8, 8), i * 30, np.uint8)).save(tmp_path / "x" / f"{i}.png")
    (tmp_path / "x" / "8.png").write_bytes(b"no image")
    out = tmp_path / "run"
    assert train("--data", f"folder:{tmp_path / 'x'}", "--strict", 0.2, "--steps", 1, "--sample_every", 0, out=out) == 0
    scores = ["--split", "all", "--images", "8", "--steps", "1", "--features", "pixels"]
    assert main(["evaluate", str(out), *scores]) == 0
    # run.json knows the share as an option of its own, which may change
    assert train("--data", f"folder:{tmp_path / 'x'}", "--strict", 0.5, "--steps", 2, "--sample_every", 0, out=out) == 0


def test_classes_without_images_are_told_and_not_sampled_by_default(tmp_path, capsys):
    # as EMNIST's letters are labelled, from 1
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(12) % 3 + 1)
    data, out = f"arrays:{tmp_path / 'x.npz'}", tmp_path / "run"
    assert train("--data", data, "--conditional", "--steps", 1, "--sample_every", 1, "--samples", 4, out=out) == 0
    assert "no image is of class 0: that is not learned" in capsys.readouterr().err
    model = Model.load(out)
    assert (model.classes, model.unseen, model.turn) == (4, (0,), (1, 2, 3))
    for asked, labels in (([], [1, 2, 3, 1]), (["--class_label", "0"], [0, 0, 0, 0])):
        made = tmp_path / f"out{len(asked)}"
        command = ["sample", str(out), "--images", "4", "--steps", "1", "--format", "npz", *asked]
        assert main([*command, "--out", str(made)]) == 0
        assert np.load(made / "images.npz")["labels"].tolist() == labels
    assert made_labels(model, 4) == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("schedule", "told"), [("linear:steps=100", True), ("cosine:steps=100", False), ("linear", False)]
)
def test_a_schedule_that_ends_with_much_of_the_image_is_told(tmp_path, capsys, schedule, told):
    out = tmp_path / "run"
    assert train("--schedule", schedule, "--steps", 1, "--sample_every", 0, out=out) == 0
    said = capsys.readouterr().err
    assert ("of the image at its last step, and samples begin with noise alone" in said) == told
    assert (f"--schedule {schedule} leaves 0.6 of the image" in said) == told


def test_guidance_is_refused_where_no_class_was_ever_withheld(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--conditional", "--label_dropout", 0, "--steps", 1, "--sample_every", 0, out=out) == 0
    command = ["sample", str(out), "--images", "2", "--steps", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--guidance", "2"]) == 2
    assert "was trained with --label_dropout 0, never without a class" in capsys.readouterr().err
    assert main([*command, "--guidance", "1"]) == 0


@pytest.mark.parametrize(
    "parameterization", ["eps", "x0", "velocity", "karras", "dual:ratio=step", "dual:gate=balanced"]
)
def test_every_kind_trains(tmp_path, parameterization):
    schedule = ["--schedule", "edm"] if parameterization == "karras" else []
    out = tmp_path / "run"
    assert train("--parameterization", parameterization, *schedule, "--steps", 2, "--sample_every", 0, out=out) == 0
    assert dualout.Denoiser.from_pretrained(out).parameterization.spec == parameterization


def test_grids_of_a_schedule_with_few_levels(tmp_path, capsys):
    few = ("--schedule", "linear:steps=4", "--steps", 1, "--samples", 1)
    assert train(*few, out=tmp_path / "run") == 0
    assert (tmp_path / "run" / "samples" / "step-000001.png").exists()
    capsys.readouterr()
    # the sampler is named, which train's own --steps is not of
    assert train(*few, "--sampler", "ddim:steps=5", out=tmp_path / "other") == 2
    assert "--sampler ddim:steps=5 takes 5 steps, and the schedule has 4" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
