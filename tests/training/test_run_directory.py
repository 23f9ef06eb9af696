"""The directory of a run: whole whatever happens, of one process at a time, and damage in it is named."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

from dualout.checkpoint import read_tensors
from dualout.errors import InputError
from dualout.training import Run, TrainConfig
from dualout.training import checkpoint as files
from dualout.training.changes import refuse_changes
from runs import config, metrics, same, trained


@pytest.mark.parametrize("holds", ["notes.txt", "config.json", "state/photo.png"])
def test_directory_of_something_else_is_refused(tmp_path, holds):
    (tmp_path / holds).parent.mkdir(exist_ok=True)
    (tmp_path / holds).write_text("mine")
    with pytest.raises(InputError, match="holds something else"), Run(config(tmp_path)):
        pass
    assert (tmp_path / holds).read_text() == "mine"


def test_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="is a file"), Run(config(tmp_path / "run")):
        pass


def test_second_run_in_a_directory_is_refused(tmp_path):
    with (
        Run(config(tmp_path / "run")),
        pytest.raises(InputError, match="another process"),
        Run(config(tmp_path / "run")),
    ):
        pass
    # and the directory is free again
    trained(tmp_path / "run", steps=1)


def test_what_a_crash_tore_is_made_again(whole, tmp_path):
    trained(tmp_path / "run", until=7)
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 8, "lo')
    aside = tmp_path / "run" / "state" / ".step-00000008"
    aside.mkdir()
    (aside / "weights.safetensors").write_bytes(b"half")
    # a crash between the state and the averaged weights
    shutil.copy(whole / "model.safetensors", tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "config.json").unlink()
    trained(tmp_path / "run")
    assert same(whole, tmp_path / "run")
    assert metrics(whole) == metrics(tmp_path / "run")
    assert not aside.exists()


def test_weights_behind_their_state_are_caught_up(tmp_path):
    trained(tmp_path / "run", until=5)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    written["training"]["step"] = 0
    (tmp_path / "run" / "config.json").write_text(json.dumps(written))
    (tmp_path / "run" / "model.safetensors").write_bytes(b"old")
    with Run(config(tmp_path / "run")):
        pass
    average = read_tensors(tmp_path / "run" / "state" / "step-00000004" / "average.safetensors")
    model = read_tensors(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(v, model[k]) for k, v in average.items())


def damage_bytes(place):
    file = place / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def damage_json(place):
    (place / "state.json").write_text('{"step": 9')


def damage_number(place):
    file = place / "state.json"
    file.write_text(file.read_text().replace('"step": 9', '"step": "nine"'))


@pytest.mark.parametrize(
    "damage",
    [
        damage_bytes,
        damage_json,
        damage_number,
        lambda p: (p / "optimizer.safetensors").unlink(),
        lambda p: (p / "state.json").unlink(),
    ],
    ids=["flipped bit", "torn json", "no number", "missing file", "missing json"],
)
def test_damaged_state_is_named(whole, tmp_path, damage):
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / "state" / "step-00000009")
    with pytest.raises(InputError, match="step-00000009 is damaged"), Run(config(tmp_path / "run", steps=12)):
        pass


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": {"lr": "high"}, "precision": "fp32"}', None])
def test_damaged_description_is_named(whole, tmp_path, text):
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "state" / "run.json"
    if text is None:
        text = file.read_text().replace('"lr": 0.001', '"lr": "high"')
    file.write_text(text)
    with pytest.raises(InputError, match=r"run\.json|--lr"), Run(config(tmp_path / "run")):
        pass


def test_full_disk_leaves_the_checkpoint_before(whole, tmp_path, monkeypatch):
    real = files.write_tensors

    def full(path, tensors):
        if path.parent.name == ".step-00000008" and path.name.startswith("optimizer"):
            raise InputError("the disk is full: cannot write") from OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(InputError, match="disk is full"):
        trained(tmp_path / "run")
    assert [s for s, _ in files.states(tmp_path / "run")] == [4]
    assert not list((tmp_path / "run" / "state").glob(".step*"))
    monkeypatch.undo()
    trained(tmp_path / "run")
    assert same(whole, tmp_path / "run")


def _hold(out, ready, done):
    torch.set_num_threads(1)
    with Run(config(out)):
        ready.set()
        done.wait(60)


@pytest.mark.slow
def test_lock_is_between_processes_and_dies_with_them(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "run", ready, done))
    holder.start()
    assert ready.wait(120)
    with pytest.raises(InputError, match="another process"):
        trained(tmp_path / "run")
    holder.kill()
    holder.join()
    trained(tmp_path / "run", steps=1)


def failed(out, steps: int = 0) -> None:
    """Train a few steps, save where there are some, and fail."""
    with Run(config(out)) as run:
        for _ in zip(range(steps), run, strict=False):
            run.save()
        assert (out / "train.yaml").exists()
        raise MemoryError


def test_a_run_that_came_to_nothing_leaves_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    for name, steps in {"new/run": 0, "mine": 0, "begun": 1}.items():
        with pytest.raises(MemoryError):
            failed(tmp_path / name, steps)
    assert not (tmp_path / "new" / "run").exists()
    # a directory that was there stays, and so does a run that has something
    assert list((tmp_path / "mine").iterdir()) == []
    assert [step for step, _ in files.states(tmp_path / "begun")] == [1]


def test_a_directory_with_a_space_can_be_pasted_from_the_message():
    with pytest.raises(InputError, match="--init '/a run' starts another run from its weights"):
        refuse_changes(Path("/a run"), {"config": TrainConfig().asdict()}, TrainConfig(lr=0.1))
