"""dualout info, as a user runs it."""

from __future__ import annotations

import json

import pytest
import torch

from dualout.cli.main import main
from dualout.version import __version__


def test_tells_what_is_installed_and_what_is_fast(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert __version__ in said
    assert torch.__version__ in said
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert found["recommended"]["precision"].split(":")[0] in ("fp32", "bf16", "fp16")
    assert found["threads"]["torch"] == torch.get_num_threads()


def test_tells_what_a_run_is(tmp_path, capsys):
    out = tmp_path / "run"
    small = ["--network", "tiny:width=8", "--batch_size", "4", "--log_every", "1", "--sample_every", "0"]
    assert main(["train", *small, "--steps", "3", "--lr", "0.002", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["info", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["parameterization"] == "dual"
    assert found["model"]["images"] == "1×8×8"
    assert found["model"]["parameters"] == "45,115"
    assert found["run"]["state"] == "step 3 of 3, finished"
    assert found["configuration"]["lr"] == 0.002
    assert [row["step"] for row in found["metrics"]] == [1, 2, 3]
    assert main(["info", str(out)]) == 0
    said = capsys.readouterr().out
    assert "step 3 of 3, finished" in said
    lines = said.splitlines()
    files = lines[lines.index("files") + 1 :]
    assert len({line.index(found["files"][line.split()[0]], 12) for line in files}) == 1  # a column
    assert all(lines[lines.index(title) - 1] == "" for title in ("training", "metrics", "files"))
    # a checkpoint without the run's state is a checkpoint
    for file in sorted((out / "state").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    assert main(["info", str(out), "--json"]) == 0
    assert "run" not in json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("info") / "run"
    small = ["--network", "tiny:width=8", "--batch_size", "4", "--sample_every", "0"]
    assert main(["train", *small, "--steps", "1", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("config.json", {"image": "x"}, ""),
        ("config.json", {"training": [1]}, ""),
        ("config.json", {"card": {"training": "x", "metrics": [1]}}, ""),
        ("config.json", {"training": {"step": None}}, "config.json is damaged: its weights are of step None"),
        ("state/run.json", {"config": {}}, "run.json is damaged: it does not say its steps"),
    ],
)
def test_entries_of_another_form_are_left_out_or_told(run, capsys, file, damage, says):
    before = (run / file).read_text()
    (run / file).write_text(json.dumps(json.loads(before) | damage))
    code = main(["info", str(run)])
    (run / file).write_text(before)
    assert code == (2 if says else 0)
    assert says in capsys.readouterr().err


def test_what_is_no_run_is_told(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert main(["info", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def told(capsys, directory):
    capsys.readouterr()
    assert main(["info", str(directory), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["info", str(directory)]) == 0
    assert capsys.readouterr().out
    return found


def row(**more):
    protocol = {"reference": {"data": "digits", "split": "test"}}
    known = {"parameterization": "dual", "route": "mix", "sampler": "ddim", "features": "digits", "images": 60}
    return known | {"steps": 2, "fd": 3.0, "protocol": protocol} | more


def test_tells_what_scores_and_comparisons_are(tmp_path, capsys):
    rows = [row(), row(fd=2.0, steps=3), row(fd=None), row(fd=1.0, images=500, parameterization="eps")]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    found = told(capsys, tmp_path)
    assert found["scores"] | {"written": ""} == {
        "directory": str(tmp_path), "written": "", "rows": 4, "models": "dual, eps", "against": "digits (test)",
    }  # fmt: skip
    # of 60 images and of 500 they are not the same number
    assert [(best["images"], best["steps"], best["fd"]) for best in found["lowest fd"]] == [(60, 3, 2.0), (500, 2, 1.0)]
    (tmp_path / "results.json").write_text(json.dumps([row(run="a"), row(run="b", fd=2.5)]))
    assert told(capsys, tmp_path)["lowest fd"][0]["run"] == "b"
    (tmp_path / "results.json").write_text(json.dumps(rows))
    (tmp_path / "models").mkdir()
    assert "goes on with the same command" in told(capsys, tmp_path)["comparison"]["state"]
    (tmp_path / "table.json").write_text(json.dumps([{"method": "ours"} | one for one in rows]))
    found = told(capsys, tmp_path)
    assert "state" not in found["comparison"]
    assert found["comparison"]["models"] == "ours"
    assert found["lowest fd"][0]["method"] == "ours"
    (tmp_path / "table.json").write_text("[]")
    assert told(capsys, tmp_path)["comparison"]["rows"] == 0
    # nor is an export's record scores
    (tmp_path / "table.json").unlink()
    (tmp_path / "results.json").write_text('{"format": "onnx"}')
    assert main(["info", str(tmp_path)]) == 2


@pytest.mark.parametrize("store", ["png", "npz"])
def test_tells_what_images_are(run, tmp_path, capsys, store):
    out = tmp_path / "images"
    command = ["sample", str(run), "--steps", "2", "--format", store, "--out", str(out), "--device", "cpu"]
    assert main([*command, "--images", "3", "--seed", "-1"]) == 0
    images = told(capsys, out)["images"]
    assert images["state"] == f"3 images, {store}"
    assert images["model"] == "run (dual)"
    assert images["sampler"] == "ddim:steps=2"
    assert images["seeds"] == "-1 … 1"
    (out / ("000001.png" if store == "png" else "images.npz")).unlink()
    assert "not all there yet" in told(capsys, out)["images"]["state"]
    (out / "protocol.json").write_text(json.dumps({"format": store, "images": 3, "seed": 0, "sampler": [1]}))
    assert main(["info", str(out)]) == 2


def test_tells_what_an_analysis_and_calibrations_are(run, tmp_path, capsys):
    out = tmp_path / "analysis"
    small = ["--images", "20", "--samples", "4", "--points", "2", "--steps", "2", "--film", "1", "--device", "cpu"]
    assert main(["analyze", str(run), *small, "--out", str(out)]) == 0
    found = told(capsys, out)["analysis"]
    assert found["state"] == "finished, 3 tables"
    assert found["model"] == f"{run} (dual)"
    assert found["real images"].startswith("20 of digits")
    assert found["made images"] == "4 by ddim:steps=2, seeds 0 … 3"
    (out / "analysis.json").unlink()
    assert "not finished" in told(capsys, out)["analysis"]["state"]
    quick = ["--steps", "2", "--iterations", "1", "--batch_size", "64", "--images", "128", "--move_times", "0"]
    assert main(["calibrate", str(run), *quick, "--device", "cpu"]) == 0
    [found] = told(capsys, run / "calibration")["calibrations"]
    assert (found["file"], found["sampler"], found["data"]) == ("ddim-2-trailing.json", "ddim:steps=2", "digits")
    assert found["distance"] > 0
