"""The entry point: finds the command, and turns errors into messages and exit codes.

| code | meaning |
|---|---|
| 0 | done |
| 2 | something given cannot be used; the message says what, and nothing was overwritten |
| 130, 143 | stopped by Ctrl-C or SIGTERM; what was finished is saved |
"""

from __future__ import annotations

import ast
import errno
import importlib
import io
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from dualout import processes
from dualout.cli import _processes
from dualout.errors import InputError, first_line, printable, unknown
from dualout.signals import handled
from dualout.version import __version__

_ORDER = (
    "demo", "train", "sample", "evaluate", "compare", "analyze",
    "calibrate", "upgrade", "export", "report", "app", "info", "completion",
)  # fmt: skip
_ALONE = ("demo", "compare", "analyze", "calibrate", "upgrade", "export")
"""Commands that several processes would each do in full, writing to the same files."""
_HELPERS = ("__init__", "main", "console", "options")


def commands() -> dict[str, str]:
    """Every command and the first line of its docstring, without importing it."""
    found = {}
    for path in Path(__file__).parent.glob("*.py"):
        if path.stem not in _HELPERS and not path.stem.startswith("_"):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = text.partition("\n")[0]
    return {name: found[name] for name in sorted(found, key=lambda n: (_ORDER.index(n) if n in _ORDER else 99, n))}


def usage() -> str:
    """What ``dualout --help`` prints."""
    lines = [f"  {name:<10} {text}" for name, text in commands().items()]
    return "\n".join(
        [
            "usage: dualout COMMAND [options]",
            "",
            "Dynamic dual-output diffusion models: train, upgrade, sample in few steps, and measure.",
            "",
            *lines,
            "",
            "dualout COMMAND --help   the options of a command",
            "dualout --version        the version",
        ]
    )


_NO_TELEMETRY = {"HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False", "ORT_DISABLE_TELEMETRY": "1"}
"""Read by libraries as they are imported, ONNX Runtime by diffusers wherever it is installed."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, value in _NO_TELEMETRY.items():
        os.environ.setdefault(name, value)
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by who started this, as by >&- or a service without a console
            setattr(sys, stream, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # as standard error has it: a → is written \u2192 where the encoding has none, in a pipe on Windows for one
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            with handled(_stop):
                return _run(arguments)
        finally:
            # a reader that has gone (… | head) is noticed here at the latest
            sys.stdout.flush()
    except InputError as error:
        return _wrong(f"dualout {arguments[0]}: {error}")
    except (MemoryError, RuntimeError, ValueError) as error:
        if _processes.deserted(error):
            return _wrong(f"dualout {arguments[0]}: another of its processes has ended, and this one cannot go on")
        if not out_of_memory(error):
            raise
        advice = "take smaller images, a smaller network, or a smaller --batch_size"
        return _wrong(f"dualout {arguments[0]}: there is not enough memory ({first_line(error)[:200]}); {advice}")
    except KeyboardInterrupt as stop:
        if _processes.first():
            print(f"\ndualout {arguments[0]}: stopped", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    except BrokenPipeError:
        _hush()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _hush()
        return _wrong(f"dualout {arguments[0]}: the disk is full that its output goes to; make room and run again")


def _hush() -> None:
    # nothing more can be said there, also not as Python ends
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _wrong(message: str) -> int:
    if _processes.tells(message):
        print(printable(message), file=sys.stderr)
    return 2


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def _stop(number: int, frame: FrameType | None) -> None:
    """End at SIGTERM as at Ctrl-C: what is half written is removed on the way. A second SIGTERM ends at once, and so
    does either while torch is imported: its C code drops what is raised amid an import of its own, or aborts."""
    if _importing("torch"):
        os._exit(128 + number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    raise _Terminated


def _importing(module: str) -> bool:
    """Whether a module is being imported at this moment."""
    return getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False)


_NO_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "std::bad_alloc",
    "storage size calculation overflowed", "array is too big", "maximum allowed dimension exceeded",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or torch says that there is not enough memory for what was asked."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _NO_MEMORY)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"dualout {__version__}")
        return 0
    name, *rest = arguments
    if name not in commands():
        raise unknown("command", name, commands())
    if name in _ALONE and processes.count() > 1:
        raise InputError(
            f"it runs as one process, and WORLD_SIZE is {processes.count()}: start it without torchrun or "
            "accelerate launch"
        )
    return int(importlib.import_module(f"dualout.cli.{name}").run(rest) or 0)


if __name__ == "__main__":
    sys.exit(main())
