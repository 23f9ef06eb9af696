import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualout import InputError
from dualout.data import load
from dualout.data.index import indexed, scan

RNG = np.random.default_rng(0)


def picture(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8) if image is None else image
    Image.fromarray(image).save(path, **options)
    return image


def chw(image):
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def test_a_flat_folder(tmp_path):
    images = [picture(tmp_path / f"{i}.png") for i in range(12)]
    found = load(f"folder:{tmp_path}")
    assert found.shape == (3, 8, 8)
    assert found.labels is None
    assert found.classes == ()
    order = sorted(range(12), key=lambda i: f"{i}.png")
    assert np.array_equal(found.batch(range(12)), np.stack([chw(images[i]) for i in order]))


def test_sub_folders_are_classes(tmp_path):
    for name in ("b/x.png", "a/1/deep.png", "a/y.PNG", "ä c/z.png"):
        picture(tmp_path / name)
    picture(tmp_path / "a" / ".hidden.png")
    picture(tmp_path / ".hidden" / "x.png")
    found = load(f"folder:{tmp_path}")
    assert found.classes == ("a", "b", "ä c")
    assert found.labels.tolist() == [0, 0, 1, 2]
    picture(tmp_path / "loose.png")
    assert load(f"folder:{tmp_path}").labels is None


def test_train_and_test_are_splits(tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "test/dog/3.png", "test/emu/4.png"):
        picture(tmp_path / name)
    train, test, everything = (load(f"folder:{tmp_path}", split=s) for s in ("train", "test", "all"))
    assert train.classes == test.classes == everything.classes == ("cat", "dog", "emu")
    assert train.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [1, 2]
    assert sorted(everything.labels.tolist()) == [0, 1, 1, 2]
    with pytest.raises(InputError, match="leave holdout out"):
        load(f"folder:{tmp_path}:holdout=0.5")
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(InputError, match="but none in test"):
        load(f"folder:{tmp_path}:split=test")


def test_images_beside_the_splits_are_told_of(tmp_path):
    for name in ("car/0.png", "plane/0.png", "plane/1.png", "train/0.png"):
        picture(tmp_path / name)
    (note,) = load(f"folder:{tmp_path}").notes
    assert note.startswith("3 images lie outside train and test (car, plane) and are left out")


def test_what_is_left_out_of_a_folder_is_told(tmp_path):
    for name in ("cat/1.png", "dog/2.png"):
        picture(tmp_path / name)
    assert load(f"folder:{tmp_path}").notes == ()
    picture(tmp_path / "loose.png")
    for name in ("cat/3.heic", "cat/4.heic", "dog/5"):
        (tmp_path / name).write_text("x")
    others, loose = load(f"folder:{tmp_path}").notes
    assert "left out: 2 files with .heic, 1 files with no ending" in others
    assert "1 images lie in no sub-folder (loose.png), so there are no classes" in loose
    # a file beside many images is none that was meant to be one
    assert len(load(f"folder:{tmp_path}:strict=0.6").notes) == 1


@pytest.mark.parametrize("split", ["", "train/", "test/"])
def test_a_sub_folder_without_images_is_told_of(tmp_path, split):
    for name in ("cat/1.png", "dog/a/2.png"):
        picture(tmp_path / ("train/" if split else "") / name)
    (tmp_path / split / "emu" / "young").mkdir(parents=True)
    (note,) = load(f"folder:{tmp_path}").notes
    assert note == "1 of 3 sub-folders hold no images, and are no classes: emu"
    picture(tmp_path / split / "emu" / "young" / "3.png")
    assert load(f"folder:{tmp_path}").notes == ()
    # where there are no classes, nothing is missing
    (tmp_path / split / "fox").mkdir()
    picture(tmp_path / "train/0.png" if split else tmp_path / "0.png")
    assert not any("fox" in note for note in load(f"folder:{tmp_path}").notes)


