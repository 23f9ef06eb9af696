"""Mutated checkpoints and states: flipped bits, lost ends, wrong shapes, NaN, huge shapes, foreign classes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from campaign import subjects
from campaign.harness import Box, Count, box, tried, scaled
from campaign.mutate import FOREIGN, dumped, raw, text, tree

CASES = 300


def run(part: float, seed: int) -> Iterator[Count]:
    """Each way of damage: sampled from, and trained on where it is the state that is damaged."""
    model, draw = subjects.trained(), random.Random(seed)
    share = scaled(CASES // 6, part)
    ways: dict[str, Callable[[random.Random, Path], None]] = {
        "checkpoints: config.json, exchanged values": values,
        "checkpoints: config.json, damaged text": damaged_text,
        "checkpoints: config.json, foreign classes and huge shapes": foreign,
        "checkpoints: model.safetensors, damaged bytes": weights,
        "checkpoints: model.safetensors, wrong tensors": tensors,
    }
    for kind, damage in ways.items():
        yield many(kind, share, draw, lambda w, damage=damage: sampled(draw, damage, model, w))
    yield many("checkpoints: state of a run, damaged", share, draw, lambda w: resumed(draw, model, w))


def many(kind: str, cases: int, draw: random.Random, one: Callable[[Box], tuple[int | None, list[str]]]) -> Count:
    failures, refused = [], 0
    for number in range(cases):
        with box() as where:
            code, wrong = one(where)
            refused += code == 2
            failures += [f"case {number}: {fault}" for fault in wrong]
    return Count(kind, cases, failures, f"{refused} refused, the others right")


def sampled(
    draw: random.Random, damage: Callable[[random.Random, Path], None], model: Path, where: Box
) -> tuple[int | None, list[str]]:
    """Sample from a damaged checkpoint."""
    broken = subjects.copied(model, where.given / "run")
    damage(draw, broken)
    outcome, wrong = tried(
        subjects.sampling(broken, where.out, 2), where, seconds=120, correct=lambda: right(where.out)
    )
    return outcome.code, wrong


def right(out: Path) -> str | None:
    """Whether two whole images are there, of whatever size the checkpoint now says."""
    from PIL import Image

    for i in range(2):
        with Image.open(out / f"{i:06d}.png") as image:
            image.load()
    return None


def resumed(draw: random.Random, model: Path, where: Box) -> tuple[int | None, list[str]]:
    """Go on with a run of which a file of the state is damaged."""
    subjects.copied(model, where.out)
    files = sorted(p for p in (where.out / "state").rglob("*") if p.is_file() and p.name != "lock")
    file = draw.choice([*files, where.out / "metrics.jsonl", where.out / "train.yaml"])
    given = file.read_bytes()
    file.write_bytes(
        dumped(tree(draw, json.loads(given))).encode()
        if file.suffix == ".json" and draw.random() < 0.5
        else raw(draw, given)
    )
    outcome, wrong = tried(
        subjects.training(where.out, 5),
        where,
        seconds=120,
        keeps_out=True,
        correct=lambda: subjects.of_a_run(where.out),
    )
    return outcome.code, [f"{file.name}: {fault}" for fault in wrong]


def values(draw: random.Random, run: Path) -> None:
    file = run / "config.json"
    file.write_text(dumped(tree(draw, json.loads(file.read_text()))))


def damaged_text(draw: random.Random, run: Path) -> None:
    file = run / "config.json"
    if draw.random() < 0.5:
        file.write_bytes(raw(draw, file.read_bytes()))
    else:
        file.write_text(text(draw, file.read_text()), encoding="utf-8", errors="surrogatepass")


def foreign(draw: random.Random, run: Path) -> None:
    file = run / "config.json"
    config = json.loads(file.read_text())
    arguments = config["network"]["arguments"]
    what = draw.randrange(4)
    if what == 0:
        config["network"] = {"class": draw.choice(FOREIGN), "arguments": {"command": "touch canary"}}
    elif what == 1:
        key = draw.choice([k for k, v in arguments.items() if isinstance(v, int | list) and not isinstance(v, bool)])
        huge = draw.choice((20_000, 40_000, 10**6, 2**31, 10**12, 2**63, 10**20))
        arguments[key] = [huge] * len(arguments[key]) if isinstance(arguments[key], list) else huge
    elif what == 2:
        section = draw.choice(("schedule", "parameterization", "image"))
        key = draw.choice(list(config[section]))
        config[section][key] = draw.choice((10**7, 2**63, 10**12, -1, "../../../etc/passwd", [10**6, 10**6], [3, 5]))
    else:
        place = draw.choice(("layers", "arguments"))
        inner = {"class": draw.choice(FOREIGN), "arguments": {"command": "touch canary"}}
        config["network"].setdefault(place, {})[draw.choice(("conv_out", "conv_in", "../../x", "", "forward"))] = inner
    file.write_text(dumped(config))


def weights(draw: random.Random, run: Path) -> None:
    file = run / "model.safetensors"
    given = file.read_bytes()
    what = draw.randrange(4)
    if what == 0:
        # the header's length, and what it says
        length = struct.unpack("<Q", given[:8])[0]
        given = struct.pack("<Q", draw.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))) + given[8:]
        file.write_bytes(given)
    elif what == 1:
        length = struct.unpack("<Q", given[:8])[0]
        header = text(draw, given[8 : 8 + length].decode()).encode("utf-8", "surrogatepass")
        file.write_bytes(struct.pack("<Q", len(header)) + header + given[8 + length :])
    else:
        file.write_bytes(raw(draw, given))
    if draw.random() < 0.1:
        file.unlink()
        if draw.random() < 0.5:
            file.mkdir()


def tensors(draw: random.Random, run: Path) -> None:
    file = run / "model.safetensors"
    found = load_file(file)
    name = draw.choice(sorted(found))
    tensor = found[name]
    what = draw.randrange(8)
    if what == 0:
        found[name] = torch.full_like(tensor, draw.choice((float("nan"), float("inf"), -float("inf"))))
    elif what == 1:
        tensor.view(-1)[draw.randrange(tensor.numel())] = float("nan")
    elif what == 2:
        found[name] = tensor.new_zeros(draw.choice(((), (0,), (1,), (*tensor.shape, 1), (3, 5), (10_000, 10_000)[:1])))
    elif what == 3:
        del found[name]
    elif what == 4:
        found[draw.choice(("extra", "network.../../x", "a" * 500, ""))] = torch.zeros(3)
    elif what == 5:
        kind = draw.choice((torch.int64, torch.bool, torch.uint8, torch.float64, torch.float16, torch.float8_e4m3fn))
        found[name] = tensor.to(kind)
    elif what == 6:
        found[name] = tensor * draw.choice((1e38, 1e20, -1e30))
    else:
        found = {k: v.transpose(0, 1).contiguous() if v.ndim > 1 else v for k, v in found.items()}
    save_file(found, file)
