"""What two processes do of what one does."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from report import Goal, Section, table
from timing import Spread

QUESTION = """## Two processes: what sharing a batch costs

`dualout train` on digits (tiny, batches of 128, fp32) in one process of one thread, and in two by torchrun (gloo) that
share the same batches. What starting takes is taken away: it is the difference of a long and a short run. `processor
time` is of both processes together, and what two cores could reach at best follows from it: 2 × one / two. `clock` is
what it was while the machine also did other things."""

SHORT = 20


class Run(NamedTuple):
    """A training from its start to its end."""

    processor: float
    clock: float
    losses: list[float]


def measure(full: bool, peers: list[ModuleType]) -> Section | None:
    if not full:
        print("takes minutes: only with --full")
        return None
    section, rounds, steps = Section(QUESTION), 3, 200
    seconds: dict[str, list[float]] = {"one": [], "two": []}
    clock: dict[str, list[float]] = {"one": [], "two": []}
    apart = 0.0
    for _ in range(rounds):
        losses = {}
        for name, processes in (("one", 1), ("two", 2)):
            short, long = _train(processes, SHORT), _train(processes, steps)
            seconds[name].append((long.processor - short.processor) / (steps - SHORT))
            clock[name].append((long.clock - short.clock) / (steps - SHORT))
            losses[name] = long.losses
        apart = max(apart, *(abs(a - b) / a for a, b in zip(losses["one"], losses["two"], strict=True)))
    section.times = {"seconds a step, of all processes": seconds, "seconds a step, by the clock": clock}
    best = Spread.of([2 * one / two for one, two in zip(seconds["one"], seconds["two"], strict=True)])
    section.goals.append(Goal("throughput on two cores: two processes / one, by processor time", best, 1.9, least=True))
    rows = [[name, Spread.of(seconds[name]).text(1e-3), Spread.of(clock[name]).text(1e-3)] for name in seconds]
    section.tables = [
        table(["processes", "processor time, ms a step", "clock, ms a step"], rows),
        f"The losses of the two differ by at most {apart:.1e} of themselves over {steps} steps.",
    ]
    return section


def _train(processes: int, steps: int) -> Run:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        out = Path(folder) / "run"
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
        command = [
            sys.executable, *(launch if processes > 1 else ()), "-m", "dualout.cli.main",
            "train", "--data", "digits", "--steps", str(steps), "--batch_size", "128", "--precision", "fp32",
            "--device", "cpu", "--sample_every", "0", "--checkpoint_every", str(steps), "--log_every", "10",
            "--out", str(out),
        ]  # fmt: skip
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        after, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begun
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(used, clock, losses)
