"""dualout compare: what is chosen, what is averaged, and that nothing is done twice."""

import gc
import json
import os
import signal
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from dualout.analysis import compare, reading
from dualout.analysis.grid import Grid
from dualout.cli._collect import collect
from dualout.cli.compare import Options
from dualout.cli.main import main
from dualout.cli.options import parse
from dualout.errors import InputError
from dualout.schedules import Linear


def row(method, spacing, seed, fd, training_seed=0):
    return {
        "method": method, "training_seed": training_seed, "sampler": "ddim", "spacing": spacing, "steps": 5,
        "calibrated": False, "features": "digits", "seed": seed, "fd": fd, "nfe": 5, "precision": 1.0, "recall": 1.0,
        "reported": seed == 1,
    }  # fmt: skip


def test_the_spacing_is_chosen_on_other_samples_than_are_reported():
    rows = [
        row("eps", "trailing", 0, 1.0), row("eps", "linspace", 0, 2.0),
        row("eps", "trailing", 1, 9.0), row("eps", "linspace", 1, 3.0),
        row("dual", "trailing", 0, 5.0), row("dual", "linspace", 0, 4.0),
        row("dual", "trailing", 1, 1.0), row("dual", "linspace", 1, 6.0),
    ]  # fmt: skip
    best = compare.chosen(rows)
    assert {(r["method"], r["spacing"], r["fd"]) for r in best} == {("eps", "trailing", 9.0), ("dual", "linspace", 6.0)}


def test_ratios_are_paired_by_training_seed():
    rows = [row("eps", "trailing", 1, fd, s) for s, fd in enumerate((10.0, 20.0, 40.0))]
    rows += [row("dual", "trailing", 1, fd, s) for s, fd in enumerate((5.0, 12.0, 28.0))]
    by_method = {r["method"]: r for r in compare.summary(rows, "eps")}
    assert by_method["dual"]["ratio"] == pytest.approx(0.6)
    assert by_method["dual"]["ratio_sd"] == pytest.approx(0.1)
    assert by_method["eps"]["ratio"] == 1
    assert by_method["dual"]["fd"] == pytest.approx(15)


def test_a_report_says_the_numbers_of_the_summary(tmp_path):
    choosing = [row(m, "trailing", 0, 1.0, s) for m in ("dual", "eps") for s in range(3)]
    rows = [row("eps", "trailing", 1, fd, s) for s, fd in enumerate((10.0, 20.0, 40.0))]
    rows += [row("dual", "trailing", 1, fd, s) for s, fd in enumerate((5.0, 12.0, 28.0))]
    (tmp_path / "results.json").write_text("[]")
    (tmp_path / "table.json").write_text(json.dumps([*choosing, *rows]))
    _, scores = collect([str(tmp_path)])
    (shown,), summed = reading.cells(scores), {r["method"]: r for r in compare.summary(rows, "eps")}
    assert {m: shown["spreads"][m] for m in summed} == {m: (r["fd"], r["fd_sd"], 3) for m, r in summed.items()}
    assert shown["dual / eps"] == summed["dual"]["ratio"]


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory):
    grid = {
        "methods": {"eps": "eps", "dual": {"parameterization": "dual", "routes": ["mix", "x0"]}},
        "train": {"data": "digits", "network": "tiny:width=8", "steps": 1, "batch_size": 8},
        "samplers": ["ddim"], "spacings": ["trailing", "linspace"], "steps": [1], "calibrated": [False, True],
        # a fit of one update, without all else that takes longer
        "calibration": {"iterations": 1, "batch": 8, "held_out": 16, "move_times": 0, "own_features": False},
        "features": ["pixels"], "images": 16, "device": "cpu",
    }  # fmt: skip
    path = tmp_path_factory.mktemp("grid") / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


