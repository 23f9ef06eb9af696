"""Windows and macOS: their files, names and signals, as far as these can be had elsewhere."""

from __future__ import annotations

import ast
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest

from dualout import data, files, hub
from dualout.analysis.grid import Grid
from dualout.cli import _workers
from dualout.cli.main import main
from dualout.data.base import Source, open_source
from dualout.errors import InputError
from dualout.evaluation.features import Features
from dualout.parameterizations import Parameterization
from dualout.training.config import TrainConfig
from windows import Windows

SOURCES = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))
LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="open files are listed in /proc")
SMALL = ("--data", "digits", "--network", "tiny:width=4", "--batch_size", "8", "--device", "cpu", "--precision", "fp32")


@LINUX
def test_commands_write_what_windows_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(
        "methods: {'a:b*': eps, 'c?': 'dual:gate=balanced'}\n"
        "train: {data: digits, network: 'tiny:width=4', steps: 1, batch_size: 8}\n"
        "samplers: ['ddim:eta=0.5']\nspacings: [trailing]\nsteps: [2]\nimages: 8\nchoose_seeds: []\ndevice: cpu\n"
        "features: ['random:width=4']\n",
        encoding="utf-8",
    )
    run = "runs/digits-dual-gate=balanced"
    train = ("train", *SMALL, "--parameterization", "dual:gate=balanced", "--samples", "2")
    with Windows(tmp_path):
        for steps in ("2", "4"):  # the second goes on from the first, and removes its state
            assert main([*train, "--steps", steps, "--checkpoint_every", "2", "--sample_every", "2"]) == 0
        assert main(["train", *SMALL, "--init", "nowhere", "--out", "nothing"]) == 2
        for form in ("png", "npz", "npz"):
            assert main(["sample", run, "--images", "4", "--steps", "2", "--format", form, "--out", form]) == 0
        assert main(["evaluate", run, "--images", "8", "--steps", "2", "--features", "pixels", "--card"]) == 0
        assert main(["export", run, "--out", "pipeline"]) == 0
        assert main(["export", run, "--format", "dualout", "--out", "checkpoint"]) == 0
        for _ in range(2):
            assert main(["compare", "--config", "grid.yaml", "--out", "compared"]) == 0
    assert [p.name for p in Path(run, "state").glob("step-*")] == ["step-00000004"]
    assert not Path("nothing").exists()
    assert sorted(p.name.partition("-seed")[0][:-9] for p in Path("compared/models").iterdir()) == ["a-b-", "c-"]
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(files.ASIDE)]


@LINUX
def test_what_windows_refuses_is_noticed(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for path in (here, there):
        path.write_bytes(b"some bytes")
    with Windows(tmp_path):
        here.replace(there)
        there.rename(here)
        with here.open("rb"):
            for refused in (lambda: here.replace(there), here.unlink, lambda: os.open(tmp_path, os.O_RDONLY)):
                with pytest.raises(PermissionError):
                    refused()
        mapped = np.memmap(here, np.uint8, "r")
        there.write_bytes(b"others")
        with pytest.raises(PermissionError):
            there.replace(here)
        del mapped
        there.replace(here)
        for name in ("a:b", "a?", "a. "):
            with pytest.raises(OSError, match="forbidden"):
                (tmp_path / name).mkdir()
        handle = os.open(here, os.O_RDONLY)
        with pytest.raises(OSError, match="flushed"):
            os.fsync(handle)
        os.close(handle)


@LINUX
def test_a_file_that_is_read_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    file.write_text("[]", encoding="utf-8")
    begun = threading.Event()

    def read() -> None:
        with file.open("rb"):
            begun.set()
            time.sleep(0.1)

    reader = threading.Thread(target=read)
    with Windows(tmp_path):
        reader.start()
        begun.wait()
        files.write_text(file, "[1]\n")
        reader.join()
        monkeypatch.setattr(files, "_PAUSES", (0.01,))
        with file.open("rb"), pytest.raises(InputError, match=r"cannot write .*results\.json"):
            files.write_text(file, "[2]\n")
    assert file.read_bytes() == b"[1]\n"
    assert os.listdir(tmp_path) == ["results.json"]


def test_text_files_are_utf8_with_plain_line_ends_whatever_the_system_prefers() -> None:
    wanted = {"open": {"encoding"}, "read_text": {"encoding"}, "write_text": {"encoding", "newline"}}
    seen = set()
    for source in SOURCES:
        for call in (n for n in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)):
            # methods, and the built-in open; functions of these names are the package's own
            method = isinstance(call.func, ast.Attribute)
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            places = call.args[:1] if method else call.args[1:2]
            texts = [n.value for place in places for n in ast.walk(place) if isinstance(n, ast.Constant)]
            mode = [t for t in texts if isinstance(t, str) and re.fullmatch("[rwaxbt+]+", t)]
            binary = any("b" in t for t in mode) or (method and not mode)
            if name not in wanted or (binary if name == "open" else not method):
                continue
            seen.add(name)
            lacking = wanted[name] - {k.arg for k in call.keywords}
            assert not lacking, f"{source.name}:{call.lineno}: {name} without {lacking}"
    assert {"read_text", "write_text"} <= seen


