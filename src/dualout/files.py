"""Files that are written whole or not at all, and read with errors that say what to do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dualout.errors import InputError, some

try:
    import fcntl
except ImportError:  # on Windows, where nothing is held, and nothing swept
    fcntl = None

ASIDE = ".writing-"
"""How directories begin whose files take their places together."""
_ASIDE_FILE = r"\..+\.[a-z0-9_]{8}\.tmp"
"""How files are called that take the place of another: as `tempfile` names them, so that nobody else's are swept."""
_LARGEST = 2**28
"""Bytes of a JSON file, of which each may take ten in memory."""
_KINDS = {dict: "object", list: "list"}
_LEFT_BY_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""What file managers put into the directories that they show."""
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]+')
_FULL_DISK = (39, 112)
"""Windows' own numbers for it, which Rust's libraries tell."""
_PAUSES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Seconds between attempts to take the place of a file that another process reads, which Windows does not let."""


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
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # a pipe would be waited for, a device be read for ever
            raise InputError(f"{path} is no regular file{then}")
        if state.st_size > _LARGEST:
            raise InputError(
                f"{path} has {state.st_size >> 20} MiB, more than the {_LARGEST >> 20} that are read{then}"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}{then}") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} is damaged: it holds no JSON {_KINDS[kind]}{then}")
    return value


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write a JSON file atomically."""
    write_text(path, as_json(value, indent))


def as_json(value: Any, indent: int = 2) -> str:
    """What a JSON file of a value holds."""
    return json.dumps(value, indent=indent, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomically(path) as aside:
        # of a path that is no UTF-8, Python reads a byte as a surrogate; JSON writes it so too, and reads it back
        aside.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def file_hash(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_directory() -> Path:
    """Where computed things are kept: $DUALOUT_CACHE, or `dualout` in the user's cache directory."""
    if os.environ.get("DUALOUT_CACHE"):
        return Path(os.environ["DUALOUT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dualout"


def portable(name: str) -> str:
    """A name for a file of any system, from words that may hold what Windows forbids in one."""
    return _FORBIDDEN.sub("-", name)


def held(directory: Path) -> list[str]:
    """The names in a directory, sorted, without locks, files that are being written, and what systems leave there;
    empty where there is no directory."""
    names = (p.name for p in directory.iterdir()) if directory.is_dir() else iter(())
    temporary = re.compile(rf"{_ASIDE_FILE}|\..*\.lock|{re.escape(ASIDE)}.*")
    return sorted(name for name in names if name not in _LEFT_BY_SYSTEMS and not temporary.fullmatch(name))


def refuse_others(directory: Path, instead: str, but: str = "") -> None:
    """Refuse a directory for results that is a file, or holds something else.

    Args:
        directory: as --out names it, there or not.
        instead: what to do, at the end of the message.
        but: a name that may be in it.

    Raises:
        InputError: then.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--out {directory} is a file, not a directory")
    if others := [name for name in held(directory) if name != but]:
        raise InputError(f"--out {directory} holds something else ({some(others)}); {instead}")


def sweep(directory: Path) -> None:
    """Remove, at any depth, what killed processes were writing; what a living one writes is held, and stays."""
    with suppress(OSError):
        files = [p for p in directory.rglob(".*.tmp") if re.fullmatch(_ASIDE_FILE, p.name)]
        for left in [*files, *directory.rglob(f"{ASIDE}*")]:
            # neither a link, which leads elsewhere, nor a pipe, which would be waited for, was being written
            if left.is_symlink() or not (left.is_file() or left.is_dir()):
                continue
            with suppress(OSError), holding(left, wait=False) as ours:
                if ours and left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                elif ours:
                    left.unlink()


def writable(directory: Path) -> None:
    """See that a directory, or the nearest one above it that is there, can be written in: before long work.

    Raises:
        InputError: when it cannot be.
    """
    for path in [directory, *directory.parents]:
        if path.is_symlink() and not path.exists():
            raise InputError(f"cannot write in {directory}: {path} is a link to nowhere, {path.readlink()}")
        if path.exists():
            if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
                raise InputError(f"cannot write in {path}: it is read-only, or not yours")
            return


def text_path(directory: Path) -> None:
    """See that the path of a directory for weights is text: safetensors writes to others, and does not read from them.

    Raises:
        InputError: when bytes of it are no UTF-8, or none in the locale.
    """
    try:
        os.fspath(directory).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"cannot write weights in {directory}: the path is no UTF-8, and they could not be read from there; take "
            "another, or a locale that has its letters"
        ) from error


@contextmanager
def alone(directory: Path, doing: str) -> Iterator[None]:
    """Keep out of a directory other processes that would be alone in it.

    Args:
        directory: one that is there.
        doing: what is done in it, as in "making images".

    Raises:
        InputError: when another is in it.
    """
    with holding(directory, wait=False) as ours:
        if ours is False:
            raise InputError(
                f"another process is {doing} in --out {directory}: wait for it, stop it, or choose another --out"
            )
        yield


@contextmanager
def holding(path: Path, *, wait: bool = True) -> Iterator[bool | None]:
    """Hold a file or directory, until the block or the process ends, however that comes.

    No lock file stays behind, and what is being written can be held, but Windows has no such locks: where two at once
    would do harm, in a run, in results and in a cache, filelock's lock files keep them apart there too.

    Yields:
        whether it is held: False when another process does, None where the file system knows no locks.
    """
    if fcntl is None:  # no directory can be opened there either
        yield None
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        yield _hold(handle, wait=wait)
    finally:
        os.close(handle)


def _hold(handle: int, *, wait: bool) -> bool | None:
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def atomically(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and is removed when it does not.

    Args:
        path: the file.
        durable: see that it is on disk, so that a power cut leaves either it or the one before.

    Raises:
        InputError: when the file system refuses.
    """
    with explained(path), _aside(path) as aside:
        try:
            yield aside
            if durable:
                flush(aside)
            aside.chmod(0o666 & ~_umask())
            take_place(aside, path)
            if durable:
                flush(path.parent)
        finally:
            aside.unlink(missing_ok=True)


def take_place(aside: Path, path: Path) -> None:
    """Rename a file or a directory; a file that is there is replaced.

    Raises:
        OSError: when the file system refuses.
    """
    for pause in _PAUSES if fcntl is None else ():
        with suppress(PermissionError):
            aside.replace(path)
            return
        time.sleep(pause)
    aside.replace(path)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        if fcntl is None:  # what is open is not renamed there
            os.close(handle)
            yield Path(name)
            return
        try:
            _hold(handle, wait=True)
            # another process may have swept it before it was held
            if os.path.exists(name):
                yield Path(name)
                return
        finally:
            os.close(handle)


def flush(path: Path) -> None:
    """See that a file, or the list of a directory's files, is on disk."""
    if fcntl is None and path.is_dir():  # Windows opens no directory, and keeps a journal of such changes
        return
    handle = os.open(path, os.O_RDONLY if fcntl else os.O_RDWR)
    try:
        # a Mac's fsync leaves it to the drive when
        if (whole := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
            with suppress(OSError):  # of drives that cannot
                fcntl.fcntl(handle, whole)  # type: ignore[union-attr]
                return
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
        code = re.search(r"os error (\d+)", str(error))
        if code is None and "No space left" not in str(error):
            raise
        number = int(code[1]) if code else errno.ENOSPC
        if fcntl is None and number in _FULL_DISK:
            number = errno.ENOSPC
        raise InputError(_explain(path, OSError(number, os.strerror(number)))) from error


def _explain(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        directory = path if path.is_dir() else path.parent
        existing = next((p for p in [directory, *directory.parents] if p.exists()), Path("/"))
        free = shutil.disk_usage(existing).free // 2**20
        return (
            f"the disk is full: cannot write {path} ({free} MiB free); nothing was overwritten. Make room and run again"
        )
    return f"cannot write {path}: {error.strerror or error}"


def _umask() -> int:
    # it can only be read by setting it: what other threads write meanwhile is for nobody else
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
