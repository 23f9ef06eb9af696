"""Files that are written whole or not at all, and read with errors that say what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dualout.errors import InputError

ASIDE = ".writing-"
"""How directories begin whose files take their places together."""
_KINDS = {dict: "object", list: "list"}


def read_json(path: Path, kind: type = dict, then: str = "") -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        kind: dict or list; object for either.
        then: what to do about a damaged one, at the end of the message.

    Raises:
        InputError: when it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}{then}") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} is damaged: it holds no JSON {_KINDS[kind]}{then}")
    return value


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomically(path) as aside:
        aside.write_text(text, encoding="utf-8")


def held(directory: Path) -> list[str]:
    """The names in a directory, sorted, but for what a killed process was writing there; none where there is none."""
    there = (p.name for p in directory.iterdir()) if directory.is_dir() else iter(())
    return sorted(n for n in there if not (n.startswith(".") and (n.endswith(".tmp") or n.startswith(ASIDE))))


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and is removed when it does not."""
    with explained(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        aside = Path(name)
        try:
            yield aside
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            aside.chmod(0o666 & ~_umask())
            aside.replace(path)
            flush(path.parent)
        finally:
            aside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """See that a file, or the list of a directory's files, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that says what to do."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(_explain(path, error)) from error
    except Exception as error:
        # safetensors wraps the system's error in its own
        if "No space left" in str(error) or "os error 28" in str(error):
            raise InputError(_explain(path, OSError(errno.ENOSPC, "No space left on device"))) from error
        raise


def _explain(path: Path, error: OSError) -> str:
    place = path if path.is_dir() else path.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with_room = next((p for p in [place, *place.parents] if p.exists()), Path("/"))
        free = shutil.disk_usage(with_room).free // 2**20
        return (
            f"the disk is full: cannot write {path} ({free} MiB free); nothing was overwritten. Make room and run again"
        )
    return f"cannot write {path}: {error.strerror or error}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
