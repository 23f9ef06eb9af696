import csv
import json
import os

import numpy as np
import pytest
import torch

import dualout
from dualout.cli.main import main
from dualout.evaluation.card import put_on_card
from dualout.evaluation.model import Model
from dualout.evaluation.sampling import Sampling
from dualout.evaluation.scoring import Scoring

ROW = ("fd", "kid", "precision", "recall", "images", "nfe", "seconds", "protocol")


def save(path, parameterization, channels=1, **extra):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=parameterization.channels(channels),
        block_out_channels=(8, 8), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    denoiser = dualout.Denoiser(network, parameterization, dualout.schedules.Linear(steps=100))
    denoiser.save_pretrained(path, image={"channels": channels, "size": [8, 8]}, **extra)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    return {
        "dual": str(save(place / "dual", dualout.Dual())),
        "eps": str(save(place / "eps", dualout.Epsilon())),
        "colour": str(save(place / "colour", dualout.Epsilon(), 3)),
    }


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DUALOUT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def rows_of(out):
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("card", [[], ["--card"]])
def test_a_place_that_cannot_be_written_in_is_told_before_images_are_made(runs, tmp_path, capsys, monkeypatch, card):
    place = runs["dual"] if card else str(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != place)
    monkeypatch.setattr(Scoring, "run", lambda *_: pytest.fail("made"))
    command = ["evaluate", runs["dual"], "--data", "digits", "--images", "8", "--steps", "2", "--features", "pixels"]
    assert main([*command, *card, "--out", str(tmp_path)]) == 2
    assert f"cannot write in {place}: it is read-only" in capsys.readouterr().err