@pytest.mark.parametrize(("number", "code", "at"), [(signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 5)])
def test_a_comparison_that_is_stopped_while_it_trains_goes_on_from_there(
    grid_file, tmp_path, monkeypatch, capsys, number, code, at
):
    grid = yaml.safe_load(grid_file.read_text()) | {"methods": {"dual": "dual"}, "calibrated": [False], "steps": [1]}
    grid["train"] |= {"steps": 5}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    command = ["compare", "--config", str(tmp_path / "grid.yaml"), "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    trained = []

    class Stopping(compare.Doing):
        def __new__(cls, what, done, total):
            if "training" in what:
                trained.append(done)
                if trained == [*range(1, at + 1)]:
                    os.kill(os.getpid(), number)
            return super().__new__(cls, what, done, total)

    before = signal.getsignal(number)
    monkeypatch.setattr(compare, "Doing", Stopping)
    assert main([*command, str(tmp_path / "out")]) == code
    assert signal.getsignal(number) is before
    assert "stopped: the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "out" / "table.json").exists()
    assert main([*command, str(tmp_path / "out")]) == 0
    # no step is made twice
    assert trained == [1, 2, 3, 4, 5]
    found = [next((tmp_path / name / "models").iterdir()) / "model.safetensors" for name in ("whole", "out")]
    assert found[0].read_bytes() == found[1].read_bytes()


def test_a_model_is_let_go_when_its_rows_are_there(grid_file, tmp_path, monkeypatch):
    loaded, load = [], compare.Model.load

    def noticed(*given, **named):
        model = load(*given, **named)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(compare.Model, "load", noticed)
    grid = Grid(**yaml.safe_load(grid_file.read_text()) | {"calibrated": [False], "spacings": ["trailing"]})
    doing = compare.run(grid, tmp_path)
    rows = next(item for item in doing if isinstance(item, list))
    gc.collect()
    # the last one is at hand still
    assert [ref() is None for ref in loaded] == [True, False]
    assert Counter(row["method"] for row in rows) == {"eps": 2, "dual": 2, "dual (x0)": 2}


def test_a_grid_costs_only_what_is_new(grid_file, capsys):
    out = grid_file.parent / "out"
    command = ["compare", "--config", str(grid_file), "--out", str(out)]
    assert main(command) == 0
    first = json.loads((out / "table.json").read_text())
    # 2 spacings × 2 sets of samples × (eps, eps calibrated, dual, dual's x0, dual calibrated)
    assert len(first) == 20
    assert {r["seed"]: r["reported"] for r in first} == {0: False, 1: True}
    assert {r["method"] for r in first} == {"eps", "dual", "dual (x0)"}
    assert all(r["protocol"]["sampler"]["steps"] == 1 for r in first)
    text = (out / "summary.md").read_text()
    assert "ratio" in text
    assert "linspace" in text
    assert (out / "figures" / "pixels-ddim-best.png").read_bytes().startswith(b"\x89PNG")

    weights = {p: p.stat().st_mtime_ns for p in out.glob("models/*/model.safetensors")}
    capsys.readouterr()
    assert main([*command, "--also", "[{samplers: [dpmsolver], calibrated: [false]}]"]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("models/*/model.safetensors")} == weights
    again = json.loads((out / "table.json").read_text())
    assert len(again) == 20 + 12
    assert [r for r in again if r["sampler"] == "ddim"] == first
    said = capsys.readouterr().err
    assert "training" not in said
    assert "dpmsolver" in said

    # another number of images is rows beside the first, and tables are of the grid at hand
    assert main([*command, "--images", "20", "--calibrated", "[false]", "--spacings", "[trailing]"]) == 0
    assert {r["images"] for r in json.loads((out / "table.json").read_text())} == {20}
    assert "20 images a score" in (out / "summary.md").read_text()
    assert Counter(r["images"] for r in json.loads((out / "results.json").read_text())) == {16: 32, 20: 6}
    assert main(command) == 0
    assert json.loads((out / "table.json").read_text()) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "ep"}, "did you mean 'eps'"),
        ({"methods": {"a/b": "eps"}}, "directory"),
        ({"methods": {"a": {"steps": 3}}}, "parameterization"),
        ({"train": {"step": 3}}, "did you mean 'steps'"),
        ({"choose_seeds": [1]}, "other samples"),
        ({"choose_seeds": []}, "choose_seeds"),
        ({"steps": []}, "names none"),
        ({"calibration": {"iteration": 3}}, "iterations"),
        ({"calibration": {"iterations": "many"}}, "iterations of a calibration is a whole number"),
        ({"calibration": {"iterations": 0}}, "iterations is 1 or more"),
        ({"steps": [5, 2000]}, "from 1 to 1000"),
        ({"train": {"schedule": "linear:steps=8"}, "steps": [10]}, "from 1 to 8"),
        ({"methods": {"a": {"parameterization": "dual", "routes": "x0"}}}, "routes of the method a is a list"),
        ({"methods": {"a": {"parameterization": "eps", "routes": ["x0"]}}}, "one route"),
        ({"samplers": ["dim"]}, "did you mean 'ddim'"),
        ({"images": 1}, "images"),
    ],
)
def test_a_grid_is_looked_at_before_anything_is_trained(change, message):
    with pytest.raises(InputError, match=message):
        Grid(**change)


def test_further_parts_of_a_grid_are_added_and_what_they_repeat_is_not():
    grid = Grid(spacings=["trailing"], steps=[5, 10], also=[{"steps": [5], "calibrated": [True, False]}])
    settings = [(s.spec, c) for part in grid.parts() for s, c in part.settings(Linear(), clip=True)]
    assert len(settings) == 8
    assert len(set(settings)) == 6
    assert ("ddim:steps=5", True) in settings
    assert ("ddim:steps=10", True) not in settings


@pytest.mark.parametrize(
    ("part", "told"), [({"step": [5]}, "did you mean 'steps'"), ({"steps": 5}, "a list"), ({"samplers": ["no"]}, "no")]
)
def test_a_further_part_that_cannot_be_used_is_told(part, told):
    with pytest.raises(InputError, match=told):
        Grid(also=[part])


