"""The interface of every data source, and how one is written in a line."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dualout.data.dataset import Dataset
from dualout.errors import InputError, unknown
from dualout.randomness import mix
from dualout.registry import Registered, value_of

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "test", "all")
Progress = Callable[[str, int, int], None]
"""Called as (what is being done, how many are done, how many there are; 0 when that is not known yet)."""
_OPTION = re.compile(r"[A-Za-z_]\w*=")
_HOLDOUT = 0x686F6C64


class Names(Sequence[str]):
    """What images are called, computed when it is needed: of a million, messages name a few."""

    def __init__(self, count: int, name: Callable[[int], str]) -> None:
        self._n, self._name = count, name

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        return self._name(i)


@dataclass(frozen=True)
class Pictures:
    """Image files that are still to be decoded.

    Attributes:
        names: what each is called in messages.
        open: gives picture i as a PIL image that nothing has been read of but its header.
        labels: the class of each, int64 (N,), or None.
        classes: the names of the classes.
        identity: a text that changes when the pictures do; what was decoded is kept under it.
        whole: what they are together, for messages ("the folder …").
        notes: what the user should know of what was left out.
    """

    names: Sequence[str]
    open: Callable[[int], Image]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    identity: str
    whole: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What a source may use while it is read: a directory to keep things in, or None, and whom to tell; and how many
    pictures are decoded at most, None for all."""

    cache: Path | None = None
    progress: Progress | None = None
    few: int | None = None


@dataclass(frozen=True, kw_only=True)
class Source(Registered, ABC):
    """Where images come from.

    Attributes:
        size: what they are made to be, one number for squares or (H, W): cut centrally to that shape, then scaled. None
            leaves them as they are.
        grey: True makes them grey (C = 1), False colour (C = 3); None leaves them as they are.
        split: "train", "test" or "all".
        strict: the share of image files that may be unreadable; they are left out.
    """

    kind: ClassVar[str] = "data source"
    place: ClassVar[str] = ""
    """The field that the part after the name fills, as in ``folder:PATH``."""

    size: int | tuple[int, int] | None = None
    grey: bool | None = None
    split: str = "train"
    strict: float = 0.01

    def __post_init__(self) -> None:
        self.check_types()
        if not 0 <= self.strict <= 1:
            raise InputError(f"strict is the share of images that may be unreadable, from 0 to 1, got {self.strict!r}")
        if self.split not in SPLITS:
            raise unknown("split", self.split, SPLITS)
        object.__setattr__(self, "size", _size(self.size))

    @abstractmethod
    def read(self, reading: Reading) -> Dataset | Pictures:
        """The images of `split`, before `size` and `grey` are applied.

        Raises:
            InputError: when there are none, or they cannot be read.
        """

    @property
    def shape(self) -> tuple[int, int] | None:
        """`size` as (H, W)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


def _size(size: Any) -> int | tuple[int, int] | None:
    numbers: list[Any] = list(size) if isinstance(size, tuple | list) else [size, size]
    if size is None or (len(numbers) == 2 and all(type(v) is int and 1 <= v <= 16384 for v in numbers)):
        return size if size is None or isinstance(size, int) else (numbers[0], numbers[1])
    raise InputError(f"size is a number of pixels (64) or HEIGHTxWIDTH (48x64), got {size!r}")


def open_source(spec: str | Source, **defaults: Any) -> Source:
    """Read a spec: the name, for some sources the place, then options.

        digits
        photos:grey=true
        folder:/my/images:size=64:grey=true
        arrays:images.npz:split=all
        idx:/usr/share/datasets/fashion-mnist:split=test
        hub:ylecun/mnist

    Parts are separated by ':'. A part that looks like ``key=value`` is an option; any other goes on with the one before
    it, so that a place may hold a ':' itself. A place that holds ':key=' can only be given from Python.

    Args:
        spec: the text, or a source made before.
        defaults: fields that are used where `spec` leaves them at their defaults.

    Raises:
        InputError: for an unknown name, an unknown or missing option, or a value that cannot be used.
    """
    defaults = {k: v for k, v in defaults.items() if v is not None}
    if isinstance(spec, Source):
        unset = {k: v for k, v in defaults.items() if k in spec.fields() and getattr(spec, k) == spec._default(k)}
        return dataclasses.replace(spec, **unset) if unset else spec
    if not isinstance(spec, str | PathLike):
        raise InputError(
            f"data are named by a text, as in 'folder:PATH'; got a {type(spec).__name__}. An array in memory becomes "
            "images by dualout.data.Dataset('mine', array, 'nhwc')"
        )
    spec = str(spec)
    name, _, rest = spec.strip().partition(":")
    if name not in Source.kinds():
        raise InputError(f"{unknown(Source.kind, name, Source.kinds())}{_guess(spec.strip())}")
    kind = Source.kinds()[name]
    fields = _fields(kind, spec, rest)
    if kind.place and kind.place not in fields:
        raise InputError(f"{kind.kind} {name!r} needs a {kind.place}: write {name}:{kind.place.upper()}")
    return Source.named(name, **(defaults | fields))


def _fields(kind: type[Source], spec: str, rest: str) -> dict[str, Any]:
    parts: list[str] = []
    for part in rest.split(":") if rest else []:
        if parts and not _OPTION.match(part):
            parts[-1] += f":{part}"
        else:
            parts.append(part)
    fields: dict[str, Any] = {}
    for position, part in enumerate(parts):
        if position == 0 and not _OPTION.match(part):
            if not kind.place:
                raise InputError(f"cannot read {part!r} in {kind.kind} {spec!r}: options are written key=value")
            fields[kind.place] = part
            continue
        key, _, value = part.partition("=")
        if key in fields:
            raise InputError(f"{kind.kind} {spec!r} gives {key!r} twice")
        fields[key] = value if key == kind.place else _size_or_value(value)
    return fields


def _size_or_value(text: str) -> Any:
    pair = re.fullmatch(r"(\d+)x(\d+)", text)
    return tuple(map(int, pair.groups())) if pair else value_of(text)


def _guess(spec: str) -> str:
    """What to write for the path of something that exists."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return f"; for the images in that folder write folder:{spec}"
    return f"; for that file write arrays:{spec}" if path.suffix in (".npy", ".npz") and path.exists() else ""


