"""Directories that are written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dualout.files import ASIDE, explained, holding, sweep, take_place, text_path, writable


@contextmanager
def whole(directory: str | Path, *, last: str) -> Iterator[Path]:
    """A directory aside, whose files take their places when the block ends well, and are removed when it does not.

    Args:
        directory: where they go, made if it is missing.
        last: the file that comes last: where it is, the others are.

    Raises:
        InputError: when the file system refuses.
    """
    directory = Path(directory).expanduser()
    text_path(directory)
    writable(directory)
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        sweep(directory)
        aside = Path(tempfile.mkdtemp(dir=directory, prefix=ASIDE))
        try:
            with holding(aside):
                yield aside
            files = sorted(
                (p for p in aside.rglob("*") if p.is_file()), key=lambda p: p.relative_to(aside) == Path(last)
            )
            for file in files:
                target = directory / file.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                take_place(file, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
