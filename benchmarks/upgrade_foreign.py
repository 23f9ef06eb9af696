"""Upgrades a trained ε model in every way and for several budgets, beside the control, and measures what came out.

    python benchmarks/upgrade_foreign.py ddpm_fashion.pt --adapter mnist-ddpm --data idx:data/fashion-mnist \
        --seen 1200000 --shares 0.01,0.02 --scopes closed,last,all,control --out runs/upgrade-fashion

A budget is a share of the images that the original saw (--seen, which is often a guess). The control is the original
trained on, with the same images, batches, learning rate, warm-up and averaging. Everything is judged by images that
neither the original's training nor the upgrade has seen (the test split), and by Fréchet distances of samples from the
same noise. What is done is not done again: the same command goes on. Writes errors.csv (model, t, error of x0) and
models.csv (one row a model), and prints both as Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import table

from dualout import data
from dualout.analysis.tables import csv_text
from dualout.checkpoint import write_text
from dualout.cli.main import main as dualout
from dualout.data.dataset import Dataset
from dualout.denoiser import Denoiser
from dualout.networks import foreign
from dualout.randomness import mix, noise
from dualout.samplers import Sampler
from dualout.training import opening
from dualout.training.run import Run
from dualout.training.upgrade_config import UpgradeConfig
from dualout.training.upgrade_run import Upgrade, read_record

ORIGINAL, SCRATCH = "original", "scratch"
LOOK = "ddpm:steps=100:clip=null"


@dataclass(frozen=True)
class Plan:
    """One model to make: how, and for which share of the budget; the closed form has no budget."""

    scope: str
    share: float | None
    steps: int

    @property
    def name(self) -> str:
        """As a directory, and in tables."""
        return self.scope if self.share is None else f"{self.scope}-{100 * self.share:g}%"


def plans(o: argparse.Namespace) -> list[Plan]:
    """Everything that is asked for, the cheap first."""
    found = [Plan("closed", None, 0)] if "closed" in o.scopes else []
    for share in o.shares:
        steps = max(1, round(share * o.seen / o.batch_size))
        found += [Plan(scope, share, steps) for scope in o.scopes if scope != "closed"]
    return found


def config_of(o: argparse.Namespace, plan: Plan, out: Path) -> UpgradeConfig:
    """The settings of an upgrade; those of a control are its fine-tuning's."""
    own = {"closed": "closed", "control": "all"}
    return UpgradeConfig(
        source=str(o.source),
        adapter=o.adapter,
        data=o.data,
        size=o.size,
        scope=own.get(plan.scope, plan.scope),
        images=o.solve_images,
        steps=max(plan.steps, 1),
        batch_size=o.batch_size,
        lr=o.lr,
        # a short budget is not spent on warming up
        warmup=min(50, plan.steps // 4),
        precision="fp32",
        check_every=max(10, -(-plan.steps // 2)),
        seed=o.seed,
        device="cpu",
        out=str(out),
    )


def make(o: argparse.Namespace, plan: Plan, dataset: Dataset) -> float:
    """Make one model, unless it is there; returns the seconds it took, without the looks at held-out images."""
    out = o.out / plan.name
    if plan.scope == "control":
        return control(config_of(o, plan, out), dataset, out)
    with Upgrade(config_of(o, plan, out)) as work:
        if not work.finished:
            for check in work:
                told = f"{plan.name} {check.stage} {check.step}, {check.share:.0%} of the way: {check.score:+.3f}"
                print(told, f"worse in {check.worse}", "kept" if check.kept else "not kept", flush=True)
    record = read_record(out)
    assert record is not None
    return record["checks"][-1]["seconds"]


def control(config: UpgradeConfig, dataset: Dataset, out: Path) -> float:
    """Train the original on, on the images that an upgrade is trained on."""
    told = out / "seconds.json"
    if told.exists():
        return json.loads(told.read_text())
    order = opening.shuffled(len(dataset), config.seed)
    rest = order[min(config.held_out, len(order) // 4) :]
    began = time.perf_counter()
    source = foreign.load(config.source, config.adapter).train()
    with Run(config.training(), denoiser=source, dataset=dataset.select(rest)) as run:
        for _ in run:
            pass
        run.denoiser.save_pretrained(out, image=image_of(dataset))
    seconds = time.perf_counter() - began
    told.write_text(json.dumps(seconds))
    return seconds


def image_of(dataset: Dataset) -> dict[str, Any]:
    """The shape of the images, as checkpoints have it."""
    return {"channels": dataset.channels, "size": list(dataset.size)}


@torch.no_grad()
def errors(denoiser: Denoiser, test: Dataset, o: argparse.Namespace) -> torch.Tensor:
    """|x0 − p.x0|² of unseen images in each bin of t, (bins, images), x0 not clipped."""
    rows = opening.shuffled(len(test), 0)[: o.judged]
    stream = opening.Stream(test, rows, denoiser.schedule.steps, o.bins, 12345, torch.device("cpu"))
    found: list[list[torch.Tensor]] = [[] for _ in range(o.bins)]
    for batch in stream:
        level = denoiser.schedule.level(batch.t).like(batch.x0)
        p = denoiser(level.alpha * batch.x0 + level.sigma * batch.noise, batch.t, **batch.conditions)
        found[batch.bin].append((p.x0.double() - batch.x0).square().flatten(1).mean(1))
    return torch.stack([torch.cat(row) for row in found])


@torch.no_grad()
def look(denoiser: Denoiser, shape: tuple[int, ...], images: int = 32) -> dict[str, float]:
    """The range of ancestral samples in 100 steps that are never clipped."""
    sampler = Sampler.parse(LOOK)
    first = noise(mix(0, np.arange(images)), shape)
    x = sampler.sample(denoiser, first, draw=lambda k: noise(mix(1, k, np.arange(images)), shape))
    return {"least": float(x.min()), "largest": float(x.max()), "beyond": float((x.abs() > 1.1).double().mean())}


def judged(o: argparse.Namespace, name: str, path: Path, test: Dataset) -> dict[str, Any]:
    """Errors and range of a model, from the file where they were kept, or measured."""
    kept = o.out / "judged" / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    denoiser = Denoiser.from_pretrained(path).eval()
    found = {"errors": errors(denoiser, test, o).tolist()} | look(denoiser, (test.channels, *test.size))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


def score(o: argparse.Namespace, paths: list[Path]) -> list[dict[str, Any]]:
    """Fréchet distances of all models, by dualout evaluate."""
    for sampler, steps in (("ddim", o.steps), ("ddim:clip=null", o.unclipped)):
        if steps:
            told = {
                "data": o.data, "split": o.split, "images": o.images, "samplers": sampler, "steps": steps,
                "features": o.features, "device": "cpu", "out": o.out / "scores",
            }  # fmt: skip
            flags = [f"--{name}={value}" for name, value in told.items()]
            dualout(["evaluate", ",".join(map(str, paths)), *flags])
    return json.loads((o.out / "scores" / "results.json").read_text())


def summary(
    o: argparse.Namespace, name: str, path: Path, before: torch.Tensor, found: dict[str, Any]
) -> dict[str, Any]:
    """What one model did to the errors: the worst bin is told with its standard error."""
    now = torch.tensor(found["errors"], dtype=torch.float64)
    more = now - before
    change = (now.mean(1) / before.mean(1)).log()
    worst = int(change.argmax())
    known = read_record(path)
    row = {
        "model": name,
        "x0 error": math.exp(change.mean()),
        "worst bin": math.exp(change[worst]),
        "worst t": worst * 1000 // o.bins,
        "worse bins": len(opening.worse(now, before)),
        "worst z": float(more[worst].mean() / opening.standard_error(more)[worst].clamp(min=1e-300)),
        "open": sum(r["open"] for r in known["table"]) if known else None,
    }
    return row | {k: found[k] for k in ("least", "largest", "beyond")}


def markdown(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """A table."""

    def cell(v: Any) -> str:
        return "" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v)

    return table(columns, [[cell(r.get(c)) for c in columns] for r in rows])


def parsed() -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("source", help="a file of weights, or a checkpoint")
    options.add_argument("--adapter", help="of a file of weights, as for dualout upgrade")
    options.add_argument("--data", default="digits")
    options.add_argument("--size", type=int, help="to make the images")
    options.add_argument("--split", default="test", help="of the data, that samples are compared with")
    options.add_argument("--seen", type=int, required=True, help="images that the original was trained on, in all")
    options.add_argument("--shares", type=lambda v: [float(s) for s in v.split(",")], default=[0.01, 0.02, 0.1, 0.3])
    options.add_argument("--scopes", type=lambda v: v.split(","), default=["closed", "rows", "last", "all", "control"])
    options.add_argument("--scratch", type=Path, help="a dual model trained from scratch, for the gain recovered")
    options.add_argument("--batch_size", type=int, default=64)
    options.add_argument("--lr", type=float, default=5e-4)
    options.add_argument("--solve_images", type=int, default=2000, help="in the pass of the least squares")
    options.add_argument("--judged", type=int, default=256, help="test images that give the errors")
    options.add_argument("--bins", type=int, default=20)
    options.add_argument("--images", type=int, default=500, help="samples for the Fréchet distances")
    options.add_argument("--steps", default="5,10,20,50", help="of DDIM, x0 clipped")
    options.add_argument("--unclipped", default="10", help="steps of DDIM, x0 not clipped")
    options.add_argument("--features", default="pixels")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, required=True)
    return options.parse_args()


def main() -> None:
    o = parsed()
    torch.set_num_threads(1)
    dataset, test = (data.load(o.data, split=s, size=o.size) for s in ("train", "test"))
    paths, seconds = {ORIGINAL: o.out / ORIGINAL}, {}
    if not (paths[ORIGINAL] / "config.json").exists():
        foreign.load(o.source, o.adapter).save_pretrained(paths[ORIGINAL], image=image_of(dataset))
    if o.scratch:
        paths[SCRATCH] = o.scratch
    for plan in plans(o):
        seconds[plan.name] = make(o, plan, dataset)
        paths[plan.name] = o.out / plan.name
    found = {name: judged(o, name, path, test) for name, path in paths.items()}
    before = torch.tensor(found[ORIGINAL]["errors"], dtype=torch.float64)
    rows = [summary(o, name, path, before, found[name]) for name, path in paths.items()]
    for row in rows:
        row["minutes"] = seconds.get(row["model"], 0) / 60 or None
    names, columns = {str(path): name for name, path in paths.items()}, []
    by_name = {row["model"]: row for row in rows}
    for s in score(o, list(paths.values())):
        column = f"{'un' if 'null' in s['sampler'] else ''}clipped {s['features'].split(':')[0]} {s['steps']}"
        columns.append(column)
        if s["run"] in names:
            by_name[names[s["run"]]][column] = s["fd"]
    columns = list(dict.fromkeys(columns))
    if o.scratch:
        for row in rows:
            for c in columns:
                first, last = rows[0][c], by_name[SCRATCH][c]
                row[f"gain {c}"] = (first - row[c]) / (first - last)
    write_text(o.out / "models.csv", csv_text(rows))
    edges = opening.bin_edges(1000, o.bins)
    by_bin = [
        {"t": f"{edges[b]}–{edges[b + 1] - 1}"} | {n: float(np.mean(f["errors"][b])) for n, f in found.items()}
        for b in range(o.bins)
    ]
    write_text(o.out / "errors.csv", csv_text(by_bin))
    print(markdown(rows, ["model", "x0 error", "worst bin", "worst t", "worst z", "worse bins", "open", "minutes"]))
    print(markdown(rows, ["model", "least", "largest", "beyond"]))
    print(markdown(rows, ["model", *columns]))
    if o.scratch:
        print(markdown(rows, ["model", *(f"gain {c}" for c in columns)]))


if __name__ == "__main__":
    main()
