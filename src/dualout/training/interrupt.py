"""Ctrl-C and SIGTERM ask a run to end after the step it is in."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Asked:
    """Which signal came: its number, or 0."""

    signal: int = 0

    @property
    def code(self) -> int:
        """The exit code that tells it: 130 for Ctrl-C, 143 for SIGTERM, 0 when none came."""
        return 128 + self.signal if self.signal else 0


@contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[Asked]:
    """Call `stop` at the first SIGINT or SIGTERM; at a second SIGINT, leave at once by KeyboardInterrupt."""
    asked = Asked()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.signal = number
        stop()

    if threading.current_thread() is not threading.main_thread():
        # only the main thread may listen; in others, whoever started it decides
        yield asked
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
