"""Dual output where the paper did not go: guidance by classes, latents without clipping, rectified flow.

    python benchmarks/beyond.py guidance latents flow --out runs/beyond

Each question is a recipe of recipes/beyond, trained once for each method and seed; what is done is not done again.
Samples of all methods come from the same noise, and are compared with all 1,797 digits in the features of the digit
classifier and in pixels. Writes QUESTION.csv, one row a score, and prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import table
from torch import Tensor

from dualout import data
from dualout.analysis.tables import csv_text
from dualout.cli.main import main as dualout
from dualout.data.pixels import to_model, to_uint8
from dualout.denoiser import Denoiser
from dualout.evaluation.features import Features
from dualout.evaluation.metrics import frechet
from dualout.evaluation.statistics import Statistics
from dualout.guidance import ClassifierFree
from dualout.randomness import noise
from dualout.samplers import Sampler

RECIPES = Path(__file__).parents[1] / "recipes" / "beyond"
CLASSES = 10


@dataclass(frozen=True)
class Question:
    """What is compared: methods by name, and how they are sampled."""

    methods: dict[str, str]
    samplers: tuple[str, ...] = ("ddim",)
    scales: tuple[float | None, ...] = (None,)
    interval: tuple[float, float] | None = None
    """The noise levels that are guided."""
    models: str | None = None
    """The question whose models these are."""


SINGLE = {"eps": "eps", "x0": "x0", "v": "velocity"}
DUAL = {"dual": "dual", "dual-blend": "dual-blend"}
QUESTIONS = {
    "guidance": Question({**SINGLE, **DUAL}, scales=(1.0, 1.5, 2.0, 3.0)),
    "interval": Question({**SINGLE, **DUAL}, scales=(1.5, 2.0, 3.0), interval=(0.2, 5.0), models="guidance"),
    "latents": Question({**SINGLE, **DUAL}, ("ddim:clip=null",)),
    # DDIM on these levels is Euler's method
    "flow": Question({"flow": "flow", "dual-ends": "dual:ratio=flow", "dual-blend": "dual-blend"}, ("ddim", "heun")),
}


class Patches:
    """Latents of 8×8 images: the first two principal components of their 2×2 patches, each scaled to variance 1."""

    def __init__(self, images: Tensor) -> None:
        flat = self._cut(images).flatten(0, 2)
        self.mean = flat.mean(0)
        variances, axes = torch.linalg.eigh((flat - self.mean).T.cov())
        self.axes, self.scale = axes[:, -2:].flip(1), variances[-2:].flip(0).sqrt()

    @staticmethod
    def _cut(images: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> (N, 4, 4, 4), a patch last."""
        return torch.nn.functional.pixel_unshuffle(images, 2).permute(0, 2, 3, 1)

    def encode(self, images: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> (N, 2, 4, 4)."""
        return ((self._cut(images) - self.mean) @ self.axes / self.scale).permute(0, 3, 1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """(N, 2, 4, 4) -> (N, 1, 8, 8) in [−1, 1]."""
        patches = (latents.permute(0, 2, 3, 1) * self.scale) @ self.axes.T + self.mean
        return torch.nn.functional.pixel_shuffle(patches.permute(0, 3, 1, 2), 2).clamp(-1, 1)


def distances(images: Tensor, real: dict[str, Statistics]) -> dict[str, float]:
    """Fréchet distances to the real images, by the name of the features."""
    found = {}
    for name, statistics in real.items():
        made = Statistics()
        made.add(Features.parse(name)(to_uint8(images)))
        found[name] = frechet(made, statistics)
    return found


@torch.no_grad()
def sampled(
    denoiser: Denoiser,
    sampler: Sampler,
    shape: tuple[int, ...],
    count: int,
    scale: float | None,
    interval: tuple[float, float] | None,
) -> Tensor:
    """Images from the seeds 0 … count − 1; with a scale, of all classes in turn."""
    told = {} if scale is None else {"class_labels": torch.arange(count) % CLASSES}
    model = denoiser if scale is None else ClassifierFree(denoiser, scale, interval=interval, class_labels=CLASSES)
    return sampler.sample(model, noise(range(count), shape), None, **told)


def trained(question: str, method: str, spec: str, seed: int, out: Path, updates: int | None) -> Denoiser:
    """A model, which is trained unless it is there."""
    path = out / f"{question}-{method}-{seed}"
    flags: dict[str, Any] = {
        "config": RECIPES / f"{question}.yaml",
        "parameterization": spec,
        "seed": seed,
        "out": path,
    }
    if question == "latents":
        flags["data"] = f"arrays:{out / 'latents.npy'}:latents=true"
    if updates is not None:
        flags["steps"] = updates
    if dualout(["train", *(f"--{name}={value}" for name, value in flags.items())]):
        raise SystemExit(f"training {path} failed")
    return Denoiser.from_pretrained(path)


def answered(o: argparse.Namespace, question: str) -> Iterator[dict[str, Any]]:
    """Train, sample and score: a row each."""
    out, count, steps = o.out, o.images, o.steps
    asked, everything = QUESTIONS[question], data.load("digits", split="all")
    pictures = everything.batch(np.arange(len(everything)))
    real = {name: Statistics() for name in ("digits", "pixels")}
    for name, statistics in real.items():
        statistics.add(Features.parse(name)(pictures))
    judge = Features.parse("digits").build()  # type: ignore[attr-defined]
    learned = data.load("digits", split="train")
    patches = Patches(to_model(learned.batch(np.arange(len(learned)))))
    if question == "latents":
        out.mkdir(parents=True, exist_ok=True)
        np.save(out / "latents.npy", patches.encode(to_model(learned.batch(np.arange(len(learned))))).numpy())
        kept = patches.decode(patches.encode(to_model(pictures)))
        yield {"method": "decoded data", "seed": 0, "sampler": "", "steps": 0, **distances(kept, real)}
    shape = (2, 4, 4) if question == "latents" else (1, 8, 8)
    for seed, (method, spec) in product(range(o.seeds), asked.methods.items()):
        denoiser = trained(asked.models or question, method, spec, seed, out, o.updates)
        grid = ((name, scale, k) for name in asked.samplers for scale in asked.scales for k in steps)
        for name, scale, k in grid:
            # Heun looks twice a step but at the last: the same number of calls, or one less
            taken = k // 2 + 1 if name == "heun" else k
            images = sampled(denoiser, Sampler.parse(name, steps=taken), shape, count, scale, asked.interval)
            if question == "latents":
                images = patches.decode(images)
            row = {"method": method, "seed": seed, "sampler": name, "steps": taken}
            if scale is not None:
                right = judge.logits(images).argmax(1) == torch.arange(count) % CLASSES
                row |= {"scale": scale, "agreement": float(right.float().mean())}
            yield row | distances(images, real)


def compared(rows: list[dict[str, Any]], value: str, digits: str = ".3g") -> str:
    """Methods across, everything else down; several seeds as mean ± half their range."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    cells: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for r in rows:
        cells.setdefault((r["sampler"], r["steps"], r.get("scale")), {}).setdefault(r["method"], []).append(r[value])

    def cell(values: list[float]) -> str:
        spread = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
        return f"{sum(values) / len(values):{digits}}{spread}" if values else ""

    lines = [
        [sampler, str(k), str(scale or ""), *(cell(by.get(m, [])) for m in methods)]
        for (sampler, k, scale), by in cells.items()
    ]
    return table([value, "steps", "scale", *methods], lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("questions", nargs="+", choices=list(QUESTIONS))
    options.add_argument("--images", type=int, default=500)
    options.add_argument("--steps", type=lambda v: [int(k) for k in v.split(",")], default=[5, 10, 20])
    options.add_argument("--updates", type=int, help="steps of training, by default the recipe's")
    options.add_argument("--seeds", type=int, default=1, help="models of each method")
    options.add_argument("--out", type=Path, required=True)
    o = options.parse_args()
    for question in o.questions:
        rows = list(answered(o, question))
        path = o.out / f"{question}.csv"
        path.write_text(csv_text(rows), encoding="utf-8")
        print(f"wrote {path}")
        for value in ("digits", "pixels", *(["agreement"] if "agreement" in rows[-1] else [])):
            print(compared(rows, value), "\n")


if __name__ == "__main__":
    main()
