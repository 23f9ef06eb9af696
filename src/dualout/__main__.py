"""The command ``dualout``, and ``python -m dualout``, and so ``torchrun … -m dualout``: the command line.

Before anything else is imported, Ctrl-C and SIGTERM are given their exit codes.
"""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run a command; returns the exit code."""
    # nothing is begun, so that nothing has to be put away; and who started this may have had them ignored
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = [number for number, handler in usual.items() if signal.getsignal(number) is handler]
    for number in ours:
        signal.signal(number, _leave)
    from dualout.cli.main import main as command

    for number in ours:
        signal.signal(number, usual[number])
    return command()


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
