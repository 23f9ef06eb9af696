"""Metrics sent elsewhere: off by default, and through accelerate where they are asked for."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import pytest

from dualout.cli.main import main
from dualout.errors import InputError
from dualout.training import tracking

TRAIN = [
    "train", "--data", "digits", "--network", "tiny:width=8", "--batch_size", "4", "--steps", "4", "--log_every", "2",
    "--sample_every", "0", "--precision", "fp32",
]  # fmt: skip


class Wandb(types.ModuleType):
    """What accelerate asks of wandb."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.begun: dict[str, Any] = {}
        self.config = self
        self.settings: dict[str, Any] = {}
        self.finished = False

    def init(self, **arguments: Any) -> Wandb:
        self.begun = arguments
        return self

    def update(self, values: dict[str, Any], **_: Any) -> None:
        self.settings |= values

    def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_what_is_logged_here_is_logged_there(wandb: Wandb, tmp_path, monkeypatch) -> None:
    # as in a fresh process, where nothing of accelerate has been used
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    assert main([*TRAIN, "--track", "wandb", "--out", str(tmp_path / "run")]) == 0
    assert wandb.begun["project"] == "dualout"
    assert wandb.begun["dir"].startswith(str(tmp_path / "run"))
    assert wandb.settings["batch_size"] == 4
    # as in a model card
    assert wandb.settings["out"] == "run"
    assert [step for _, step in wandb.logged] == [2, 4]
    assert {"loss", "loss/eps", "lr", "images_per_s"} <= wandb.logged[0][0].keys()
    assert wandb.finished


def test_a_tracker_that_does_not_start_is_told(wandb: Wandb, tmp_path, monkeypatch, capsys) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("api_key not configured\nsee the manual")

    monkeypatch.setattr(wandb, "init", refuse)
    assert main([*TRAIN, "--track", "wandb", "--out", str(tmp_path / "run")]) == 2
    assert "--track wandb did not start: api_key not configured\n" in capsys.readouterr().err
    # set up now, it is not in the way of itself
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    assert main([*TRAIN, "--track", "wandb", "--out", str(tmp_path / "run")]) == 0


def test_a_run_that_goes_on_is_one_run_there(wandb: Wandb, tmp_path) -> None:
    ids = []
    # the second goes on; the others are runs of their own, of whatever name
    for out, steps in (("a/run", 4), ("a/run", 6), ("b/run", 4)):
        assert main([*TRAIN, "--steps", str(steps), "--track", "wandb", "--out", str(tmp_path / out)]) == 0
        assert (wandb.begun["name"], wandb.begun["resume"]) == ("run", "allow")
        ids.append(wandb.begun["id"])
    assert ids[0] == ids[1] != ids[2]


def test_a_run_may_be_named_by_wandb_s_own_variable(wandb: Wandb, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert main([*TRAIN, "--track", "wandb", "--out", str(tmp_path / "run")]) == 0
    assert wandb.begun["id"] == "mine"


def test_a_tracker_that_is_not_installed_is_told(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--track trackio needs the package trackio: pip install 'dualout\[track\]'"):
        tracking.check("trackio")


def test_off_by_default(wandb: Wandb, tmp_path) -> None:
    assert main([*TRAIN, "--out", str(tmp_path / "run")]) == 0
    assert not wandb.begun
    assert not (tmp_path / "run" / "tracking").exists()
