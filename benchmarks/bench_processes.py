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
from timing import Spread, Times

QUESTION = """## Two processes: what sharing a batch costs

`dualout train` on digits (tiny, fp32) in one process of one thread, and in two by torchrun (gloo) that share the same
batches: 64 images made as large as 32×32, which is what the goal is for, and 128 of 8×8, the smallest task there is.
What starting takes is taken away: it is the difference of a long and a short run. `processor time` is of both processes
together, and what two cores could reach at best follows from it: 2 × one / two. `clock` is what it was while the
machine also did other things."""


class Case(NamedTuple):
    """A training, short and long."""

    size: int
    batch_size: int
    short: int
    long: int
    rounds: int
    goal: float | None


CASES = {"32×32": Case(32, 64, 4, 20, 3, 1.9), "8×8": Case(8, 128, 10, 60, 2, None)}


class Run(NamedTuple):
    """A training from its start to its end."""

    processor: float
    clock: float
    losses: list[float]


def measure(full: bool, peers: list[ModuleType]) -> Section | None:
    if not full:
        print("takes minutes: only with --full")
        return None
    section, rows, apart = Section(QUESTION), [], 0.0
    for name, case in CASES.items():
        processor: Times = {"one": [], "two": []}
        clock: Times = {"one": [], "two": []}
        for _ in range(case.rounds):
            losses = {}
            for kind, processes in (("one", 1), ("two", 2)):
                short, long = (_train(processes, case, steps) for steps in (case.short, case.long))
                steps = case.long - case.short
                processor[kind].append((long.processor - short.processor) / steps)
                clock[kind].append((long.clock - short.clock) / steps)
                losses[kind] = long.losses
            apart = max(apart, *(abs(a - b) / a for a, b in zip(losses["one"], losses["two"], strict=True)))
        section.times[f"{name}, seconds a step, of all processes"] = processor
        section.times[f"{name}, seconds a step, by the clock"] = clock
        best = Spread.of([2 * r for r in _ratios(processor)])
        if case.goal is not None:
            what = f"throughput on two cores, {name}: two processes / one"
            section.goals.append(Goal(f"{what}, by processor time", best, case.goal, least=True))
            section.goals.append(Goal(f"{what}, by the clock", Spread.of(_ratios(clock)), case.goal, least=True))
        for kind in processor:
            times = [Spread.of(which[kind]).text(1e-3) for which in (processor, clock)]
            rows.append([f"{name}, {kind}", *times, best.text() if kind == "two" else ""])
    section.tables = [
        table(["processes", "processor time, ms a step", "clock, ms a step", "2 × one / two"], rows),
        f"The losses of the two differ by at most {apart:.1e} of themselves.",
    ]
    return section


def _ratios(times: Times) -> list[float]:
    return [one / two for one, two in zip(times["one"], times["two"], strict=True)]


def _train(processes: int, case: Case, steps: int) -> Run:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        out = Path(folder) / "run"
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
        command = [
            sys.executable, *(launch if processes > 1 else ()), "-m", "dualout.cli.main",
            "train", "--data", "digits", "--size", str(case.size), "--batch_size", str(case.batch_size),
            "--steps", str(steps), "--precision", "fp32", "--device", "cpu", "--sample_every", "0",
            "--checkpoint_every", str(steps), "--log_every", "2", "--out", str(out),
        ]  # fmt: skip
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        after, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begun
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(used, clock, losses)
