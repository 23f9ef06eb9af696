"""Files that are written whole, what a killed process leaves, and places that cannot be written in."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dualout import files
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.files import (
    ASIDE,
    alone,
    atomically,
    cache_directory,
    explained,
    read_json,
    sweep,
    text_path,
    writable,
    write_json,
    write_text,
)  # fmt: skip
from dualout.networks import build
from dualout.parameterizations import Epsilon
from dualout.schedules import Linear
from dualout.training.checkpoint import RunDirectory

WRITING = """
import sys, time
from pathlib import Path
from dualout.files import atomically
with atomically(Path(sys.argv[1])) as aside:
    print(aside, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_was_writing_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    place = tmp_path / "deeper"
    place.mkdir()
    command = [sys.executable, "-c", WRITING, str(place / "a.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        aside = Path(other.stdout.readline().strip())
        sweep(tmp_path)
        assert aside.exists()
        other.kill()
    assert aside.exists()
    (tmp_path / f"{ASIDE}abc").mkdir()
    (tmp_path / f"{ASIDE}abc" / "weights").write_text("half")
    for name in (".mine", ".mine.tmp", "mine.abcdefgh.tmp"):
        (tmp_path / name).write_text("whole")
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p != place) == [".mine", ".mine.tmp", "mine.abcdefgh.tmp"]


def test_a_file_takes_its_place_also_where_another_was_swept(tmp_path: Path) -> None:
    with atomically(tmp_path / "a.txt") as aside:
        aside.write_text("whole")
        # a library that writes aside itself, and renames
        (tmp_path / "again").write_text("whole, again")
        (tmp_path / "again").replace(aside)
    assert (tmp_path / "a.txt").read_text() == "whole, again"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EDQUOT, errno.EIO, errno.ENOSPC])
def test_what_the_system_refuses_is_told_also_where_safetensors_wraps_it(tmp_path: Path, number: int) -> None:
    says = "the disk is full" if number in (errno.EDQUOT, errno.ENOSPC) else os.strerror(number)
    with pytest.raises(InputError, match=says), explained(tmp_path / "model.safetensors"):
        raise RuntimeError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    with pytest.raises(ZeroDivisionError), explained(tmp_path):
        raise ZeroDivisionError("a fault of ours")


def test_places_that_cannot_be_written_in_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writable(tmp_path / "new" / "deeper")
    assert os.listdir(tmp_path) == []
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"link is a link to nowhere, .*nowhere"):
        writable(tmp_path / "link" / "deeper")
    # not by its mode, which does not keep a superuser out
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path or not mode & os.W_OK)
    with pytest.raises(InputError, match=f"cannot write in {tmp_path}: it is read-only"):
        writable(tmp_path / "new")


def test_a_path_that_is_no_utf8_is_written_down_and_holds_no_weights(tmp_path: Path) -> None:
    name = os.fsdecode(b"lat\xe9in")
    write_json(tmp_path / "x.json", {"data": f"folder:{name} ☂"})
    assert read_json(tmp_path / "x.json") == {"data": f"folder:{name} ☂"}
    write_text(tmp_path / "page.html", name)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "lat\\udce9in"
    text_path(tmp_path / "é")
    with pytest.raises(InputError, match=r"cannot write weights in .*: the path is no UTF-8"):
        text_path(tmp_path / name)
    network = build("tiny:width=8", image_channels=1, size=8, out_channels=1)
    for write in (RunDirectory, Denoiser(network, Epsilon(), Linear()).save_pretrained):
        with pytest.raises(InputError, match="cannot write weights"):
            write(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["page.html", "x.json"]


def test_one_process_is_alone_in_a_directory(tmp_path: Path) -> None:
    with alone(tmp_path, "counting"):
        with (
            pytest.raises(InputError, match=f"another process is counting in --out {tmp_path}"),
            alone(tmp_path, "counting"),
        ):
            pass
        # what lies there may be removed meanwhile
        shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with alone(tmp_path, "counting"):
        pass


def test_a_file_system_that_knows_no_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", unknown)
    with alone(tmp_path, "counting"):
        write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_files_are_read_by_whom_others_are(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "whole")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_what_is_no_json_of_a_size_is_told_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    for text, says in (("{", "cannot be read"), ("[" * 100_000, "cannot be read"), ("[]", "holds no JSON object")):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"a\.json .*{says}.*; remove it"):
            read_json(path, then="; remove it")
    monkeypatch.setattr(files, "_LARGEST", 2**20)
    path.write_text(" " * (3 * 2**20))
    with pytest.raises(InputError, match="has 3 MiB, more than the 1 that are read"):
        read_json(path)


def test_what_is_computed_is_kept_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for own, systems, place in (
        ("~/mine", "/ours", tmp_path / "mine"),
        ("", "/ours", Path("/ours/dualout")),
        ("", "", tmp_path / ".cache" / "dualout"),
    ):
        # empty is as if it were not said
        monkeypatch.setenv("DUALOUT_CACHE", own)
        monkeypatch.setenv("XDG_CACHE_HOME", systems)
        assert cache_directory() == place
