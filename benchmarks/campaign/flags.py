"""Mutated command lines: values that are none, in any flag of any command, and commands cut to pieces."""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import yaml

from campaign import subjects
from campaign.harness import Box, Count, box, tried, scaled
from campaign.mutate import WORDS, text

CASES = 400
_LONG = ("images", "iterations", "epochs", "workers", "steps")
"""More of these is more work, not a mistake."""
_PLACES = ("out", "cache", "push_to_hub", "private", "track", "card")
"""What is not exchanged: it says where things go."""
_KEEP = ("calibrate", "demo")
"""Commands that leave things where they are when they are refused: beside a model, or to go on with."""

COMMANDS = (
    "train", "sample", "train --dry_run", "info", "analyze", "calibrate", "export", "report", "evaluate", "demo",
    "compare", "upgrade", "app", "completion",
)  # fmt: skip
GRID = {
    "methods": {"dual": "dual"},
    "train": {"data": "digits", "network": "tiny:width=8", "batch_size": 4, "steps": 1, "precision": "fp32"},
    "samplers": ["ddim"], "spacings": ["trailing"], "steps": [2], "images": 12, "features": ["pixels"],
    "choose_seeds": [], "device": "cpu",
}  # fmt: skip
"""The smallest comparison."""


def run(part: float, seed: int) -> Iterator[Count]:
    """One count a command."""
    draw = random.Random(seed)
    subjects.trained()
    cases = scaled(CASES, part)
    for command in COMMANDS:
        share = cases // 4 if command in ("train --dry_run", "sample") else max(1, cases // 24)
        failures, refused = [], 0
        for _ in range(share):
            with box() as where:
                arguments = mutated(draw, command, where)
                outcome, wrong = tried(
                    arguments, where, seconds=180, keeps_out=command in _KEEP,
                    before=at_once if command == "app" else None, starts=command == "demo",
                )  # fmt: skip
                refused += outcome.code == 2
                failures += [f"{shown(arguments, where)}: {fault}" for fault in wrong]
        yield Count(f"flags: {command}", share, failures, f"{refused} refused, the others right")


def mutated(draw: random.Random, command: str, where: Box) -> list[str]:
    """The arguments of a command, one to three of them spoilt."""
    name = command.partition(" ")[0]
    arguments = whole(command, where)
    options = importlib.import_module(f"dualout.cli.{name}").Options
    names = [f.name for f in dataclasses.fields(options) if not f.metadata.get("positional")]
    names = [n for n in names if n not in _PLACES] or ["config"]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        what = draw.randrange(10)
        field = draw.choice(names)
        if what < 7:
            words = [w for w in WORDS if not w.startswith("9999")] if field in _LONG else WORDS
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


def whole(command: str, where: Box) -> list[str]:
    """The arguments that work."""
    name, *more = command.split()
    out, model = str(where.out), str(subjects.trained())
    match name:
        case "train":
            return [*subjects.training(where.out, 1), *more]
        case "info":
            return ["info", model]
        case "app":
            return ["app", model, "--device", "cpu"]
        case "completion":
            return ["completion", "bash"]
        case "calibrate":
            # it writes beside the weights
            run = str(subjects.copied(Path(model), where.out))
            return ["calibrate", run, "--data", "digits", "--iterations", "1", "--batch_size", "4", "--steps", "2"]
        case "demo":
            return ["demo", "--steps", "1", "--images", "8", "--out", out]
        case "compare":
            grid = where.given / "grid.yaml"
            grid.write_text(yaml.safe_dump(GRID))
            return ["compare", "--config", str(grid), "--out", out]
        case "upgrade":
            small = ["--images", "16", "--pixels", "4", "--held_out", "16", "--bins", "2", "--device", "cpu"]
            return ["upgrade", str(subjects.trained("eps")), *small, "--out", out]
        case "report":
            where.out.mkdir()
            return ["report", model, "--out", f"{out}/report.html"]
    small = {
        "sample": ["--images", "3", "--steps", "2"],
        "evaluate": ["--images", "12", "--features", "pixels", "--samplers", "ddim", "--data", "digits", "--steps", "2"],
        "analyze": ["--images", "8"],
        "export": [],
    }  # fmt: skip
    return [name, model, *small[name], "--out", out]


def at_once() -> None:
    """End the page as soon as it is served, as by Ctrl-C, in the forked process."""
    import dualout.cli.app as command

    class Ended:
        def wait(self) -> None:
            raise KeyboardInterrupt

    command.threading = SimpleNamespace(Event=Ended)  # type: ignore[attr-defined]


def shown(arguments: list[str], where: Box) -> str:
    """What was typed, without the places of this machine."""
    typed = " ".join(repr(a) if not a.isprintable() or " " in a or not a else a for a in arguments)
    for path, name in ((where.path, "BOX"), (subjects.trained(), "RUN"), (subjects.trained("eps"), "EPS")):
        typed = typed.replace(str(path), name)
    return typed[-300:]
