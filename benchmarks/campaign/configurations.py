"""Mutated configurations: the YAML of --config with foreign tags and classes, bombs, wrong types, lost characters."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import yaml

from campaign import subjects
from campaign.flags import GRID
from campaign.harness import Box, Count, box, tried, scaled
from campaign.mutate import FOREIGN, VALUES, dumped, text, tree

CASES = 320
TAGS = (
    "steps: !!python/object/apply:os.system ['touch canary']",
    "network: !!python/object/new:subprocess.Popen [['touch', 'canary']]",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\n"
    "e: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nnetwork: {class: *e}",
    "[" * 3000, "{a: " * 2000, "&a [*a]", "network: &n {class: diffusers.UNet2DModel, arguments: *n}", "? ? ? x", "\t- a",
    "config: other.yaml", "config: /dev/stdin", "out: ../../outside", "cache: /proc/x", "data: folder:/proc", "init: ../..",
    "--- a\n--- b", "%YAML 9.9\n---\n", "steps: 2001-12-14t21:59:43.10-05:00", "steps: !!binary aGk=", "print_config: true",
    "network: {name: tiny, width: 1000000000000}", "network: {name: tiny, multipliers: []}", "batch_size: 999999999999",
    "network: {class: diffusers.UNet2DModel, arguments: {block_out_channels: [1000000, 1000000]}}", "size: [0, 8]",
    "network: {class: diffusers.UNet2DModel, arguments: {block_out_channels: [30, 30], norm_num_groups: 7}}", "betas: [.nan, 2]",
    "network: {class: diffusers.UNet2DModel, arguments: {layers_per_block: 100000}}", "lr: .nan", "ema: .inf", "betas: 3",
    "dry_run: !!python/name:os.system ''", "<<: {steps: 3}", "1: 2", "null: 1", "? [a]\n: b", "\ufeffsteps: 1", "\0", "\x80",
)  # fmt: skip


def run(part: float, seed: int) -> Iterator[Count]:
    """Tags and bombs, foreign classes, values, and text, for train; values and text for the grid of compare."""
    draw = random.Random(seed)
    share = scaled(CASES // 4, part)
    good = yaml.safe_load((subjects.trained() / "train.yaml").read_text())
    good = {k: v for k, v in good.items() if k != "out"} | {"steps": 1}
    odd = [*TAGS, *map(foreign, FOREIGN)]
    # the steps are few whatever the file says
    few = ["--steps", "1", "--sample_every", "0"]
    kinds = {
        "train, tags, bombs, foreign classes": (odd if part >= 1 else draw.sample(odd, share), few),
        "train, exchanged values": ([dumped(valued(draw, good)) for _ in range(share)], few),
        "train, damaged text": ([text(draw, yaml.safe_dump(good)) for _ in range(share)], few),
        "compare, exchanged values": ([dumped(tree(draw, GRID)) for _ in range(share)], []),
        "compare, damaged text": ([text(draw, yaml.safe_dump(GRID)) for _ in range(share)], []),
    }
    for kind, (written, more) in kinds.items():
        failures, refused, command = [], 0, kind.partition(",")[0]
        for config in written:
            with box() as where:
                code, wrong = read(command, config, more, where, draw)
                refused += code == 2
                failures += [f"{config[:300]!r}: {fault}" for fault in wrong]
        yield Count(f"configurations: {kind}", len(written), failures, f"{refused} refused, the others right")


def read(command: str, config: str, more: list[str], where: Box, draw: random.Random) -> tuple[int | None, list[str]]:
    """Give a configuration to a command; of two trainings, one is dry."""
    file = where.given / "config.yaml"
    file.write_bytes(config.encode("utf-8", "surrogatepass"))
    dry = command == "train" and draw.random() < 0.5
    correct = {
        "train": lambda: subjects.of_a_run(where.out),
        "compare": lambda: None if (where.out / "summary.md").exists() else "wrote no summary",
    }[command]
    outcome, wrong = tried(
        [command, "--config", str(file), *more, "--out", str(where.out), *(["--dry_run"] if dry else [])],
        where, seconds=180, correct=None if dry or "print_config" in config else correct, keeps_out=command == "compare",
        before=short if command == "compare" else None,
    )  # fmt: skip
    return outcome.code, [f"{'--dry_run: ' if dry else ''}{fault}" for fault in wrong]


def short() -> None:
    """Let a comparison be of few steps and images whatever the file says, in the forked process."""
    from dualout.analysis.grid import Grid
    from dualout.training import TrainConfig
    from dualout.training.calibrate import Fit

    for kind, name, most in ((TrainConfig, "steps", 2), (Grid, "images", 64), (Fit, "iterations", 1)):

        def checked(self: Any, check: Any = kind.__post_init__, name: str = name, most: int = most) -> None:
            check(self)
            object.__setattr__(self, name, min(getattr(self, name), most))

        kind.__post_init__ = checked  # type: ignore[method-assign]


def foreign(name: str) -> str:
    """A configuration whose network is of another class."""
    return dumped({"network": {"class": name, "arguments": {"command": "touch canary"}}})


def valued(draw: random.Random, good: dict[str, Any]) -> Any:
    """The configuration with values exchanged."""
    changed = tree(draw, good)
    if isinstance(changed, dict):
        changed.pop("out", None)
        if draw.random() < 0.3:
            changed["network"] = {
                "class": draw.choice(("diffusers.UNet2DModel", "diffusers.DiTTransformer2DModel"))
            } | {"arguments": {"block_out_channels": draw.choice(VALUES), "layers_per_block": draw.choice(VALUES)}}
    return changed
