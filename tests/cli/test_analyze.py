import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import dualout
from dualout.cli import _study, analyze
from dualout.cli.main import main
from dualout.networks.build import build


def saved(path, parameterization, classes=None, trained_on=None):
    parameterization = dualout.Parameterization.parse(parameterization)
    network = build("tiny:width=8", 1, 8, parameterization.channels(1), classes=classes)
    denoiser = dualout.Denoiser(network, parameterization, dualout.schedules.Linear())
    extra = {} if trained_on is None else {"data": {"name": trained_on}}
    denoiser.save_pretrained(path, image={"channels": 1, "size": [8, 8]}, **extra)
    return path


FEW = ["--images", "24", "--points", "4", "--steps", "3", "--samples", "6", "--film", "2"]
CPU = ["--device", "cpu"]
"""Where the same again is the same bits."""


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory):
    """A dual run with its analysis."""
    run = saved(tmp_path_factory.mktemp("analyzed") / "run", "dual")
    assert main(["analyze", str(run), "--data", "digits", *FEW, *CPU]) == 0
    return run


def test_a_place_that_cannot_be_written_in_is_told_before_the_work(analyzed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyze, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert main(["analyze", str(analyzed), "--data", "digits", "--out", str(tmp_path / "link")]) == 2
    assert "link is a link to nowhere" in capsys.readouterr().err


def test_dual_output_gives_every_table_and_figure(analyzed):
    out = analyzed / "analysis"
    document = json.loads((out / "analysis.json").read_text())
    assert document["protocol"]["data"].startswith("digits")
    assert document["protocol"]["split"] == "test"
    assert document["protocol"]["images"] == 24
    with (out / "routes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["t"]) for r in rows] == [r["t"] for r in document["routes"]]
    assert float(rows[2]["slope"]) == document["routes"][2]["slope"]
    assert len(document["trajectory"]) == 3
    figures = {p.stem for p in (out / "figures").iterdir()}
    inside = {"ratio", "routes", "excess", "slope", "reliability", "maps", "film"}
    assert figures == inside | {"errors", "spread", "clipped", "drift"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (out / "figures").iterdir())
    study = _study.read(out)
    assert study is not None
    assert [f.t for f in study.frames] == dualout.samplers.DDIM(3).timesteps(dualout.schedules.Linear())
    assert study.frames[0].ratio.shape == (2, 1, 8, 8)


def test_it_is_the_same_again_and_says_where_it_is(analyzed, tmp_path, capsys):
    assert main(["analyze", str(analyzed), "--data", "digits", *FEW, *CPU, "--out", str(tmp_path / "other")]) == 0
    for name in ("routes.csv", "trajectory.csv", "reliability.csv", "arrays.npz", "figures/ratio.png"):
        assert (analyzed / "analysis" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    printed = capsys.readouterr().out
    assert str(tmp_path / "other") in printed
    assert "r is" in printed
    # an analysis may take the place of an earlier one, also of one that was interrupted
    (tmp_path / "other" / "analysis.json").unlink()
    assert main(["analyze", str(analyzed), "--data", "digits", *FEW, "--out", str(tmp_path / "other")]) == 0


def test_single_outputs_and_stochastic_samplers(tmp_path):
    run = saved(tmp_path / "run", "velocity", trained_on="digits")
    assert main(["analyze", str(run), *FEW, "--sampler", "ddpm:variance=small", "--spacing", "linspace"]) == 0
    study = _study.read(run / "analysis")
    assert study is not None
    assert not study.dual
    assert "ratio_mean" not in study.routes[0]
    assert study.frames[0].ratio is None
    assert not (run / "analysis" / "reliability.csv").exists()
    assert not (run / "analysis" / "figures" / "ratio.png").exists()
    assert (run / "analysis" / "figures" / "film.png").exists()


def test_a_folder_too_large_for_memory_is_kept_and_its_own_split_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dualout.data.cache.IN_MEMORY", 100)
    (tmp_path / "pictures").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    run = saved(tmp_path / "run", "velocity")
    assert main(["analyze", str(run), "--data", f"folder:{tmp_path / 'pictures'}:split=all", *FEW]) == 0
    assert json.loads((run / "analysis" / "protocol.json").read_text())["split"] == "all"
    assert list((tmp_path / "cache" / "data").glob("*.u8"))


def test_models_of_classes_are_told_them(tmp_path):
    run = saved(tmp_path / "run", "dual", classes=10)
    assert main(["analyze", str(run), "--data", "digits", *FEW]) == 0
    assert _study.read(run / "analysis").dual


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits", "--images", "0"], "--images is 1 or more"),
        (["--data", "digits", "--steps", "2000"], "from 1 to 1000"),
        (["--data", "digits", "--split", "nonsense"], "unknown split"),
        (["--data", "digitz"], "digits"),
        ([], "does not say what it was trained on"),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path, capsys, arguments, message):
    run = saved(tmp_path / "run", "dual")
    assert main(["analyze", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "analysis").exists()


def test_nothing_else_is_overwritten(tmp_path, capsys):
    run = saved(tmp_path / "run", "dual")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert main(["analyze", str(run), "--data", "digits", "--out", str(tmp_path / "mine")]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_damaged_analysis_is_told(analyzed, tmp_path):
    shutil.copytree(analyzed / "analysis", tmp_path / "analysis")
    (tmp_path / "analysis" / "arrays.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(dualout.InputError, match="damaged"):
        _study.read(tmp_path / "analysis")


def test_images_that_are_neither_grey_nor_colour(tmp_path):
    channels = 2
    network = build("tiny:width=8", channels, 8, 2 * channels + 1)
    dualout.Denoiser(network, dualout.Dual(), dualout.schedules.Linear()).save_pretrained(
        tmp_path / "run", image={"channels": channels, "size": [8, 8]}
    )
    images = np.random.default_rng(0).integers(0, 256, (24, channels, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    data = f"arrays:{tmp_path / 'images.npy'}:layout=nchw:split=all"
    assert main(["analyze", str(tmp_path / "run"), "--data", data, *FEW]) == 0
    assert _study.read(tmp_path / "run" / "analysis").frames[0].x0.shape[1] == channels


def test_any_whole_number_is_a_seed(analyzed, tmp_path):
    command = ["analyze", str(analyzed), "--data", "digits", *FEW, "--out", str(tmp_path / "out")]
    assert main([*command, "--seed", str(10**30)]) == 0


def test_fewer_images_are_made_than_filmed(tmp_path):
    run = saved(tmp_path / "run", "eps", classes=10)
    assert main(["analyze", str(run), "--data", "digits", *FEW, "--samples", "2", "--film", "4"]) == 0
    assert len(_study.read(run / "analysis").frames[0].x0) == 2
