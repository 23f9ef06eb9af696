"""Whether preparing batches could ever hold up training."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import subjects
from bench_training import ours
from PIL import Image
from report import Goal, Section, table
from timing import Spread, digits, interleaved, ratio

from dualout import data
from dualout.data.dataset import Dataset
from dualout.training.batches import Batches
from dualout.training.config import TrainConfig

QUESTION = """## Data: images a second, of the loader alone and of training

CPU time of one thread, batches of 64. `loader` gives mirrored float32 images in [−1, 1], in the order that the seed
says; `batches` adds what training draws with them, a time step and the noise of each image from its own seed. Files are
decoded once, into a memory-mapped cache of bytes that later runs open in no time; `decoding` is that first pass."""

BATCH = 64


def measure(full: bool, peers: list[ModuleType]) -> Section:
    section, rounds, each = Section(QUESTION), 15 if full else 5, 50
    with tempfile.TemporaryDirectory() as folder:
        files = _files(Path(folder) / "files", 4000 if full else 1000)
        cache = str(Path(folder) / "cache")
        decoding = interleaved({"decoding": lambda: data.load(f"folder:{files}", cache=cache)}, 1, warmup=0)
        mapped = data.load(f"folder:{files}", cache=cache)
        memory = subjects.dataset()
        cases: dict[str, Callable[[], Any]] = {
            "loader, from memory": _turn(_loader(memory), each),
            "loader, from the cache of a folder": _turn(_loader(mapped), each),
            "batches, from memory": _turn(_batches(memory), each),
            "opening the cache again": lambda: data.load(f"folder:{files}", cache=cache),
        }
        times = interleaved(cases, rounds)
        opening = times.pop("opening the cache again")
        cost = {name: [t / (each * BATCH) for t in values] for name, values in times.items()}
        steps = interleaved({"S": ours(subjects.small(), BATCH), "tiny": _tiny()}, 5 if full else 2)
        count = len(mapped)
    cost["training S (1.7 million parameters, 3×32×32)"] = [t / BATCH for t in steps["S"]]
    cost["training tiny (digits, 1×8×8), the fastest there is"] = [t / BATCH for t in steps["tiny"]]
    section.times = {"seconds an image": cost, "seconds": {"decoding": decoding["decoding"], "opening": opening}}
    same = {"training": cost["training S (1.7 million parameters, 3×32×32)"]}
    for name in ("loader, from the cache of a folder", "batches, from memory"):
        rounds_ = min(len(cost[name]), len(same["training"]))
        both = {"loader": cost[name][:rounds_], "training": same["training"][:rounds_]}
        section.goals.append(
            Goal(f"{name}: its rate / that of training S", ratio(both, "training", "loader"), 3, least=True)
        )
    rows = [
        [name, digits(1 / statistics.median(values)), Spread.of(values).text(1e-6)]
        for name, values in sorted(cost.items(), key=lambda item: statistics.median(item[1]))
    ]
    rows.append(["decoding 32×32 PNG files", digits(count / decoding["decoding"][0]), ""])
    section.tables = [
        table(["", "images a second", "µs an image"], rows),
        f"Opening the cache of {count} files again: {Spread.of(opening).text(1e-3)} ms.",
    ]
    return section


def _files(folder: Path, count: int) -> Path:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:05}.png")
    return folder


def _turn(batches: Iterator[Any], count: int) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(count):
            next(batches)

    return turn


def _loader(dataset: Dataset) -> Iterator[Any]:
    return data.Loader(dataset, BATCH, flip=True).batches(prefetch=0)


def _batches(dataset: Dataset) -> Iterator[Any]:
    return Batches(dataset, TrainConfig(steps=10**9, batch_size=BATCH, flip=True), 1000).after(0)


def _tiny() -> Callable[[], Any]:
    from dualout.networks import build

    return ours(build("tiny", 1, 8, 3).to(subjects.PLACE), BATCH, images=data.load("digits"), parameterization="dual")
