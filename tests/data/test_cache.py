import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from dualout import InputError
from dualout.data import cache as caching
from dualout.data import load
from dualout.data.cache import Job, materialize
from dualout.data.decode import Unreadable

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, 3, 4, 4), dtype=np.uint8)


def job(image=IMAGES.__getitem__, identity="test", strict=0.0, progress=None, n=50):
    return Job([f"{i}.png" for i in range(n)], (3, 4, 4), image, identity, "the images", strict, progress)


def never(i):
    raise AssertionError("decoded again")


def test_kept_and_mapped(tmp_path):
    first, bad = materialize(job(), tmp_path / "new" / "cache")
    assert isinstance(first, np.memmap)
    assert np.array_equal(first, IMAGES)
    assert bad == []
    again, _ = materialize(job(never), tmp_path / "new" / "cache")
    assert np.array_equal(again, IMAGES)
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("*.progress.json"))
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0


def test_others_are_kept_apart(tmp_path):
    materialize(job(), tmp_path)
    other, _ = materialize(job(lambda i: IMAGES[i] ^ 1, "other"), tmp_path)
    assert np.array_equal(other, IMAGES ^ 1)
    assert np.array_equal(materialize(job(never), tmp_path)[0], IMAGES)


def test_the_unreadable_are_remembered(tmp_path):
    def image(i):
        if i in (3, 40):
            raise Unreadable(f"spoilt {i}")
        return IMAGES[i]

    for cache in (None, tmp_path, tmp_path):
        pixels, bad = materialize(
            job(image if cache is None or not list(tmp_path.iterdir()) else never, strict=0.05), cache
        )
        assert bad == [(3, "spoilt 3"), (40, "spoilt 40")]
        assert np.array_equal(pixels, np.delete(IMAGES, [3, 40], 0))
    with pytest.raises(InputError, match=r"2 of 50 images cannot be read \(3.png: spoilt 3; 40.png: spoilt 40\)"):
        materialize(job(never, strict=0.03), tmp_path)