GRIDS = sorted((Path(__file__).parents[2] / "recipes" / "compare").glob("*.yaml"))


@pytest.mark.parametrize("recipe", GRIDS, ids=lambda r: r.stem)
def test_compare_takes_every_recipe(recipe):
    written, read = yaml.safe_load(recipe.read_text()), parse(Options, "compare", ["--config", str(recipe)])
    assert all(getattr(read, key) == value for key, value in written.items())
    assert len(read.models()) == len(written["methods"]) * len(written["training_seeds"])


def test_a_device_that_is_not_here_is_refused_before_anything_is_written(tmp_path, capsys):
    from dualout.cli.main import main

    assert main(["compare", "--device", "cuda:77", "--out", str(tmp_path / "out")]) == 2
    assert "--device 'cuda:77' cannot be used here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"backend": "openvin"}, "unknown backend 'openvin'; did you mean 'openvino'"),
        ({"backend": "onnx", "precision": "bf16"}, "--backend onnx computes in fp32, not in bf16"),
        ({"precision": "fp61"}, "unknown precision 'fp61'"),
    ],
)
def test_a_backend_or_precision_that_cannot_be_used_is_told(option, told):
    with pytest.raises(InputError, match=told):
        Grid(device="cpu", **option)


def test_a_calibration_of_another_precision_or_an_earlier_way_is_fitted_again(grid_file, tmp_path):
    asked = ["--config", str(grid_file), "--spacings", "[trailing]", "--steps", "[2]", "--calibrated", "[true]"]
    asked += ["--methods", "{eps: eps}", "--choose_seeds", "[]", "--out", str(tmp_path / "out")]
    for precision in ("fp32", "bf16"):
        assert main(["compare", *asked, "--precision", precision]) == 0
        (fitted,) = (tmp_path / "out").glob("models/*/calibration/*.json")
        protocol = json.loads(fitted.read_text())["protocol"]
        assert protocol["precision"] == precision
        # as dualout calibrate writes it
        data = protocol["data"]
        assert (data["name"], data["split"], data["images"], len(data["fingerprint"])) == ("digits", "train", 1501, 32)
    content = json.loads(fitted.read_text())
    for kept in (True, False):
        if not kept:
            content["protocol"]["way"] -= 1
        fitted.write_text(json.dumps(content))
        assert main(["compare", *asked, "--precision", "bf16"]) == 0
        # written anew, it is indented
        assert (fitted.read_text() == json.dumps(content)) is kept


def test_images_are_made_as_the_grid_says(grid_file, tmp_path):
    asked = ["--config", str(grid_file), "--out", str(tmp_path / "out"), "--precision", "bf16", "--backend", "auto"]
    assert main(["compare", *asked, "--calibrated", "[false]", "--spacings", "[trailing]"]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(r["protocol"]["precision"], r["protocol"]["backend"]) for r in rows} == {("bf16", "auto")}


@pytest.mark.parametrize(
    ("train", "says"),
    [({"data": [None]}, "data is a name"), ({"steps": "x"}, "steps is a whole number"), ({"lr": []}, "lr is")],
)
def test_a_training_option_of_another_type_is_told(train, says):
    with pytest.raises(InputError, match=f"the training option {says}"):
        Grid(train=train)


@pytest.mark.parametrize(
    ("holdout", "features", "says"), [(0.0, "pixels", "there is no test split"), (0.5, "digits", "8×8")]
)
def test_images_to_compare_with_are_looked_at_before_any_training(grid_file, tmp_path, capsys, holdout, features, says):
    np.save(tmp_path / "images.npy", np.zeros((80, 16, 16), np.uint8))
    grid = yaml.safe_load(grid_file.read_text())
    grid["train"]["data"] = f"arrays:{tmp_path / 'images.npy'}:holdout={holdout}"
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid | {"features": [features]}))
    assert main(["compare", "--config", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_and_writes_nothing(grid_file, tmp_path, capsys):
    assert main(["compare", "--config", str(grid_file), "--out", str(tmp_path / "out"), "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "# models     2, of which 0 are trained" in told
    # 2 spacings × 2 sets of samples × (eps, eps calibrated, dual, dual's x0, dual calibrated)
    assert "# scores     20 sets of 16 images" in told
    assert "# fits       4 calibrations" in told
    assert not (tmp_path / "out").exists()


def test_a_model_keeps_its_name_when_options_are_new(tmp_path):
    """What is at its default is not part of the name, so that an option of a later version leaves it as it was."""

    def name(**train):
        return Grid(methods={"m": "eps"}, train={"data": "digits", **train}).models()[0].directory(tmp_path).name

    assert name() == name(lr=1e-3, ema_warmup=True) == "m-845d11ad-seed0"
    assert len({name(), name(lr=2e-3), name(ema_warmup=False), name(network="tiny")}) == 4
