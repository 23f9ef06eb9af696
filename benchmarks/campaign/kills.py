"""SIGKILL at random moments, and just before a random change of the file system, of training, sampling and saving.

A killed training that is resumed must end in the same bits as the uninterrupted one; killed sampling loses at most one
shard and never makes a stored image again; a checkpoint that is saved over another is always whole.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from campaign import subjects
from campaign.harness import Box, Count, box, ended, judged, start, tree, scaled

KILLS = 100
_TIMES = ("images_per_s", "seconds")
_SCRIPT = Path(__file__).resolve().parents[1] / "kill_and_resume.py"


def run(part: float, seed: int) -> Iterator[Count]:
    """Random moments and writes; last, the script that kills trainings alone."""
    draw = random.Random(seed)
    subjects.trained()
    share = scaled(KILLS // 4, part)
    yield killed("kills: training, at a write", share, draw, _training, bits)
    yield killed("kills: sample to PNG, at a random moment or a write", share, draw, _png, pictures)
    yield killed("kills: sample to npz, at a random moment or a write", share, draw, _npz, pictures)
    yield saved(share, draw)
    yield trainings(scaled(20, part), seed)


def trainings(kills: int, seed: int) -> Count:
    """benchmarks/kill_and_resume.py, which any number of trainings can be killed with."""
    small = ["--steps", "16", "--checkpoint_every", "2", "--batch_size", "4", "--network", "tiny:width=4"]
    command = [sys.executable, str(_SCRIPT), "--kills", str(kills), "--seed", str(seed), *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    wrong = [line for line in done.stdout.splitlines() if "DIFFERS" in line]
    return Count(
        "kills: training, at a random moment (kill_and_resume.py)", kills,
        wrong or ([] if done.returncode == 0 else [done.stderr[-300:]]), last,
    )  # fmt: skip


def _training(where: Box) -> list[str]:
    return subjects.training(where.out, 6)


def _png(where: Box) -> list[str]:
    return subjects.sampling(subjects.trained(), where.out, 40, "--batch_size", "8")


def _npz(where: Box) -> list[str]:
    # three shards, each of more than one batch
    return subjects.sampling(subjects.trained(), where.out, 1100, "--batch_size", "100", "--format", "npz")


def killed(
    kind: str, kills: int, draw: random.Random, command: Callable[[Box], list[str]], content: Callable[[Path], Any]
) -> Count:
    """Kill a command, give it again, and compare."""
    with box() as where:
        begun = time.monotonic()
        ended(start(command(where), where), where)
        life, expected = time.monotonic() - begun, content(where.out)
    failures, lost, most = [], 0, 30
    for number in range(kills):
        with box() as where:
            made = where.path / "log" / "made"
            by_write = number % 2 == 0 or command is _training
            child = start(
                command(where), where, lambda made=made: counted(made), draw.randrange(1, most) if by_write else None
            )
            if not by_write:
                time.sleep(draw.uniform(0, life))
                os.kill(child, signal.SIGKILL)
            first = ended(child, where, 300)
            if first.code == 0:
                # it came to its end before
                most = max(8, most - 1)
            elif first.code != -signal.SIGKILL:
                failures.append(f"case {number}: ended with {first.code}: {first.said}")
                continue
            before, stored = numbers(made), there(where.out)
            second = ended(start(command(where), where, lambda made=made: counted(made)), where, 300)
            failures += [f"case {number}: resumed: {fault}" for fault in judged(second, where, (0,))]
            again = numbers(made)[len(before) :]
            lost = max(lost, len(set(before) - stored))
            if twice := stored & set(again):
                failures.append(f"case {number}: made {len(twice)} stored images again")
            if content(where.out) != expected:
                failures.append(f"case {number}: differs from the uninterrupted one")
    shards = {_png: 8, _npz: 512}
    if command in shards and lost > shards[command]:
        failures.append(f"{lost} images were lost, a shard has {shards[command]}")
    return Count(
        kind,
        kills,
        failures,
        f"at most {lost} images made again, of a shard of {shards[command]}" if command in shards else "",
    )


def counted(file: Path) -> None:
    """Write down, in the forked process, which images it makes."""
    from dualout.evaluation.sampling import Sampling

    make, handle = Sampling.images, os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counting(self: Sampling, indices: Any) -> Any:
        images = make(self, indices)
        os.write(handle, "".join(f"{i}\n" for i in indices).encode())
        return images

    Sampling.images = counting  # type: ignore[method-assign]


def numbers(file: Path) -> list[int]:
    """The images that were made, in order."""
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def there(out: Path) -> set[int]:
    """The images that are stored, whole."""
    if (out / "images.npz").exists():
        return set(range(1100))
    found = {int(p.stem) for p in out.glob("[0-9]*.png")}
    for shard in (out / "shards").glob("[0-9]*.npy"):
        first = int(shard.stem)
        found |= set(range(first, min(first + 512, 1100)))
    return found


def bits(out: Path) -> Any:
    """All of a run that must agree: times are another's, but for them every byte."""
    if not (out / "metrics.jsonl").exists():
        return None
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    files = tree(out, but=("lock", "metrics.jsonl", "README.md", "state.json", "config.json"))
    return files, [{k: v for k, v in row.items() if k not in _TIMES} for row in rows]


def pictures(out: Path) -> Any:
    """The images, and how they were made."""
    if (out / "images.npz").exists():
        import numpy as np

        with np.load(out / "images.npz") as found:
            return found["images"].tobytes(), sorted(p.name for p in out.iterdir())
    return tree(out)


def saved(kills: int, draw: random.Random) -> Count:
    """Kill a process that saves checkpoints over each other; what is there must always load."""
    from dualout import Denoiser
    from dualout.errors import InputError

    failures, denoiser = [], Denoiser.from_pretrained(subjects.trained())
    whole = 0
    for number in range(kills):
        with box() as where:
            where.out.mkdir()
            denoiser.save_pretrained(where.out, image={"channels": 1, "size": [8, 8]})
            ended(
                start([], where, lambda where=where: saving(denoiser, where.out), None), where, draw.uniform(0.02, 0.5)
            )
            try:
                Denoiser.from_pretrained(where.out)
                whole += 1
            except InputError as error:
                failures.append(f"case {number}: {error}")
            if torn := [p.name for p in where.out.iterdir() if not re.fullmatch(r"[\w.]+|\..*\.tmp", p.name)]:
                failures.append(f"case {number}: {torn}")
    return Count("kills: a checkpoint saved over another", kills, failures, f"{whole} load")


def saving(denoiser: Any, out: Path) -> None:
    """Save without end."""
    while True:
        denoiser.save_pretrained(out, image={"channels": 1, "size": [8, 8]})
