"""Full disks, directories that cannot be written, clocks that jump, and two runs in one --out.

A full disk is a small tmpfs where one can be mounted, else a limit on the size of files.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from campaign import subjects
from campaign.harness import Box, Count, box, ended, judged, start, tried, scaled
from campaign.kills import bits, pictures

CASES = 20


def run(part: float, seed: int) -> Iterator[Count]:
    """Each fault, in training and in sampling."""
    draw, cases = random.Random(seed), scaled(CASES, part)
    model = subjects.trained()
    commands = {
        "training": (lambda out: subjects.training(out, 6), bits),
        "sample": (lambda out: subjects.sampling(model, out, 300, "--batch_size", "50", "--format", "npz"), pictures),
    }
    for name, (command, content) in commands.items():
        with box() as where:
            tried(command(where.out), where)
            expected = content(where.out)
            size = sum(p.stat().st_size for p in where.out.rglob("*") if p.is_file())
        failures = []
        for number in range(cases):
            with box() as where, disk(where) as grow:
                room = draw.randrange(4096, 2 * size)
                before = grow(room)
                outcome, wrong = tried(command(where.out), where, before=before, keeps_out=True)
                if outcome.code == 2 and "disk is full" not in outcome.err and "File too large" not in outcome.err:
                    wrong.append(f"does not say so: {outcome.said}")
                grow(2**28)
                _, again = tried(command(where.out), where, codes=(0,))
                if content(where.out) != expected:
                    again.append("differs once there is room")
                failures += [f"case {number}, {room} bytes: {fault}" for fault in (*wrong, *again)]
        yield Count(f"files: full disk, {name}", cases, failures, "goes on once there is room, to the same bits")
        failures = []
        for number in range(cases // 2 or 1):
            jumps = random.Random(draw.random())
            with box() as where:
                _, wrong = tried(command(where.out), where, before=lambda jumps=jumps: jumping(jumps), codes=(0,))
                if content(where.out) != expected:
                    wrong.append("differs")
                failures += [f"case {number}: {fault}" for fault in wrong]
        yield Count(f"files: the clock jumps, {name}", cases // 2 or 1, failures)
        with box() as where, read_only(where):
            _, wrong = tried(command(where.out / "run"), where, codes=(2,))
        yield Count(f"files: --out cannot be written, {name}", 1, wrong)
    yield twice(cases // 2 or 1)


@contextmanager
def disk(where: Box) -> Iterator:
    """A disk in the place of --out, whose size can be set."""
    where.out.mkdir()
    mounted = os.geteuid() == 0 and mount(where.out, "size=4k")

    def grow(size: int):
        if mounted:
            mount(where.out, f"remount,size={size}")
            return None
        return lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)),
        )

    try:
        yield grow
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(where.out)], check=False)


@contextmanager
def read_only(where: Box) -> Iterator[None]:
    """An --out that cannot be written to."""
    where.out.mkdir()
    mounted = os.geteuid() == 0 and mount(where.out, "ro,size=1m")
    where.out.chmod(0o555) if not mounted else None
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(where.out)], check=False)
        else:
            where.out.chmod(0o755)


def mount(place: Path, options: str) -> bool:
    """Mount a tmpfs; False where that is not allowed."""
    if shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def jumping(draw: random.Random) -> None:
    """Let the clock jump by years, in the forked process."""
    now, now_ns, off = time.time, time.time_ns, [0.0]

    def jump() -> float:
        if draw.random() < 0.2:
            off[0] = draw.uniform(-3e8, 3e8)
        return off[0]

    time.time = lambda: now() + jump()
    time.time_ns = lambda: now_ns() + int(jump() * 1e9)


def twice(cases: int) -> Count:
    """While a training runs, another in the same --out is refused, and the first ends as if alone."""
    failures = []
    for number in range(cases):
        with box() as where, box() as second:
            first = start(subjects.training(where.out, 100_000), where)
            deadline = time.monotonic() + 60
            while not (where.out / "metrics.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            outcome, wrong = tried(subjects.training(where.out, 100_000), second, codes=(2,), keeps_out=True)
            # it may look there, and no more
            wrong = [fault for fault in wrong if "lock" not in fault and "state" not in fault]
            if "another process is training" not in outcome.err:
                wrong.append(f"does not say so: {outcome.said}")
            os.kill(first, signal.SIGTERM)
            wrong += judged(ended(first, where), where, (143,))
            failures += [f"case {number}: {fault}" for fault in wrong]
    return Count("files: two trainings in one --out", cases, failures, "the second is refused")
