"""The command ``dualout``, and ``python -m dualout``, and so ``torchrun … -m dualout``: the command line.

Before anything else is imported, Ctrl-C and SIGTERM are given their exit codes. Warnings are lines of their own.
"""

import os
import sys
import warnings
from types import FrameType
from typing import TextIO

from dualout.signals import handled


def main() -> int:
    """Run a command; returns the exit code."""
    # nothing is begun, so that nothing has to be put away
    with handled(_leave):
        from dualout.cli.main import main as command

    shown = warnings.showwarning
    warnings.showwarning = _told
    try:
        return command()
    finally:
        warnings.showwarning = shown


def _told(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning; what is for users, and not for who writes programs, without the place in one."""
    from dualout.errors import printable

    text = f"warning: {message}\n" if category is UserWarning else None
    where = sys.stderr if file is None else file
    where.write(printable(text or warnings.formatwarning(message, category, filename, lineno, line)))


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
