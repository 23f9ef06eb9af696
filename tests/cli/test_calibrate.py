"""dualout calibrate, and --calibrated of sample and evaluate."""

import json
import os
import re
import shlex
from functools import partial

import numpy as np
import pytest
import torch

from dualout import Denoiser, Dual, InputError, data, schedules
from dualout.calibrated import NEUTRAL, Calibration
from dualout.cli.main import main
from dualout.networks.build import build
from dualout.samplers import DDIM, DPMSolver
from dualout.training import calibrate
from dualout.training.told import Told


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    denoiser = Denoiser(build("tiny:width=8", 1, (8, 8), 3), Dual(), schedules.Linear())
    path = tmp_path_factory.mktemp("runs") / "model"
    denoiser.save_pretrained(path, image={"channels": 1, "size": [8, 8]})
    return path


@pytest.fixture(autouse=True)
def few_noises_are_held_out(monkeypatch):
    """A thousand, which is no option of the command, are most of what a fit of four updates takes."""
    monkeypatch.setattr(calibrate, "Fit", partial(calibrate.Fit, held_out=64))


COMMAND = [
    "--data", "digits", "--sampler", "dpmsolver", "--steps", "3", "--iterations", "4", "--batch_size", "16",
    "--images", "128", "--move_times", "1",
]  # fmt: skip


def test_a_run_that_cannot_be_written_in_is_told_before_the_fit(run, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    monkeypatch.setattr(calibrate, "fit", lambda *_: pytest.fail("fitted"))
    assert main(["calibrate", str(run), *COMMAND]) == 2
    assert f"cannot write in {run}: it is read-only" in capsys.readouterr().err


def test_calibrates_and_applies(run, tmp_path, capsys):
    assert main(["calibrate", str(run), *COMMAND]) == 0
    path = run / "calibration" / "dpmsolver-3-trailing-order=2.json"
    found = json.loads(path.read_text())
    assert set(found["values"]) == set(NEUTRAL)
    assert all(len(v) == 3 for v in found["values"].values())
    assert found["protocol"]["held_out_after"] < found["protocol"]["held_out_before"]
    assert set(found["protocol"]["nearest"]) == {"before", "after", "held_out_images"}
    assert "nearest image of the fit" in capsys.readouterr().err

    common = ["--images", "8", "--sampler", "dpmsolver", "--steps", "3", "--format", "npz"]
    assert main(["sample", str(run), *common, "--out", str(tmp_path / "plain")]) == 0
    assert main(["sample", str(run), *common, "--calibrated", "--out", str(tmp_path / "calibrated")]) == 0
    protocol = json.loads((tmp_path / "calibrated" / "protocol.json").read_text())
    assert "x0_scale" in json.dumps(protocol)
    assert (tmp_path / "plain/images.npz").read_bytes() != (tmp_path / "calibrated/images.npz").read_bytes()


def test_the_precision_is_that_of_the_network_and_of_nothing_else(tmp_path, capsys):
    torch.manual_seed(0)
    denoiser = Denoiser(build("tiny:width=8", 1, (8, 8), 3), Dual(), schedules.Linear())
    torch.nn.init.normal_(denoiser.network.conv_out.weight, std=0.05)
    run = tmp_path / "model"
    denoiser.save_pretrained(run, image={"channels": 1, "size": [8, 8]})
    assert main(["calibrate", str(run), *COMMAND, "--device", "cpu", "--precision", "fp16"]) == 2
    assert "fp16 is for GPUs" in capsys.readouterr().err
    path, found = run / "calibration" / "dpmsolver-3-trailing-order=2.json", {}
    for precision in ("fp32", "bf16"):
        # with attention, whose number format on a processor is its own, also when it is computed again
        assert main(["calibrate", str(run), *COMMAND, "--device", "cpu", "--precision", precision]) == 0
        found[precision] = json.loads(path.read_text())
        assert found[precision]["protocol"]["precision"] == precision
    one, other = (torch.tensor(list(v["values"].values())) for v in found.values())
    assert (one - other).abs().max() > 0
    for when in ("held_out_before", "held_out_after"):
        fp32, bf16 = (v["protocol"][when] for v in found.values())
        assert fp32 != bf16
        assert fp32 == pytest.approx(bf16, rel=0.02)


def test_the_options_that_it_names_use_it(run, tmp_path, capsys):
    options = ["--sampler", "dpmsolver:reach=2", "--spacing", "leading"]
    assert main(["calibrate", str(run), *COMMAND, *options]) == 0
    (told,) = re.findall(r"use it with (.*)\)", capsys.readouterr().out)
    assert main(["sample", str(run), *shlex.split(told), "--images", "2", "--out", str(tmp_path / "out")]) == 0


def test_a_calibration_is_of_its_sampler_and_weights(run, tmp_path, capsys):
    sampler = DPMSolver(steps=3)
    times, numbers = sampler.timesteps(schedules.Linear()), {"x0_scale": [1.0, 1.0, 1.1]}
    Calibration(sampler.config(), times, numbers, {"weights": "of another training"}).save(run)
    command = ["sample", str(run), "--calibrated", "--out", str(tmp_path / "out")]
    assert main([*command, "--steps", "4"]) == 2
    assert "no calibration for ddim-4-trailing" in capsys.readouterr().err
    assert main([*command, "--sampler", "dpmsolver:order=3", "--steps", "3", "--spacing", "logsnr"]) == 2
    assert "--sampler dpmsolver:order=3 --steps 3 --spacing logsnr" in capsys.readouterr().err.replace("\n", " ")
    assert main([*command, "--sampler", "dpmsolver", "--steps", "3"]) == 2
    assert "calibrate again" in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"spacing": (900, 400)}, {"clip": (-3.0, 3.0)}])
