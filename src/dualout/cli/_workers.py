"""Commands run one after another in processes of their own, side by side, and watched from here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from dualout.errors import InputError

_CHILD = "import sys; from dualout.cli._workers import chain; sys.exit(chain(sys.argv[1]))"


class Worker:
    """A process that runs some commands, each only if the one before it did what it was asked.

    It ends as by SIGTERM when this process ends, however that comes.

    Args:
        name: what it is called in messages.
        commands: the arguments of each, after ``dualout``.
        log: where its output goes.
        threads: how many processors each command may use.
    """

    def __init__(self, name: str, commands: Sequence[Sequence[str]], log: Path, threads: int) -> None:
        self.name, self.commands, self.log, self.threads = name, commands, log, threads
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def start(self) -> None:
        """Begin."""
        count = str(self.threads)
        environment = os.environ | {
            "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8",
        }  # fmt: skip
        self._output = self.log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps([list(c) for c in self.commands])],
            stdin=subprocess.PIPE, stdout=self._output, stderr=subprocess.STDOUT, env=environment,
            # Ctrl-C comes to this process alone, which passes it on
            start_new_session=True, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether it is at work."""
        return self._process is not None and self._process.poll() is None

    @property
    def code(self) -> int | None:
        """Its exit code; None before it ends."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """Ask it to end; training writes a checkpoint first."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()

    def close(self) -> None:
        """Wait until it has ended."""
        self.stop()
        if self._process is not None:
            self._process.wait()
        if self._output is not None:
            self._output.close()

    def last_words(self) -> str:
        """The last eight lines of what it printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.strip().splitlines()[-8:])


def watch(workers: Sequence[Worker], together: int, stopped: Callable[[], bool], every: float = 0.5) -> Iterator[None]:
    """Run all, so many at a time; yields now and then, until all have ended or `stopped`.

    Raises:
        InputError: when one fails, with what it said last; the others are stopped.
    """
    waiting, begun = list(workers), []
    try:
        while True:
            _check(begun, stopped)
            while waiting and not stopped() and sum(w.running for w in begun) < together:
                begun.append(waiting.pop(0))
                begun[-1].start()
            yield
            if stopped() or not (waiting or any(w.running for w in begun)):
                break
            time.sleep(every)
        _check(begun, stopped)
    finally:
        for worker in begun:
            worker.stop()
        for worker in begun:
            worker.close()


def _check(begun: Sequence[Worker], stopped: Callable[[], bool]) -> None:
    for worker in begun:
        if worker.code not in (None, 0) and not stopped():
            raise InputError(f"{worker.name} failed:\n{worker.last_words()}\n(all it said is in {worker.log})")


def chain(text: str) -> int:
    """Run commands, given as JSON, until one returns something else than 0; what a worker's process does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from dualout.cli.main import main

    for command in json.loads(text):
        print(f"$ dualout {' '.join(command)}", flush=True)
        if code := main(command):
            return code
    return 0


def _end_with_parent() -> None:
    # not through sys.stdin, whose lock a thread must not hold when Python ends
    while os.read(0, 1024):
        pass
    if sys.platform == "win32":
        # os.kill would end it there at once, without a checkpoint
        signal.raise_signal(signal.SIGTERM)
    else:
        os.kill(os.getpid(), signal.SIGTERM)
