"""One faulty run after another: each in a process forked from this one, watched, and judged.

A case has a box: a directory with ``in`` (what it is given), ``cwd``, ``home``, ``tmp``, ``cache`` ($DUALOUT_CACHE) and
``out``. A process that writes anywhere but to ``out``, ``cache`` and ``tmp``, leaves anything in ``tmp``, starts a
program, opens a connection, ends in a traceback, does not end, or leaves a partial file has failed, whatever else it
says.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 12 * 2**30
SECONDS = 60.0
CRASHED = 70
_WRITES = {
    "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "shutil.rmtree": 1, "tempfile.mkstemp": 1, "tempfile.mkdtemp": 1,
}  # fmt: skip
_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "socket.connect",
    "pickle.find_class",
)
_HERE = ("127.0.0.1", "::1", "localhost")
_OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Count:
    """How many cases of a kind there were, and which failed."""

    kind: str
    cases: int
    failures: list[str]
    note: str = ""


def scaled(cases: int, part: float) -> int:
    """A part of so many cases, one at least."""
    return max(1, round(cases * part))


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code, −N when signal N ended it, None when it did not end."""

    code: int | None
    out: str
    err: str
    seconds: float
    forbidden: tuple[str, ...]

    @property
    def said(self) -> str:
        """The last line of standard error."""
        lines = self.err.strip().splitlines()
        return lines[-1][:300] if lines else ""


