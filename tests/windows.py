"""What Windows refuses, refused here: so much of it as Python's audit events and Linux's list of open files show.

There, a file that is open or mapped is neither renamed, replaced nor removed; no directory is opened; only what can be
written is flushed to disk; and names have no `<>:"|?*` and end in no dot or space.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dualout import files

_FORBIDDEN = re.compile(r'[<>:"|?*\\]|[. ]$')
_WRITTEN = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_roots: list[str] = []
"""Below which it is Windows; an audit hook is never removed, and does nothing where there are none."""


def _event(name: str, args: tuple[Any, ...]) -> None:
    if not _roots or name not in _EVENTS or isinstance(args[0], int):
        return
    path = os.path.abspath(os.fsdecode(args[0]))
    if path.startswith(_roots[-1]):
        _EVENTS[name](path, args)


def _opened(path: str, args: tuple[Any, ...]) -> None:
    if os.path.isdir(path):
        _refuse(path, "a directory is opened")
    if set("wax+") & set(args[1] or "") or (args[2] or 0) & _WRITTEN:
        _named(path)


def _renamed(path: str, args: tuple[Any, ...]) -> None:
    there = os.path.abspath(os.fsdecode(args[1]))
    _named(there)
    _unused(path)
    if os.path.exists(there):
        _unused(there)


def _named(path: str, _: Any = None) -> None:
    if any(_FORBIDDEN.search(part) for part in path[len(_roots[-1]) :].split("/")):
        _refuse(path, "a forbidden name", errno.EINVAL)


def _unused(path: str, _: Any = None) -> None:
    if os.path.basename(path).startswith(".filelock-probe-"):
        return  # filelock tries what it can do, on Unix alone
    path = os.path.realpath(path)
    places = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    used = [os.readlink(place) for place in places if os.path.lexists(place)]
    used += [line.rpartition(" ")[2] for line in Path("/proc/self/maps").read_text(errors="replace").splitlines()]
    if any(place == path or place.startswith(f"{path}/") for place in used):
        _refuse(path, "it is being used by another process")


_EVENTS = {"open": _opened, "os.mkdir": _named, "os.rename": _renamed, "os.remove": _unused, "os.rmdir": _unused}


def _refuse(path: str, why: str, number: int = errno.EACCES) -> NoReturn:
    raise PermissionError(number, why, path) if number == errno.EACCES else OSError(number, why, path)


class Windows:
    """Within, files below a directory are as on Windows."""

    installed = False

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)

    def __enter__(self) -> Windows:
        if not Windows.installed:
            sys.addaudithook(_event)
            Windows.installed = True
        flush = os.fsync

        def fsync(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "only what can be written is flushed")
            flush(number)

        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(files, "fcntl", None)
        self.patched.setattr(os, "fsync", fsync)
        self.patched.setattr(shutil, "_use_fd_functions", False)
        for name in ("fork", "sched_getaffinity"):
            self.patched.delattr(os, name)
        _roots.append(self.root)
        return self

    def __exit__(self, *_: object) -> None:
        _roots.pop()
        self.patched.undo()
