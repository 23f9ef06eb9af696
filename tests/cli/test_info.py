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