def test_what_could_not_be_read_for_now_is_read_when_it_can(tmp_path):
    closed = {3}

    def image(i):
        if i in closed:
            raise Unreadable("Permission denied", passing=True)
        if i == 40:
            raise Unreadable("spoilt")
        return IMAGES[i]

    seen = []
    for _ in range(2):
        materialize(job(image, strict=0.05, progress=lambda *_: seen.append(1)), tmp_path)
    assert len(seen) == 1  # the second time it is only looked at
    closed.clear()
    pixels, bad = materialize(job(image, strict=0.05), tmp_path)
    assert bad == [(40, "spoilt")]
    assert np.array_equal(pixels, np.delete(IMAGES, 40, 0))
    materialize(job(never, strict=0.05), tmp_path)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "_SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(caching, "_IMAGES_AT_ONCE", 8)
    seen = []

    def until(last):
        def image(i):
            seen.append(i)
            if i == last:
                raise KeyboardInterrupt
            if i == 5:
                raise Unreadable("spoilt")
            return IMAGES[i]

        return image

    for last in (20, 43):
        with pytest.raises(KeyboardInterrupt):
            materialize(job(until(last), strict=0.1), tmp_path)
    # what was written after the last save is dropped, and what a killed process left is removed
    (tmp_path / f".{job().key}.progress.json.abc.tmp").touch()
    part = next(tmp_path.glob("*.part"))
    with part.open("ab") as file:
        file.write(b"half an image")
    pixels, bad = materialize(job(until(None), strict=0.1), tmp_path)
    assert np.array_equal(pixels, np.delete(IMAGES, 5, 0))
    assert bad == [(5, "spoilt")]
    assert seen.count(0) == seen.count(5) == 1
    assert seen.count(49) == 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["pixels", "notes", "text", "longer"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    materialize(job(), tmp_path)
    pixels, notes = next(tmp_path.glob("*.u8")), next(tmp_path.glob("*.json"))
    match damage:
        case "pixels":
            pixels.write_bytes(pixels.read_bytes()[:-1])
        case "longer":
            pixels.write_bytes(pixels.read_bytes() + b"x")
        case "notes":
            notes.unlink()
        case "text":
            notes.write_text(json.dumps({"files": 50, "rows": "many", "bad": []}))
    assert np.array_equal(materialize(job(), tmp_path)[0], IMAGES)


def test_one_makes_it_while_others_wait(tmp_path):
    counted, found = [], []

    def image(i):
        counted.append(i)
        time.sleep(0.002)
        return IMAGES[i]

    threads = [threading.Thread(target=lambda: found.append(materialize(job(image), tmp_path)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(pixels, IMAGES) for pixels in found)
    assert sorted(counted) == list(range(50))


def test_progress_is_told(tmp_path):
    told = []
    materialize(job(progress=lambda *a: told.append(a)), tmp_path)
    assert told[-1] == ("reading images", 50, 50)


def test_too_much_for_memory_asks_for_a_directory(monkeypatch, tmp_path):
    monkeypatch.setattr(caching, "IN_MEMORY", 50 * 48 - 1)
    with pytest.raises(InputError, match="cache=DIRECTORY"):
        materialize(job(never), None)
    assert len(materialize(job(), tmp_path)[0]) == 50


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        materialize(job(), tmp_path / "file" / "cache")


def test_a_full_disk_is_told_and_nothing_is_taken_for_whole(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full"):
        materialize(job(), tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.u8"))
    assert np.array_equal(materialize(job(), tmp_path)[0], IMAGES)


def test_a_real_full_disk_gives_an_error_and_no_signal(tmp_path):
    # a process may not write files larger than this: write() fails, where touching a mapped page would kill
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from dualout import InputError\n"
        "from dualout.data.cache import Job, materialize\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "image = np.zeros((3, 64, 64), np.uint8)\n"
        "job = Job([str(i) for i in range(9)], image.shape, lambda i: image, 'x', 'x', 0.0)\n"
        "try:\n"
        "    materialize(job, Path(sys.argv[1]))\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout


def test_folders_whose_files_look_alike_are_kept_apart(tmp_path):
    # of one size and time, as an archive may leave them
    for name, grey in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (4, 4), grey).save(tmp_path / name / f"{i}.bmp")
            os.utime(tmp_path / name / f"{i}.bmp", (0, 0))
    found = [load(f"folder:{tmp_path / name}", cache=tmp_path / "cache")[0] for name in ("a", "b")]
    assert [int(v.unique()) for v in found] == [10, 200]


def test_arrays_that_change_where_a_fingerprint_does_not_look_are_fitted_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("dualout.data.dataset._HASHED_BYTES", 1)
    file = tmp_path / "many.npy"
    images = RNG.integers(0, 256, (200, 4, 4), dtype=np.uint8)
    for save, ending in ((np.save, "npy"), (np.savez_compressed, "npz")):
        file = tmp_path / f"many.{ending}"
        for images[1] in (0, 255):
            save(file, **{"images" if ending == "npz" else "arr": images})
            found = load(f"arrays:{file}:size=2", cache=tmp_path / "cache")
            assert int(found[1].unique()) == images[1, 0, 0]


def test_folders_are_decoded_once(tmp_path):
    folder, cache = tmp_path / "images", tmp_path / "cache"
    folder.mkdir()
    for i in range(20):
        Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    first = load(f"folder:{folder}:size=6", cache=cache)
    written = {p: p.stat().st_mtime_ns for p in cache.glob("*.u8")}
    again = load(f"folder:{folder}:size=6", cache=str(cache))
    assert {p: p.stat().st_mtime_ns for p in cache.glob("*.u8")} == written
    assert again.fingerprint == first.fingerprint == load(f"folder:{folder}:size=6").fingerprint
    grey = load(f"folder:{folder}:size=6:grey=true", cache=cache)
    assert grey.channels == 1
    os.utime(folder / "3.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "3.png")
    changed = load(f"folder:{folder}:size=6", cache=cache)
    assert changed.fingerprint != first.fingerprint