@dataclass
class Box:
    """The only place where a case may do anything."""

    path: Path
    made: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("in", "cwd", "home", "tmp", "cache", "log"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    @property
    def given(self) -> Path:
        """What a case is given."""
        return self.path / "in"

    @property
    def out(self) -> Path:
        """Where it writes."""
        return self.path / "out"

    def elsewhere(self) -> dict[str, tuple[int, int]]:
        """Size and time of all that must not change."""
        return {
            str(p.relative_to(self.path)): (p.stat().st_size, p.stat().st_mtime_ns)
            for name in ("in", "cwd", "home", "tmp")
            for p in (self.path / name).rglob("*")
            if p.is_file()
        }


@contextlib.contextmanager
def box() -> Iterator[Box]:
    """A new box, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        yield Box(path.resolve())
    finally:
        shutil.rmtree(path, ignore_errors=True)


def start(
    command: list[str],
    where: Box,
    before: Callable[[], Any] | None = None,
    die_at_write: int | None = None,
    starts: bool = False,
) -> int:
    """Run a command in a process of its own; returns its number.

    Args:
        command: what is typed after ``dualout``.
        where: its box.
        before: is called first, in that process.
        die_at_write: kill it with SIGKILL just before it changes the file system for this time.
        starts: whether it may start Python with other commands of dualout.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        os.setsid()
        for number, name in ((1, "stdout"), (2, "stderr")):
            handle = os.open(where.path / "log" / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.chdir(where.path / "cwd")
        os.environ.update(HOME=str(where.path / "home"), TMPDIR=str(where.path / "tmp"))
        # matplotlib's list of fonts is a cache, too
        os.environ.update(DUALOUT_CACHE=str(where.path / "cache"), MPLCONFIGDIR=str(where.path / "cache"))
        tempfile.tempdir = None
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if before is not None:
            before()
        from dualout.cli.main import main

        _watch(where, die_at_write, starts)
        code = main(command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _watch(where: Box, die_at_write: int | None, starts: bool) -> None:
    """Note what is forbidden; a hook that is added cannot be taken away by what runs."""
    from dualout.cli._workers import _CHILD

    allowed = (*(str(where.path / name) for name in ("out", "cache", "tmp")), os.devnull)
    notes = os.open(where.path / "log" / "forbidden", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    writes = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal writes
        if event == "open":
            path, _, flags = arguments
            paths = [path] if isinstance(flags, int) and flags & _OPENED_TO_WRITE else []
        else:
            paths = list(arguments[: _WRITES.get(event, 0)])
            if event in ("os.remove", "os.rmdir", "os.mkdir") and isinstance(arguments[-1], int) and arguments[-1] >= 0:
                # relative to a directory that is open
                paths = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), os.fsdecode(paths[0]))]
        if paths:
            writes += 1
            if writes == die_at_write:
                os.kill(os.getpid(), signal.SIGKILL)
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                full = os.path.abspath(os.fsdecode(path))
                if not full.startswith(allowed):
                    os.write(notes, f"{event} {full}\n".encode(errors="replace"))
        own = starts and event == "subprocess.Popen" and list(arguments[1][:3]) == [sys.executable, "-c", _CHILD]
        # asyncio wakes its loop over a connection to itself, and a page asks itself whether it is there
        own = own or (event == "socket.connect" and str(arguments[1][0]) in _HERE)
        if event in _FORBIDDEN and not own:
            os.write(notes, f"{event} {arguments!r:.100}\n".encode(errors="replace"))

    sys.addaudithook(hook)


def ended(child: int, where: Box, seconds: float = SECONDS) -> Outcome:
    """Wait for a process, or end it when it does not."""
    begun = time.monotonic()
    code: int | None = None
    pause = 0.002
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() - begun > seconds:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    texts = [_text(where.path / "log" / name) for name in ("stdout", "stderr", "forbidden")]
    return Outcome(code, texts[0], texts[1], time.monotonic() - begun, tuple(dict.fromkeys(texts[2].splitlines())))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def tried(
    command: list[str],
    where: Box,
    *,
    before: Callable[[], Any] | None = None,
    seconds: float = SECONDS,
    codes: tuple[int, ...] = (0, 2),
    correct: Callable[[], str | None] | None = None,
    keeps_out: bool = False,
    starts: bool = False,
) -> tuple[Outcome, list[str]]:
    """Run a command and judge it.

    Args:
        command: what is typed after ``dualout``.
        where: its box.
        before: is called first, in its process.
        seconds: how long it may take.
        codes: the exit codes that are right.
        correct: after exit code 0, what is wrong with the result, or None.
        keeps_out: a refused command may leave what was in ``out`` there; otherwise it must leave nothing there.
        starts: whether it may start Python with other commands of dualout.
    """
    things = where.elsewhere()
    outcome = ended(start(command, where, before, starts=starts), where, seconds)
    found = judged(outcome, where, codes)
    if changed := [name for name, _ in things.items() ^ where.elsewhere().items()]:
        found.append(f"changed what it was given, or wrote outside --out and the cache: {', '.join(changed[:3])}")
    if outcome.code == 2 and not keeps_out:
        left = [p for p in where.out.rglob("*") if p.is_file() and p.name != "lock"] if where.out.exists() else []
        if left:
            found.append(f"refused, and left {', '.join(p.name for p in left[:4])}")
    if outcome.code == 0 and correct is not None and (wrong := correct()):
        found.append(wrong)
    return outcome, found


def judged(outcome: Outcome, where: Box, codes: tuple[int, ...] = (0, 2)) -> list[str]:
    """What is wrong with how a command ended."""
    found = [f"did what is forbidden: {text}" for text in outcome.forbidden[:3]]
    if outcome.code is None:
        return [*found, f"did not end within {outcome.seconds:.0f} s"]
    if "Traceback (most recent call last)" in outcome.err or outcome.code == CRASHED:
        return [*found, f"traceback: {outcome.said}"]
    if outcome.code not in codes:
        found.append(f"exit code {outcome.code}: {outcome.said}")
    if outcome.code == 2 and "dualout" not in outcome.err:
        found.append(f"refused without a message: {outcome.said!r}")
    if len(outcome.err) > 20_000:
        found.append(f"said {len(outcome.err)} characters")
    if where.out.is_dir() and (torn := [p.name for p in where.out.rglob("*.tmp")]):
        found.append(f"left a partial file: {torn[0]}")
    return found


def tree(path: Path, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """The contents of all files below a directory."""
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name not in but
    }