def test_one_row_a_combination(runs, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["evaluate", f"{runs['dual']},{runs['eps']}", "--images", "12", "--samplers", "ddim,dpmsolver"]
    command += ["--steps", "2,3", "--spacings", "trailing,linspace", "--routes", "mix,x0", "--seeds", "0,1"]
    command += ["--data", "digits", "--features", "digits", "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    rows = rows_of(out)
    keys = {tuple(r[k] for k in ("parameterization", "route", "sampler", "spacing", "steps", "seed")) for r in rows}
    # the eps model has no route x0
    assert len(rows) == len(keys) == 3 * 2 * 2 * 2 * 2
    assert {r["route"] for r in rows if r["parameterization"] != "dual"} == {"mix"}
    for row in rows:
        assert set(ROW) <= row.keys()
        assert row["nfe"] == row["steps"]
        assert np.isfinite([row[k] for k in ("fd", "kid", "precision", "recall")]).all()
        assert row["protocol"]["reference"]["split"] == "test"
        assert row["protocol"]["seed"] == 12 * row["seed"]
        assert "12 generated images" in row["protocol"]["warning"]
    assert len({r["fd"] for r in rows}) == len(rows)
    with (out / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["fd"]) for line in table] == [r["fd"] for r in rows]
    printed = capsys.readouterr()
    assert "12 images against digits (test)" in printed.out
    assert "has no route x0" in printed.err
    assert "biased upward by few images" in printed.err


def test_interrupted_and_given_again(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["evaluate", runs["dual"], "--images", "8", "--steps", "1,2,3", "--out", str(out)]
    run, begun = Scoring.run, []

    def counting(self, batch_size=256):
        begun.append(self.sampling.sampler.steps)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return run(self, batch_size)

    monkeypatch.setattr(Scoring, "run", counting)
    assert main(command) == 130
    first = rows_of(out)
    assert [r["steps"] for r in first] == [1, 2]
    assert main(command) == 0
    assert begun == [1, 2, 3, 3]
    assert rows_of(out)[:2] == first
    assert [r["steps"] for r in rows_of(out)] == [1, 2, 3]
    assert "2 of 3 combinations are there already" in capsys.readouterr().err
    # a set of another size is rows of its own, and the table is of that size
    capsys.readouterr()
    assert main([*command, "--images", "9"]) == 0
    assert begun[4:] == [1, 2, 3]
    assert "9 images against digits" in capsys.readouterr().out
    assert [(r["images"], r["steps"]) for r in rows_of(out)] == [(n, k) for n in (8, 9) for k in (1, 2, 3)]
    # and the first is still there, also as a shell completes its name
    assert main(command) == 0
    assert main(["evaluate", f"{runs['dual']}/", *command[2:]]) == 0
    assert len(begun) == 7


def test_several_features_and_the_model_card(runs, tmp_path):
    run = save(tmp_path / "run", dualout.Dual(), card_before="kept")
    assert main(["evaluate", str(run), "--images", "8", "--steps", "2", "--features", "pixels,random", "--card"]) == 0
    rows = rows_of(run / "evaluation")
    assert [r["features"] for r in rows] == ["pixels", "random"]
    text = (run / "README.md").read_text()
    assert f"{rows[0]['fd']:.4g}" in text
    assert "296 of digits (test)" in text
    config = json.loads((run / "config.json").read_text())
    assert len(config["card"]["metrics"]) == 2
    assert config["card_before"] == "kept"
    # it is still a checkpoint, and the same scores are not written twice
    dualout.Denoiser.from_pretrained(run)
    assert main(["evaluate", str(run), "--images", "8", "--steps", "2", "--features", "pixels,random", "--card"]) == 0
    assert len(json.loads((run / "config.json").read_text())["card"]["metrics"]) == 2
    # guided by 0 is by no class, and no guidance is not that
    for scale in (0.0, 2.0, 0.0):
        put_on_card(run, [row | {"guidance": scale} for row in rows])
    lines = json.loads((run / "config.json").read_text())["card"]["metrics"]
    assert [line.get("guidance") for line in lines] == [None, None, 2.0, 2.0, 0.0, 0.0]


def test_sampler_options_are_part_of_the_row(runs, tmp_path):
    out = tmp_path / "out"
    specs = "ddim,ddim:eta=0.5,ddim:clip=null"
    assert (
        main(["evaluate", runs["dual"], "--images", "8", "--steps", "2", "--samplers", specs, "--out", str(out)]) == 0
    )
    assert [r["sampler"] for r in rows_of(out)] == specs.split(",")


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        ("dual", ["--samplers", "ddim,ddmp"], "unknown sampler 'ddmp'; did you mean"),
        ("dual", ["--steps", "5,0"], "1 or more; got 0"),
        ("dual", ["--steps", "5,101"], "from 1 to 100"),
        ("dual", ["--steps", "5,x"], "--steps are whole numbers"),
        ("dual", ["--steps", ","], "--steps names none"),
        ("dual", ["--spacings", "linspce"], "did you mean 'linspace'?"),
        ("dual", ["--routes", "mix,x1"], "did you mean 'x0'?"),
        ("eps", ["--routes", "x0"], "one output"),
        ("dual", ["--features", "pixel"], "did you mean 'pixels'?"),
        ("dual", ["--data", "digit"], "did you mean 'digits'?"),
        ("dual", ["--split", "tset"], "did you mean 'test'?"),
        ("dual", ["--images", "3"], "more than 3 images"),
        ("dual", ["--data", "photos", "--split", "train", "--features", "pixels"], ":grey=true"),
        ("colour", ["--features", "digits"], "these are colour 8×8"),
        ("colour", ["--features", "pixels"], "3 channels and 8×8 pixels"),
        ("dual", ["--features", "inception:weights=none.pth"], "there is no file none.pth"),
        ("dual", ["--batch_size", "0"], "--batch_size is a whole number"),
    ],
)
def test_bad_input_is_told_before_any_sampling(runs, tmp_path, capsys, monkeypatch, run, flags, message):
    out = tmp_path / "out"
    monkeypatch.setattr(Scoring, "run", lambda *_: pytest.fail("sampling has begun"))
    assert main(["evaluate", runs[run], "--images", "8", "--out", str(out), *flags]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not out.exists()


def test_a_directory_with_something_else(runs, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["evaluate", runs["dual"], "--images", "8", "--out", str(tmp_path)]) == 2
    assert "holds something else (notes.txt)" in capsys.readouterr().err
    assert main(["evaluate", f"{runs['dual']},nobody/nothing-here-x", "--card", "--out", str(tmp_path / "o")]) == 2
    assert "--card writes into a checkpoint's directory" in capsys.readouterr().err


def test_images_are_compared_with_what_the_models_were_trained_on(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    for name, spec in {"mine": f"arrays:path={tmp_path / 'mine.npy'}:holdout=0.5", "digits": "digits"}.items():
        np.save(tmp_path / f"{name}.npy", images)
        save(tmp_path / name, dualout.Dual(), data={"name": spec})
    command = ["--images", "8", "--steps", "1", "--features", "pixels", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(tmp_path / "mine"), *command]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["protocol"]["reference"]["data"].startswith("arrays:path=")
    assert "images against arrays:path=" in capsys.readouterr().out
    assert main(["evaluate", f"{tmp_path / 'mine'},{tmp_path / 'digits'}", *command]) == 2
    assert "trained on different data" in capsys.readouterr().err


def test_scales_of_guidance_are_rows_beside_each_other(tmp_path, capsys):
    run, out = tmp_path / "classes", tmp_path / "out"
    network = dualout.networks.build("tiny:width=8", image_channels=1, size=8, out_channels=1, classes=10)
    denoiser = dualout.Denoiser(network, dualout.Epsilon(), dualout.schedules.Linear(steps=100))
    denoiser.save_pretrained(run, image={"channels": 1, "size": [8, 8]})
    command = ["evaluate", str(run), "--images", "8", "--steps", "2", "--features", "pixels", "--out", str(out)]
    assert main([*command, "--guidance", "1,2.5"]) == 0
    assert [(row["guidance"], row["nfe"]) for row in rows_of(out)] == [(1.0, 2), (2.5, 4)]
    assert "guidance" in capsys.readouterr().out
    assert main([*command, "--guidance", "2.5"]) == 0
    assert "seed 0, features pixels, guidance 2.5\n" in capsys.readouterr().out
    assert len(rows_of(out)) == 2
    (tmp_path / "one.yaml").write_text("guidance: 2.5\nsteps: [2]\nseeds: 0\n")
    assert main(["evaluate", str(run), "--config", str(tmp_path / "one.yaml"), *command[2:4], *command[6:]]) == 0
    assert len(rows_of(out)) == 2
    assert main([*command, "--guidance", "2,much"]) == 2
    assert "--guidance are numbers separated by commas, got '2,much'" in capsys.readouterr().err


def test_features_by_default_are_those_that_take_the_images(runs, tmp_path):
    own = tmp_path / "own.npy"
    np.save(own, np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8))
    for name, data, features in (("dual", "digits", ["digits"]), ("colour", f"arrays:{own}", ["pixels", "random"])):
        out = tmp_path / name
        command = ["evaluate", runs[name], "--data", data, "--split", "all", "--images", "8", "--steps", "2"]
        assert main([*command, "--out", str(out)]) == 0
        assert [row["features"] for row in rows_of(out)] == features


def test_one_row_at_a_time_holds_what_its_backend_made(runs, tmp_path, monkeypatch):
    prepare, release, held, most = Sampling.prepare, Sampling.release, set(), []

    def prepared(self, *counts):
        prepare(self, *counts)
        held.add(self)
        most.append((len(held), len({s.model.run for s in held if s.model.prepared})))

    def released(self):
        release(self)
        held.discard(self)

    monkeypatch.setattr(Sampling, "prepare", prepared)
    monkeypatch.setattr(Sampling, "release", released)
    command = ["evaluate", f"{runs['dual']},{runs['eps']}", "--images", "8", "--steps", "2,3", "--data", "digits"]
    command += ["--features", "pixels", "--device", "cpu", "--backend", "onnx"]
    assert main([*command, "--out", str(tmp_path / "onnx")]) == 0
    assert set(most) == {(1, 1)}
    assert not held
    # and the protocol says it still
    assert {row["protocol"]["computed_by"]["backend"] for row in rows_of(tmp_path / "onnx")} == {"onnx"}


def test_a_sampling_that_was_released_prepares_itself_again(runs):
    sampling = Sampling(Model.load(runs["dual"]), dualout.samplers.DDIM(steps=2), backend="onnx")
    before = sampling.images(range(3))
    said = sampling.computed()
    assert said["computed_by"]["backend"] == "onnx"
    sampling.release()
    assert sampling.computed() == said
    assert sampling.view.network is sampling.model.denoiser.network
    assert torch.equal(sampling.images(range(3)), before)
    assert sampling.view.network is not sampling.model.denoiser.network