@pytest.mark.parametrize(("most", "told"), [(4095, True), (65535, False)])
def test_images_that_fill_little_of_the_range_are_told_of(tmp_path, most, told):
    twelve_bits = np.linspace(0, most, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(twelve_bits).save(tmp_path / "a.png")
    notes = load(f"folder:{tmp_path}").notes
    assert len(notes) == told
    assert not told or "from 0 to 16, where 0 is black and 255 white" in notes[0]


def test_a_share_can_be_held_out_and_stays_out(tmp_path):
    for i in range(200):
        picture(tmp_path / f"{i}.png", np.full((2, 2), i, np.uint8))
    spec = f"folder:{tmp_path}:holdout=0.2"
    train, test = (
        set(load(spec, split=s).batch(range(len(load(spec, split=s))))[:, 0, 0, 0].tolist()) for s in ("train", "test")
    )
    assert train | test == set(range(200))
    assert not train & test
    assert 20 <= len(test) <= 60
    for i in range(200, 220):
        picture(tmp_path / f"{i}.png", np.full((2, 2), i, np.uint8))
    later = load(spec, split="test")
    assert test <= set(later.batch(range(len(later)))[:, 0, 0, 0].tolist())
    with pytest.raises(InputError, match="there is no test split"):
        load(f"folder:{tmp_path}:split=test")


def test_names_do_not_depend_on_where_the_folder_is(tmp_path):
    for i in range(20):
        picture(tmp_path / "here" / f"{i}.png")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    a, b = load(f"folder:{tmp_path}/here:holdout=0.3"), load(f"folder:{tmp_path}/there:holdout=0.3")
    assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "it is empty"),
        (["a.txt", "b.txt", "c.heic", "README"], "2 files with .txt, 1 files with .heic, 1 files with no ending"),
        (["x/y/.png"], "and so are its 2 sub-folders"),
    ],
)
def test_a_folder_without_images_says_what_it_holds(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=message) as error:
        load(f"folder:{tmp_path}")
    assert ".png" in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load(f"folder:{tmp_path}/none")
    for spec in ("folder:none", "arrays:none.npy"):
        with pytest.raises(InputError, match=re.escape(f" in {Path.cwd()}, where this command was started")):
            load(spec)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        load(f"folder:{tmp_path}/file")