def test_samplers_whose_files_have_one_name_are_told_apart(run, other):
    settings = {"steps": 2, "spacing": (999, 499), "clip": (-2.0, 2.0)}
    fitted = DDIM(**settings).config()
    Calibration(fitted, [999, 499], {"x0_scale": [1.0, 1.1]}).save(run)
    assert Calibration.load(run, fitted).times == [999, 499]
    with pytest.raises(InputError, match=f"was fitted for a sampler with {next(iter(other))}"):
        Calibration.load(run, DDIM(**settings | other).config())


def test_damaged_calibrations_are_refused(run):
    sampler = {"name": "ddim", "steps": 2, "spacing": "trailing", "clip": [-1.0, 1.0]}
    path = Calibration(sampler, [999, 499], {"x0_scale": [1.0, 1.0]}).save(run)
    assert Calibration.load(run, sampler).values == {"x0_scale": [1.0, 1.0]}
    for text in ("{", "[]", '{"sampler": {}, "times": [1], "values": {"x0_scale": [1, 2]}}'):
        path.write_text(text)
        with pytest.raises(InputError):
            Calibration.load(run, sampler)
    with pytest.raises(InputError, match="one number a step"):
        Calibration(sampler, [999, 499], {"x0_scale": [1.0]})


def test_single_outputs_have_no_ratio(run, capsys):
    assert main(["calibrate", str(run), *COMMAND, "--numbers", "x0_scal"]) == 2
    assert "did you mean 'x0_scale'" in capsys.readouterr().err


def test_a_dry_run_tells_and_does_nothing(run, capsys):
    before = sorted(run.rglob("*"))
    assert main(["calibrate", str(run), "--data", "digits", "--sampler", "ipndm", "--steps", "3", "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "sampler: ipndm" in told
    assert "# fitted     7 numbers at each of 3 steps" in told
    assert "# time" in told
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("known", [10, 3])
def test_models_of_classes_are_told_those_of_the_data_or_all_in_turn(tmp_path, known):
    torch.manual_seed(0)
    denoiser = Denoiser(build("tiny:width=8", 1, (8, 8), 3, classes=known), Dual(), schedules.Linear())
    run = tmp_path / "model"
    denoiser.save_pretrained(run, image={"channels": 1, "size": [8, 8]})
    assert main(["calibrate", str(run), *COMMAND, "--iterations", "1", "--move_times", "0"]) == 0
    protocol = json.loads((run / "calibration" / "dpmsolver-3-trailing-order=2.json").read_text())["protocol"]
    assert protocol["class_labels"] == ("of the real images" if known == 10 else "all in turn")
    assert protocol["own_features"] is not None


def test_made_images_have_as_many_of_each_class_as_the_real_ones():
    digits = data.load("digits")
    assert digits.labels is not None
    rows = [i for i, label in enumerate(digits.labels.tolist()) if label < 2 or i % 10 == 0]
    told = Told.of(10, digits, rows, torch.device("cpu"))
    assert told is not None
    made = told.classes(range(len(rows), 2 * len(rows)))["class_labels"]
    assert made.bincount().tolist() == digits.labels[rows].bincount().tolist()
    # also in a small batch, though the real ones may lie sorted
    assert set(told.classes(range(192))["class_labels"].tolist()) == set(range(10))
    assert told.nothing(2)["class_labels"].tolist() == [10, 10]


@pytest.mark.parametrize("seed", ["-1", str(2**64)])
def test_seeds_that_no_generator_takes(run, capsys, seed):
    assert main(["calibrate", str(run), *COMMAND, "--seed", seed]) == 2
    assert "--seed is a whole number from 0 to" in capsys.readouterr().err


def test_the_images_are_those_that_the_model_was_trained_on(run, tmp_path, capsys):
    few = COMMAND[2:]
    assert main(["calibrate", str(run), *few]) == 2
    assert "does not say what it was trained on: give --data" in capsys.readouterr().err
    name = f"arrays:path={tmp_path / 'mine.npy'}"
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8))
    denoiser = Denoiser(build("tiny:width=8", 1, (8, 8), 3), Dual(), schedules.Linear())
    denoiser.save_pretrained(tmp_path / "other", image={"channels": 1, "size": [8, 8]}, data={"name": name})
    assert main(["calibrate", str(tmp_path / "other"), *few, "--iterations", "1", "--move_times", "0"]) == 0
    (found,) = (tmp_path / "other" / "calibration").iterdir()
    assert json.loads(found.read_text())["protocol"]["data"]["name"] == name
