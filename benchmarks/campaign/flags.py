"""Mutated command lines: values that are none, in any flag of any command, and commands cut to pieces."""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections.abc import Iterator
from pathlib import Path

from campaign import subjects
from campaign.harness import Box, Count, box, tried, scaled
from campaign.mutate import WORDS, text

CASES = 300
_LONG = ("images", "iterations", "epochs", "workers")
"""More of these is more work, not a mistake."""


def run(part: float, seed: int) -> Iterator[Count]:
    """One count a command."""
    model, draw = subjects.trained(), random.Random(seed)
    cases = scaled(CASES, part)
    commands = ("train", "sample", "train --dry_run", "info", "analyze", "calibrate", "export", "report", "evaluate")
    for command in commands:
        share = cases // 3 if command in ("train --dry_run", "sample") else max(1, cases // 21)
        failures, refused = [], 0
        for _ in range(share):
            with box() as where:
                arguments = mutated(draw, command, model, where)
                outcome, wrong = tried(arguments, where, seconds=120, keeps_out=command == "calibrate")
                refused += outcome.code == 2
                failures += [f"{shown(arguments, model, where)}: {fault}" for fault in wrong]
        yield Count(f"flags: {command}", share, failures, f"{refused} refused, the others right")


def mutated(draw: random.Random, command: str, model: Path, where: Box) -> list[str]:
    """The arguments of a command, one to three of them spoilt."""
    name = command.partition(" ")[0]
    arguments = whole(command, model, where)
    options = importlib.import_module(f"dualout.cli.{name}").Options
    names = [f.name for f in dataclasses.fields(options) if not f.metadata.get("positional")]
    names = [n for n in names if n not in ("out", "cache", "push_to_hub", "private", "track")]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        what = draw.randrange(10)
        field = draw.choice(names)
        if what < 7:
            words = WORDS if field not in (*_LONG, "steps") else [w for w in WORDS if not w.startswith("9999")]
            arguments += (
                [f"--{field}", draw.choice(words)] if draw.random() < 0.5 else [f"--{field}={draw.choice(words)}"]
            )
        elif what == 7:
            arguments += [f"--{field}"]
        elif what == 8:
            at = draw.randrange(1, len(arguments))
            if arguments[at - 1] != "--out" and str(where.path) not in arguments[at]:
                arguments[at] = text(draw, arguments[at])
        else:
            arguments.insert(draw.randrange(1, 3), draw.choice(WORDS))
    # a zero byte and a lone surrogate cannot be typed
    return [a.replace("\0", "").encode("utf-8", "replace").decode() for a in arguments]


def whole(command: str, model: Path, where: Box) -> list[str]:
    """The arguments that work."""
    out = str(where.out)
    if command.startswith("train"):
        return [*subjects.training(where.out, 1), *command.split()[1:]]
    steps = {"sample": "2", "evaluate": "2", "calibrate": "2"}
    small = {
        "sample": ["--images", "3"],
        "evaluate": ["--images", "12", "--features", "pixels", "--samplers", "ddim", "--data", "digits"],
        "calibrate": ["--iterations", "1", "--batch_size", "4"],
        "analyze": ["--images", "8"],
    }.get(command, [])
    run = model if command != "calibrate" else subjects.copied(model, where.out)
    chosen = ["--steps", steps[command]] if command in steps else []
    placed = ["--out", out + (".html" if command == "report" else "")] if command not in ("info", "calibrate") else []
    return [command, str(run), *small, *chosen, *placed]


def shown(arguments: list[str], model: Path, where: Box) -> str:
    """What was typed, without the places of this machine."""
    typed = " ".join(repr(a) if not a.isprintable() or " " in a or not a else a for a in arguments)
    return typed.replace(str(where.path), "BOX").replace(str(model), "RUN")[-300:]