def test_a_drive_letter_is_no_separator_in_a_spec() -> None:
    assert open_source(r"folder:C:\images").fields()["path"] == r"C:\images"
    arrays = open_source(r"arrays:C:\data\x.npz:holdout=0.2")
    assert (arrays.fields()["path"], arrays.fields()["holdout"]) == (r"C:\data\x.npz", 0.2)
    assert open_source(arrays.spec) == arrays
    features = Features.parse(r"classifier:path=C:\my\own.safetensors")
    assert features.fields() == {"path": r"C:\my\own.safetensors"}
    assert Features.parse(features.spec) == features
    assert Features.parse("inception:weights=d:/w.pth").fields() == {"weights": "d:/w.pth"}
    assert Parameterization.parse("learned:base=(dual:ratio=channel):weight=0.01").fields()["weight"] == 0.01
    assert hub.is_name("name/repository")
    assert not hub.is_name("C:/runs")
    assert not hub.is_name(r"runs\a/b")


@pytest.mark.parametrize(
    ("spec", "directory"),
    [
        ("digits", "runs/digits-dual"),
        ("folder:/my/images/", "runs/images-dual"),
        ("folder:pictures:holdout=0.2", "runs/folder-pictures-holdout=0.2-dual"),
        ("folder:C:\\my\\images\\", "runs/images-dual"),
    ],
)
def test_a_run_is_called_by_its_data_without_where_they_lie(spec: str, directory: str) -> None:
    assert TrainConfig(data=spec).default_out() == directory
    assert not set('<>:"|?*\\') & set(TrainConfig(data=spec).default_out())


def test_a_model_that_was_trained_under_its_methods_own_name_is_found(tmp_path: Path) -> None:
    (training,) = Grid(methods={"a: b": "eps"}, device="cpu").models()
    new = training.directory(tmp_path)
    assert new.name.startswith("a- b-")
    old = new.with_name(new.name.replace("a-", "a:", 1))
    old.mkdir(parents=True)
    assert training.directory(tmp_path) == old


def test_classes_of_photographs_are_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    here = data.load("photos", size=8)
    assert here.classes == ("china", "flower")
    import sklearn.datasets

    found = sklearn.datasets.load_sample_images()
    found.filenames = [str(PureWindowsPath(r"C:\Users\a.b\images", Path(name).name)) for name in found.filenames]
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: found)
    assert data.load("photos", size=8).fingerprint == here.fingerprint
    assert "photos" in Source.kinds()


def test_what_a_desktop_puts_into_a_directory_is_nothing_else(tmp_path: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).touch()
    assert files.held(tmp_path) == []
    (tmp_path / "mine").touch()
    assert files.held(tmp_path) == ["mine"]


@pytest.mark.parametrize("able", [True, False])
def test_a_mac_is_asked_to_write_what_its_drive_holds_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    done: list[str] = []

    def ask(handle: int, what: str) -> None:
        if not able:
            raise OSError("this drive cannot")
        done.append(what)

    mac = SimpleNamespace(F_FULLFSYNC="all of it", fcntl=ask, flock=lambda *_: None, LOCK_EX=2, LOCK_NB=4)
    monkeypatch.setattr(files, "fcntl", mac)
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("fsync"))
    files.write_text(tmp_path / "a.txt", "text")
    # the file, and the list of files
    assert done == ["all of it" if able else "fsync"] * 2


@pytest.mark.parametrize(("platform", "expected"), [("linux", "killed"), ("win32", "raised")])
def test_a_worker_whose_parent_ends_is_told_by_a_signal_that_it_can_handle(
    monkeypatch: pytest.MonkeyPatch, platform: str, expected: str
) -> None:
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(os, "read", lambda *_: b"")
    monkeypatch.setattr(os, "kill", lambda process, number: told.append(("killed", number)))
    monkeypatch.setattr(signal, "raise_signal", lambda number: told.append(("raised", number)))
    monkeypatch.setattr(sys, "platform", platform)
    _workers._end_with_parent()
    monkeypatch.undo()
    assert told == [(expected, signal.SIGTERM)]


def test_a_full_disk_is_told_also_by_the_number_that_windows_has_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    with pytest.raises(InputError, match="the disk is full"), files.explained(tmp_path / "model.safetensors"):
        raise RuntimeError("Error while serializing: I/O error: There is not enough space on the disk. (os error 112)")


def test_names_are_made_for_every_system() -> None:
    assert files.portable('lite0:resolution=96/a\\b*c?"<d>|') == "lite0-resolution=96-a-b-c-d-"
    assert not re.search(r'[<>:"/\\|?*]', files.portable("classifier:path=C:\\x/y.safetensors"))
