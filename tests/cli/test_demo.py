import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dualout.cli import demo
from dualout.cli._workers import Worker, watch
from dualout.cli.main import main
from dualout.errors import InputError


class Here:
    """A worker that does its commands at once, in this process: what they do is what is tested, not how they run."""

    def __init__(self, name, commands, log, threads):
        self.name, self.commands, self.log, self.code, self.running = name, commands, log, None, False

    def start(self):
        self.code = next((code for command in self.commands if (code := main(command))), 0)

    def stop(self):
        pass

    def close(self):
        pass

    def last_words(self):
        return "last words"


@pytest.fixture
def small(monkeypatch):
    """The demo as it is, with less to do."""
    monkeypatch.setattr(demo, "Worker", Here)
    monkeypatch.setattr(demo, "STEPS", (2, 3))
    monkeypatch.setattr(demo, "_SHOWN", (("ddim", "trailing", 2), ("dpmsolver", "trailing", 2)))
    monkeypatch.setattr(demo, "LOOK", ("--images", "16", "--points", "3", "--steps", "2", "--samples", "6"))
    monkeypatch.setattr(demo, "NETWORK", "tiny:width=8")


FEW = ["--steps", "2", "--images", "24", "--seed", "3"]


def test_the_demo_trains_scores_looks_and_reports(small, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), *FEW]) == 0
    printed = capsys.readouterr().out
    assert "dual / eps" in printed
    assert str(out / "report.html") in printed
    rows = json.loads((out / "results.json").read_text())
    keys = {(r["parameterization"], r["sampler"], r["spacing"], r["steps"]) for r in rows}
    assert len(keys) == len(rows) == 2 * 2 * 2 * 2
    assert {r["images"] for r in rows} == {24}
    assert {r["protocol"]["reference"]["count"] for r in rows} == {1797}
    text = (out / "report.html").read_text()
    for heading in ("Scores", "Samples", "Inside dual", "From noise to image", "On the way", "Training", "Protocols"):
        assert f"<h2>{heading}</h2>" in text
    assert "real digits" in text
    assert "dualout train --data digits" in text
    assert "https://" not in text
    trained = [json.loads((out / name / "config.json").read_text())["training"] for name in ("dual", "eps")]
    differing = {k for k in trained[0] if trained[0][k] != trained[1][k]}
    assert differing == {"parameterization"}, "the same network, data order and budget"

    # again: nothing is trained or scored anew, the page is the same
    weights = (out / "dual" / "model.safetensors").stat().st_mtime_ns
    (out / "report.html").unlink()
    assert main(["demo", "--out", str(out), *FEW]) == 0
    assert (out / "dual" / "model.safetensors").stat().st_mtime_ns == weights
    assert json.loads((out / "results.json").read_text()) == rows
    assert (out / "report.html").read_text() == text

    # with other settings: refused
    assert main(["demo", "--out", str(out), "--steps", "5"]) == 2
    assert "--steps 2, now 5" in capsys.readouterr().err


def test_a_failing_model_is_told(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NETWORK", "nonsense")
    assert main(["demo", "--out", str(tmp_path / "demo"), *FEW]) == 2
    assert "dual failed:\nlast words" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--steps", "0"], "--steps is 1 or more"), (["--images", "2"], "--images is 4 or more")]
)
def test_mistakes(tmp_path, capsys, arguments, message):
    assert main(["demo", "--out", str(tmp_path / "demo"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_other_directories_are_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err


def test_one_that_is_stopped_tells_how_to_go_on_with_its_own_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_watch", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(["demo", "--out", str(tmp_path / "demo"), "--steps", "7"]) == 130
    # --out alone would be refused
    assert "stopped: the same command goes on from there" in capsys.readouterr().err


def wait_for(condition, seconds=900):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)


def test_workers_run_their_commands_in_turn(tmp_path):
    worker = Worker("w", [["--version"], ["--help"]], tmp_path / "log", 1)
    for _ in watch([worker], 1, lambda: False, every=0.05):
        pass
    assert worker.code == 0
    text = (tmp_path / "log").read_text()
    assert text.index("$ dualout --version") < text.index("$ dualout --help") < text.index("analyze")


def test_a_failure_ends_the_chain_and_is_told(tmp_path):
    worker = Worker("w", [["nonsense"], ["--version"]], tmp_path / "log", 1)
    with pytest.raises(InputError, match=r"(?s)w failed.*nonsense"):
        list(watch([worker], 1, lambda: False, every=0.05))
    assert worker.code == 2
    assert "--version" not in (tmp_path / "log").read_text()


TRAIN = "train --data digits --network tiny:width=8 --steps 100000 --batch_size 4 --sample_every 0 --log_every 1 --out"


def test_stopping_and_dying_leave_a_run_that_goes_on(tmp_path):
    """A worker that is asked to stop writes a checkpoint; so does one whose parent was killed."""
    orphan, stopped = tmp_path / "orphan", tmp_path / "stopped"
    code = (
        "import pathlib, sys, time; from dualout.cli._workers import Worker\n"
        "worker = Worker('w', [sys.argv[1].split()], pathlib.Path(sys.argv[2]), 1)\n"
        "worker.start(); print(worker._process.pid, flush=True); time.sleep(3600)"
    )
    command = [sys.executable, "-c", code, f"{TRAIN} {orphan}", str(tmp_path / "orphan.log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = Worker("w", [f"{TRAIN} {stopped}".split()], tmp_path / "log", 1)

    def both_have_begun():
        return min(demo._last_step(run / "metrics.jsonl") for run in (orphan, stopped)) > 2

    try:
        child = int(parent.stdout.readline())
        list(watch([worker], 1, both_have_begun, every=0.05))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert worker.code == 143
    wait_for(lambda: not _alive(child))
    for run in (orphan, stopped):
        assert json.loads((run / "config.json").read_text())["training"]["step"] > 2


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # one that nobody waited for is still listed
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
