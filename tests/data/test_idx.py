import gzip
import struct

import numpy as np
import pytest

from dualout import InputError
from dualout.data import load

RNG = np.random.default_rng(0)
TRAIN, TEST = (RNG.integers(0, 256, (n, 7, 5), dtype=np.uint8) for n in (30, 10))
LABELS = {"train": np.arange(30) % 10, "t10k": np.arange(10)}


def idx(array, kind=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture(params=["plain", "gzipped", "dots"])
def folder(tmp_path, request):
    for name, images in (("train", TRAIN), ("t10k", TEST)):
        for what, dims, array in (("images", 3, images), ("labels", 1, LABELS[name])):
            dash = "." if request.param == "dots" else "-"
            path = tmp_path / f"{name}-{what}{dash}idx{dims}-ubyte{'.gz' if request.param == 'gzipped' else ''}"
            path.write_bytes(gzip.compress(idx(array)) if request.param == "gzipped" else idx(array))
    return tmp_path


def test_the_family(folder, request):
    train, test, everything = (load(f"idx:{folder}", split=s) for s in ("train", "test", "all"))
    assert train.shape == (1, 7, 5)
    assert np.array_equal(train.batch(range(30))[:, 0], TRAIN)
    assert np.array_equal(test.batch(range(10))[:, 0], TEST)
    assert np.array_equal(everything.batch(range(40))[:, 0], np.concatenate([TRAIN, TEST]))
    assert np.array_equal(train.labels, LABELS["train"])
    assert np.array_equal(everything.labels, np.concatenate(list(LABELS.values())))
    assert test.classes == tuple("0123456789")
    assert isinstance(train.stored, np.memmap) != bool(list(folder.glob("*.gz")))


def test_one_split_without_labels(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(TRAIN))
    assert load(f"idx:{tmp_path}").labels is None
    assert len(load(f"idx:{tmp_path}:split=all")) == 30
    with pytest.raises(InputError, match="no test images: a file such as t10k-images-idx3-ubyte"):
        load(f"idx:{tmp_path}:split=test")


def test_the_same_file_twice_and_several_sets(tmp_path):
    for prefix in ("", "emnist-letters-", "emnist-digits-"):
        (tmp_path / f"{prefix}train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(TRAIN[: len(prefix) + 1])))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(TRAIN))
    with pytest.raises(InputError, match=r"several sets \(.*choose by prefix"):
        load(f"idx:{tmp_path}")
    assert len(load(f"idx:{tmp_path}:prefix=train")) == 30
    assert len(load(f"idx:{tmp_path}:prefix=emnist-letters")) == 16


def test_colour(tmp_path):
    colour = RNG.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    (tmp_path / "train-images-idx4-ubyte").write_bytes(idx(colour))
    assert np.array_equal(load(f"idx:{tmp_path}").batch([2])[0], colour[2].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing"),
        (b"PNG?", "is no idx file: it begins with 50 4e 47 3f"),
        (idx(TRAIN, kind=13), "holds values of idx type 0x0d"),
        (idx(TRAIN)[:-1], r"tells of 1050 values \(30, 7, 5\), it has 1049"),
        (idx(TRAIN) + b"x", "is damaged"),
        (idx(TRAIN)[:10], "is damaged"),
        (idx(TRAIN[:0]), "not images"),
        (idx(TRAIN[0]), "not images"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3) + b"x" * 99, "is damaged"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_files(tmp_path, content, message, packed):
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match=message.replace("1049", "1049|more")) as error:
        load(f"idx:{tmp_path}")
    assert str(path) in str(error.value)


def test_damaged_gzip(tmp_path):
    path, whole = tmp_path / "train-images-idx3-ubyte.gz", gzip.compress(idx(TRAIN))
    for content in (whole[:-20], whole[:400] + b"\0\xff" * 20 + whole[440:], idx(TRAIN), b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read|is damaged|begins with nothing"):
            load(f"idx:{tmp_path}")


def test_labels_of_another_length(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(TRAIN))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS["t10k"]))
    with pytest.raises(InputError, match="30 images but labels of shape"):
        load(f"idx:{tmp_path}")


def test_folders_with_something_else(tmp_path):
    with pytest.raises(InputError, match="it is empty"):
        load(f"idx:{tmp_path}")
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError, match=r"it holds a.png"):
        load(f"idx:{tmp_path}")
    with pytest.raises(InputError, match="no folder that can be read"):
        load(f"idx:{tmp_path}/none")
    with pytest.raises(InputError, match="no folder that can be read"):
        load(f"idx:{tmp_path}/a.png")