def looked_for(path: str | Path) -> str:
    """Where a relative path was looked for; a run remembers one that held where it was trained."""
    return "" if Path(path).expanduser().is_absolute() else f" in {Path.cwd()}, where this command was started"


def held_out(n: int, holdout: float, split: str, chosen: Callable[[], np.ndarray] | None = None) -> np.ndarray | None:
    """Which of n images belong to a split, where a share of them is the test split.

    Args:
        n: how many there are.
        holdout: the share.
        split: which.
        chosen: says of each whether it is in the test split, bool (n,); None takes a hash of its number.

    Returns:
        their numbers, or None for all of them.
    """
    if split == "test" and not holdout:
        raise InputError(
            "there is no test split: all images are the training split. Keep some back by :holdout=0.1 after the data "
            "(in training too), or take the split all"
        )
    if split == "all" or not holdout:
        return None
    test = mix(0, _HOLDOUT, np.arange(n)) < np.uint64(int(holdout * 2**64)) if chosen is None else chosen()
    rows = np.flatnonzero(test if split == "test" else ~test)
    if not len(rows):
        raise InputError(f"holdout={holdout} of {n} images leaves none for the split {split!r}")
    return rows


def check_holdout(holdout: float) -> None:
    """Refuse a share that is none."""
    if not 0 <= holdout < 1:
        raise InputError(f"holdout is the share of images kept for the test split, from 0 to below 1, got {holdout!r}")


def class_labels(values: np.ndarray, n: int, where: str) -> np.ndarray:
    """Labels as int64 (N,), checked: one for each image, whole numbers from 0.

    Raises:
        InputError: when they are not.
    """
    labels = np.asarray(values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (n,):
        raise InputError(f"{where} has {n} images but labels of shape {np.shape(values)}; there is one label an image")
    if labels.dtype.kind not in "iu" or (n and (labels.min() < 0 or labels.max() >= 2**20)):
        extent = f" from {labels.min()} to {labels.max()}" if n and labels.dtype.kind in "iuf" else ""
        raise InputError(
            f"labels of {where} are the classes' numbers, counted from 0 (integers), got {labels.dtype}{extent}"
        )
    return labels.astype(np.int64)
