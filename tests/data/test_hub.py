import sys
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from dualout import InputError
from dualout.data import load


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'dualout\[hub\]'"):
        load("hub:ylecun/mnist")


class Table:
    """What is used of `datasets.Dataset`: columns, rows, and two ways to look at them."""

    def __init__(self, features, columns, fingerprint="f"):
        self.features, self.columns, self._fingerprint = features, columns, fingerprint

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {k: v[key] for k, v in self.columns.items()}

    def select_columns(self, names):
        return Table({k: self.features[k] for k in names}, {k: self.columns[k] for k in names})

    def cast_column(self, name, kind):
        assert kind.decode is False
        return self


class Images:
    def __init__(self, decode=True):
        self.decode = decode


class Labels:
    names = ("cat", "dog")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A library that holds one dataset: 12 training and 4 test images."""
    library = type(sys)("datasets")
    library.Image, library.ClassLabel = Images, Labels
    rng = np.random.default_rng(0)

    def table(n, **more):
        cells = []
        for i in range(n):
            path = tmp_path / f"{n}-{i}.png"
            Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(path)
            cells.append({"bytes": path.read_bytes(), "path": None} if i % 2 else {"bytes": None, "path": str(path)})
        columns = {"image": cells, "label": [i % 2 for i in range(n)], "caption": ["?"] * n, **more}
        kinds = {"image": Images(), "label": Labels(), "caption": None} | {k: Images() for k in more}
        return Table(kinds, columns, f"table {n}")

    def together(tables):
        columns = {k: list(chain.from_iterable(t.columns[k] for t in tables)) for k in tables[0].columns}
        return Table(tables[0].features, columns, "both")

    library.tables = {"train": table(12), "test": table(4)}
    library.make = table
    library.concatenate_datasets = together

    def load_dataset(repository, subset, revision):
        if repository != "some/pets":
            raise ConnectionError("Couldn't reach it")
        return library.tables

    library.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def test_images_labels_and_splits(hub, tmp_path):
    train, test, everything = (load("hub:some/pets", split=s) for s in ("train", "test", "all"))
    assert [len(d) for d in (train, test, everything)] == [12, 4, 16]
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 1] * 6
    expected = np.asarray(Image.open(tmp_path / "12-3.png")).transpose(2, 0, 1)
    assert np.array_equal(train[3], expected)
    assert np.array_equal(everything[3], expected)
    with pytest.raises(InputError, match="own split 'test'; leave holdout out"):
        load("hub:some/pets:holdout=0.5")


def test_a_share_of_train_where_there_is_no_test(hub):
    hub.tables = {"train": hub.make(40)}
    with pytest.raises(InputError, match="no test split"):
        load("hub:some/pets:split=test")
    train, test = (load("hub:some/pets:holdout=0.25", split=s) for s in ("train", "test"))
    assert len(train) + len(test) == 40
    assert 3 <= len(test) <= 17


def test_kept_decoded(hub, tmp_path):
    first = load("hub:some/pets", cache=tmp_path / "cache")
    assert isinstance(first.stored, np.memmap)
    assert load("hub:some/pets", cache=tmp_path / "cache").fingerprint == first.fingerprint
    assert load("hub:some/pets:split=test", cache=tmp_path / "cache").fingerprint != first.fingerprint


def test_what_cannot_be_used(hub):
    with pytest.raises(InputError, match=r"did not give the dataset 'no/where': Couldn't reach it\. Offline"):
        load("hub:no/where")
    with pytest.raises(InputError, match="no image column 'caption'; it has image"):
        load("hub:some/pets:image=caption")
    with pytest.raises(InputError, match="no column 'species'; its columns are image, label, caption"):
        load("hub:some/pets:label=species")
    with pytest.raises(InputError, match="counted from 0"):
        load("hub:some/pets:label=caption")
    hub.tables = {"validation": hub.make(4)}
    with pytest.raises(InputError, match="no split 'train', but validation"):
        load("hub:some/pets")
    hub.tables = {"train": hub.make(4, mask=[None] * 4)}
    with pytest.raises(InputError, match=r"several columns of images \(image, mask\)"):
        load("hub:some/pets")
    with pytest.raises(InputError, match=r"some/pets\[0\]: there is no image"):
        load("hub:some/pets:image=mask")
    hub.tables = {"train": Table({"text": None}, {"text": ["a"]})}
    with pytest.raises(InputError, match="no column of images; its columns are text"):
        load("hub:some/pets")


def test_secret_labels_are_none(hub):
    hub.tables["test"].columns["label"] = [-1] * 4
    assert load("hub:some/pets:split=test").labels is None
