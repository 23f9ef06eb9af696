"""Datasets of the Hugging Face Hub, or a local folder in its format, through the library `datasets` (extra ``hub``).

The library keeps its downloads in its own cache (HF_HOME). Code that comes with a dataset is never run.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dualout.data import decode
from dualout.data.base import Names, Pictures, Reading, Source, check_holdout, class_labels, held_out
from dualout.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_TESTS = ("test", "validation", "valid", "val")


@dataclass(frozen=True)
class Hub(Source):
    """The image column of a dataset, and its class label if it has one.

    The test split is the dataset's ``test``, or its ``validation``; where it has neither, a share of ``train``.

    Attributes:
        repository: such as ``ylecun/mnist``.
        subset: the name of its configuration, where it has several.
        image: the column of images; None takes the only one.
        label: the column of labels; None takes the only ClassLabel there is.
        revision: a branch, tag or commit.
        holdout: the share of ``train`` that makes the test split.
    """

    place: ClassVar[str] = "repository"

    repository: str
    subset: str | None = None
    image: str | None = None
    label: str | None = None
    revision: str | None = None
    holdout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_holdout(self.holdout)

    def read(self, reading: Reading) -> Pictures:
        """The encoded images; they are decoded later."""
        tables = self._tables()
        test = next((name for name in _TESTS if name in tables), None)
        if test and self.holdout:
            raise InputError(f"{self.repository} has its own split {test!r}; leave holdout out")
        if self.split == "all":
            names = list(dict.fromkeys(["train", test or "train"])) if "train" in tables else list(tables)
        else:
            names = [test if self.split == "test" and test else "train"]
        missing = [name for name in names if name not in tables]
        if missing or not names:
            raise InputError(f"{self.repository} has no split 'train', but {', '.join(map(str, tables)) or 'none'}")
        datasets = _library()
        table = datasets.concatenate_datasets([tables[name] for name in names]) if names[1:] else tables[names[0]]
        image, label = self._columns(table.features)
        rows = None if test else held_out(len(table), self.holdout, self.split)
        rows = np.arange(len(table)) if rows is None else rows
        if not len(rows):
            raise InputError(f"{self.repository} has no images in {', '.join(names)}")
        labels, classes = self._labels(table, label)
        # the bytes are decoded here, like those of every other source
        encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        return Pictures(
            names=Names(len(rows), lambda i: f"{self.repository}[{rows[i]}]"),
            open=partial(_open, encoded, image, rows),
            labels=None if labels is None else labels[rows],
            classes=classes,
            identity=f"hub {self.repository} {self.subset} {table._fingerprint} {image} {self.split} {self.holdout}",
            whole=f"the dataset {self.repository}",
        )

    def _tables(self) -> Any:
        datasets = _library()
        try:
            return datasets.load_dataset(self.repository, self.subset, revision=self.revision)
        except Exception as error:  # the library, the network and the Hub fail in many ways
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(
                f"the Hugging Face Hub did not give the dataset {self.repository!r}: {reason}. Offline, only datasets "
                "loaded before are at hand (HF_HUB_OFFLINE=1 uses them without asking)"
            ) from error

    def _columns(self, features: Any) -> tuple[str, str | None]:
        datasets = _library()
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        if self.image is not None and self.image not in images:
            raise InputError(
                f"{self.repository} has no image column {self.image!r}; it has {', '.join(images) or 'none'}"
            )
        if self.image is None and len(images) != 1:
            several = f"several columns of images ({', '.join(images)}): choose by image=…"
            have = several if images else "no column of images"
            raise InputError(f"{self.repository} has {have}; its columns are {', '.join(features)}")
        if self.label is not None and self.label not in features:
            raise InputError(f"{self.repository} has no column {self.label!r}; its columns are {', '.join(features)}")
        return self.image or images[0], self.label or (labels[0] if len(labels) == 1 else None)

    def _labels(self, table: Any, column: str | None) -> tuple[np.ndarray | None, tuple[str, ...]]:
        if column is None:
            return None, ()
        numbers = np.asarray(table[column])
        if numbers.dtype.kind == "i" and len(numbers) and numbers.min() == -1:
            return None, ()  # how the Hub marks a split whose labels are kept secret
        labels = class_labels(numbers, len(table), f"{self.repository}, column {column!r},")
        names = getattr(table.features[column], "names", None)
        return labels, tuple(names or map(str, range(int(labels.max(initial=-1)) + 1)))


def _open(table: Any, column: str, rows: np.ndarray, i: int) -> Image:
    cell = table[int(rows[i])][column]
    if not cell or not (cell.get("bytes") or cell.get("path")):
        raise decode.Unreadable("there is no image")
    return decode.opened(io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"])


def _library() -> Any:
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError("data source 'hub' needs the library datasets: pip install 'dualout[hub]'") from error
    return datasets