def test_mixed_channels_are_explained(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(
        InputError, match=r"grey \(1 such as b.png\).*colour \(1 such as a.png\).*grey=true or grey=false"
    ):
        load(f"folder:{tmp_path}")
    assert load(f"folder:{tmp_path}:grey=true").channels == 1
    assert load(f"folder:{tmp_path}", grey=False).channels == 3


def test_different_sizes_are_explained(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(InputError, match=r"8×8 \(1 such as a.png\), 8×9 \(1 such as b.png\).*size=64"):
        load(f"folder:{tmp_path}")
    assert load(f"folder:{tmp_path}:size=4x6").shape == (3, 4, 6)


def test_a_difference_that_is_seen_late_is_explained_too(tmp_path, monkeypatch):
    monkeypatch.setattr("dualout.data.prepare._LOOKED_AT", 2)
    for i in range(9):
        picture(tmp_path / f"{i}.png")
    picture(tmp_path / "4.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match=r"grey \(1 such as 4.png\), others colour; say"):
        load(f"folder:{tmp_path}")
    picture(tmp_path / "4.png", np.zeros((9, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"9×8 \(1 such as 4.png\)"):
        load(f"folder:{tmp_path}")


def spoil(path):
    path.write_bytes(path.read_bytes()[:40])


def test_unreadable_files_are_named_and_refused(tmp_path):
    images = [picture(tmp_path / f"{i:03}.png") for i in range(100)]
    spoil(tmp_path / "007.png")
    found = load(f"folder:{tmp_path}")
    assert len(found) == 99
    assert "1 of 100" in found.notes[0]
    assert "007.png" in found.notes[0]
    assert np.array_equal(found[7], chw(images[8]))
    spoil(tmp_path / "050.png")
    with pytest.raises(
        InputError, match=r"2 of 100 images cannot be read \(007.png: .*; 050.png: .*\).*strict="
    ) as error:
        load(f"folder:{tmp_path}")
    assert "0.01" in str(error.value)
    assert len(load(f"folder:{tmp_path}", strict=0.02)) == 98
    assert len(load(f"folder:{tmp_path}:strict=0.02")) == 98
    with pytest.raises(InputError, match="2 of 100"):
        load(f"folder:{tmp_path}", strict=0, size=8, grey=False)


def test_labels_stay_with_their_images_when_some_are_left_out(tmp_path):
    for c in "abc":
        for i in range(3):
            picture(tmp_path / c / f"{i}.png", np.full((4, 4), ord(c), np.uint8))
    spoil(tmp_path / "b" / "0.png")
    found = load(f"folder:{tmp_path}", strict=0.5)
    assert [chr(v) for v in found.batch(range(8))[:, 0, 0, 0]] == [found.classes[c] for c in found.labels]


def test_nothing_readable(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(b"no")
    with pytest.raises(
        InputError, match=r"none of 8 images looked at can be read \(0.jpg: not an image.* and 3 more\)"
    ):
        load(f"folder:{tmp_path}", strict=1.0)
    with pytest.raises(InputError, match=r"8 of 8 images cannot be read.*None can be used"):
        load(f"folder:{tmp_path}:size=8:grey=true", strict=1.0)


def test_links_that_lead_back_do_no_harm(tmp_path):
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "2.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a")
    (tmp_path / "aa").symlink_to(tmp_path / "b")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert scan(tmp_path).names == ["a/1.png", "b/2.png"]


def test_links_to_images_elsewhere_are_followed(tmp_path):
    image = picture(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "here" / "c").mkdir(parents=True)
    (tmp_path / "here" / "c" / "x.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "here" / "d").symlink_to(tmp_path / "elsewhere")
    found = load(f"folder:{tmp_path}/here")
    assert found.classes == ("c", "d")
    assert np.array_equal(found[1], chw(image))


def test_broken_links_and_pipes_are_unreadable_and_nobody_waits(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "none")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    os.mkfifo(tmp_path / "pipe.png")
    found = load(f"folder:{tmp_path}", strict=0.8)
    assert len(found) == 1
    for name in ("broken.png", "self.png", "pipe.png: not a regular file"):
        assert name in found.notes[0]


def test_names_that_are_no_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", folder + b"/\xff\xfe.png")
    with open(folder + b"/bad\xff.png", "wb") as file:
        file.write(b"no")
    for cache in (None, tmp_path / ".cache", tmp_path / ".cache"):
        found = load(f"folder:{tmp_path}", strict=0.5, cache=cache)
        assert found.classes == ("caf�",)
        assert len(found) == 1
        assert "bad�.png" in found.notes[0].encode("utf-8").decode()
        assert found.fingerprint


def test_a_directory_that_cannot_be_read(tmp_path, monkeypatch):
    picture(tmp_path / "a" / "1.png")
    listing = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(InputError, match="/a cannot be read: Permission denied"):
        load(f"folder:{tmp_path}")


def age(*paths):
    """As if the folder had been left alone for a minute."""
    for path in paths:
        state = os.stat(path)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns - 60 * 10**9))


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    folder, cache = tmp_path / "images", tmp_path / "cache"
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        picture(folder / name)
    directories = folder, folder / "a", folder / "b"
    age(*directories)
    first = indexed(folder, cache)
    listings = []
    monkeypatch.setattr("dualout.data.index.scan", lambda *a: listings.append(1) or scan(*a))
    again = indexed(folder, cache)
    assert not listings
    assert again.names == first.names
    assert again.directories == first.directories
    assert np.array_equal(again.times, first.times)

    picture(folder / "b" / "4.png")
    assert len(indexed(folder, cache).names) == 4
    age(*directories)
    indexed(folder, cache)
    assert len(listings) == 2
    with open(folder / "a" / "1.png", "ab") as file:
        file.write(b"more")
    assert indexed(folder, cache).sizes[0] == first.sizes[0] + 4
    (folder / "a" / "2.png").unlink()
    assert len(indexed(folder, cache).names) == 3
    for damaged in cache.glob("index-*"):
        damaged.write_bytes(b"damaged")
    assert len(indexed(folder, cache).names) == 3


def test_a_change_right_after_listing_is_seen(tmp_path):
    folder, cache = tmp_path / "images", tmp_path / "cache"
    picture(folder / "1.png")
    for i in range(2, 6):
        indexed(folder, cache)
        picture(folder / f"{i}.png")
        assert len(indexed(folder, cache).names) == i
