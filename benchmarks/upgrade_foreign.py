"""Upgrades a trained ε model in every way and for several budgets, beside the control, and measures what came out.

    python benchmarks/upgrade_foreign.py ddpm_fashion.pt --adapter mnist-ddpm --data idx:data/fashion-mnist \
        --seen 1200000 --shares 0.01,0.02 --scopes closed,last,all,control --out runs/upgrade-fashion

A budget is a share of the images that the original saw (--seen, which is often a guess). The control is the original
trained on, with the same images, batches, learning rate, warm-up and averaging. Everything is judged by images that
neither the original's training nor the upgrade has seen (the test split), and by Fréchet distances of samples from the
same noise. What is done is not done again: the same command goes on. Several seeds, say of originals and models from
scratch that were trained with each, make a mean ± standard deviation:

    python benchmarks/upgrade_foreign.py 'runs/eps-s{seed}' --scratch 'runs/dual-s{seed}' --seeds 0,1,2 \
        --seen 128000 --split all --features digits,pixels --out runs/upgrade-digits

Writes models.csv (one row a model and seed) and errors.csv (seed, t, the error of x0 of each model), and prints both as
Markdown tables. Minutes are those of processor time, looks at held-out images included; with --device cuda they are
the clock's.
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
from dualout.cli.main import main as dualout
from dualout.data.dataset import Dataset
from dualout.denoiser import Denoiser
from dualout.files import write_text
from dualout.networks import foreign
from dualout.networks.device import device as place
from dualout.randomness import mix, noise
from dualout.samplers import Sampler
from dualout.training import noised, opening
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
        # by gradients alone, to be compared with the closed form
        start="zero" if plan.scope == "rows" else "closed",
        images=o.solve_images,
        steps=max(plan.steps, 1),
        batch_size=o.batch_size,
        lr=o.rows_lr if plan.scope == "rows" else o.lr,
        # a short budget is not spent on warming up
        warmup=min(50, plan.steps // 4),
        precision="fp32",
        check_every=max(10, -(-plan.steps // 2)),
        tolerance=o.tolerance,
        seed=o.seed,
        device=str(o.device),
        out=str(out),
    )


def make(o: argparse.Namespace, plan: Plan, dataset: Dataset) -> float:
    """Make one model, unless it is there; returns the minutes it took, on a processor of its time."""
    out, told = o.out / plan.name, o.out / "minutes" / f"{plan.name}.json"
    if told.exists():
        return json.loads(told.read_text())
    clock = time.process_time if o.device.type == "cpu" else time.perf_counter
    began = clock()
    if plan.scope == "control":
        control(config_of(o, plan, out), dataset, out)
    else:
        with Upgrade(config_of(o, plan, out)) as work:
            for check in work if not work.finished else ():
                how = f"{plan.name} {check.stage} {check.step}: {check.score:+.3f}"
                print(how, f"worse in {check.worse}", "kept" if check.kept else "not kept", flush=True)
    minutes = (clock() - began) / 60
    print(f"{plan.name}: {minutes:.2f} minutes", flush=True)
    told.parent.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(minutes))
    return minutes


def control(config: UpgradeConfig, dataset: Dataset, out: Path) -> None:
    """Train the original on, on the images that an upgrade is trained on."""
    order = noised.shuffled(len(dataset), config.seed)
    rest = order[min(config.held_out, len(order) // 4) :]
    source = foreign.load(config.source, config.adapter).train()
    with Run(config.training(), denoiser=source, dataset=dataset.select(rest)) as run:
        for step in run:
            if step.metrics is not None:
                print(f"control {step.index} of {config.steps}: loss {step.metrics['loss']:.4f}", flush=True)
        run.denoiser.save_pretrained(out, image=image_of(dataset))


def image_of(dataset: Dataset) -> dict[str, Any]:
    """The shape of the images, as checkpoints have it."""
    return {"channels": dataset.channels, "size": list(dataset.size)}


@torch.no_grad()
def errors(denoiser: Denoiser, test: Dataset, o: argparse.Namespace) -> torch.Tensor:
    """|x0 − p.x0|² of unseen images in each bin of t, (bins, images), x0 not clipped."""
    rows = noised.shuffled(len(test), 0)[: o.judged]
    stream = noised.Stream(test, rows, noised.Bins(denoiser.schedule.steps, o.bins, 12345), o.device)
    found: list[list[torch.Tensor]] = [[] for _ in range(o.bins)]
    for batch in stream:
        level = denoiser.schedule.level(batch.t).like(batch.x0)
        p = denoiser(level.alpha * batch.x0 + level.sigma * batch.noise, batch.t, **batch.conditions)
        found[batch.bin].append((p.x0.double() - batch.x0).square().flatten(1).mean(1).cpu())
    return torch.stack([torch.cat(row) for row in found])


@torch.no_grad()
def look(denoiser: Denoiser, shape: tuple[int, ...], device: torch.device, images: int = 32) -> dict[str, float]:
    """The range of ancestral samples in 100 steps that are never clipped."""
    sampler = Sampler.parse(LOOK)
    first = noise(mix(0, np.arange(images)), shape, device=device)
    x = sampler.sample(denoiser, first, draw=lambda k: noise(mix(1, k, np.arange(images)), shape, device=device))
    return {"least": float(x.min()), "largest": float(x.max()), "beyond": float((x.abs() > 1.1).double().mean())}


def judged(o: argparse.Namespace, name: str, path: Path, test: Dataset) -> dict[str, Any]:
    """Errors and range of a model, from the file where they were kept, or measured."""
    kept = o.out / "judged" / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    began = time.perf_counter()
    denoiser = Denoiser.from_pretrained(path).to(o.device).eval()
    found = {"errors": errors(denoiser, test, o).tolist()} | look(denoiser, (test.channels, *test.size), o.device)
    print(f"{name}: judged in {time.perf_counter() - began:.1f} s", flush=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


def score(o: argparse.Namespace, paths: list[Path]) -> list[dict[str, Any]]:
    """Fréchet distances of all models, by dualout evaluate."""
    asked = {
        "ddim": (o.steps, "trailing"),
        "ddim:clip=null": (o.unclipped, "trailing"),
        "dpmsolver": (o.dpm, "linspace"),
    }
    for sampler, (steps, spacing) in asked.items():
        if steps:
            told = {
                "data": o.data, "split": o.split, "images": o.images, "samplers": sampler, "spacings": spacing,
                "steps": steps, "features": o.features, "device": o.device, "out": o.out / "scores",
            }  # fmt: skip
            flags = [f"--{name}={value}" for name, value in told.items()]
            if dualout(["evaluate", ",".join(map(str, paths)), *flags]):
                raise SystemExit(f"scoring in {o.out} failed")
    return json.loads((o.out / "scores" / "results.json").read_text())


def column(score: dict[str, Any]) -> str:
    """The name of a Fréchet distance: sampler and steps, and of what features."""
    kind = {"ddim": "DDIM", "ddim:clip=null": "unclipped DDIM", "dpmsolver": "2M"}[score["sampler"]]
    return f"{score['features'].split(':')[0]}, {kind} {score['steps']}"


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
    """A line a model, several seeds as mean ± standard deviation."""

    def cell(values: list[Any]) -> str:
        values = [v for v in values if v is not None]
        spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
        return f"{np.mean(values):.3g}{spread}" if values else ""

    names = list(dict.fromkeys(r["model"] for r in rows))
    lines = [[n, *(cell([r.get(c) for r in rows if r["model"] == n]) for c in columns)] for n in names]
    return table(["model", *columns], lines)


def gains(rows: list[dict[str, Any]], columns: list[str]) -> list[dict[str, Any]]:
    """The share of what training from scratch gains, of the means over seeds; of x0 error in its logarithm."""

    def mean(model: str, c: str) -> float:
        values = [r[c] for r in rows if r["model"] == model]
        return float(np.mean(np.log(values) if c == "x0 error" else values))

    def share(model: str, c: str) -> float | None:
        whole = mean(ORIGINAL, c) - mean(SCRATCH, c)
        # where training from scratch gains nothing, there is nothing to share
        return (mean(ORIGINAL, c) - mean(model, c)) / whole if whole > 0 else None

    names = dict.fromkeys(r["model"] for r in rows)
    return [{"model": n} | {c: share(n, c) for c in columns} for n in names]


def parsed() -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("source", help="a file of weights, or a checkpoint; {seed} in it is each seed")
    options.add_argument("--adapter", help="of a file of weights, as for dualout upgrade")
    options.add_argument("--data", default="digits")
    options.add_argument("--size", type=int, help="to make the images")
    options.add_argument("--split", default="test", help="of the data, that samples are compared with")
    options.add_argument("--seen", type=int, required=True, help="images that the original was trained on, in all")
    options.add_argument("--shares", type=lambda v: [float(s) for s in v.split(",")], default=[0.01, 0.02, 0.1, 0.3])
    options.add_argument("--scopes", type=lambda v: v.split(","), default=["closed", "rows", "last", "all", "control"])
    options.add_argument("--scratch", help="a dual model trained from scratch, for the gain recovered; {seed} as well")
    options.add_argument("--batch_size", type=int, default=64)
    options.add_argument("--lr", type=float, default=5e-4)
    options.add_argument("--tolerance", type=float, default=UpgradeConfig.tolerance)
    options.add_argument("--rows_lr", type=float, default=3e-2, help="for the new rows by gradients, which start at 0")
    options.add_argument("--solve_images", type=int, default=2000, help="in the pass of the least squares")
    options.add_argument("--judged", type=int, default=256, help="test images that give the errors")
    options.add_argument("--bins", type=int, default=20)
    options.add_argument("--images", type=int, default=500, help="samples for the Fréchet distances")
    options.add_argument("--steps", default="5,10,20,50", help="of DDIM, x0 clipped")
    options.add_argument("--unclipped", default="10", help="steps of DDIM, x0 not clipped")
    options.add_argument("--dpm", default="", help="steps of DPM-Solver++ 2M at linspace spacing, x0 clipped")
    options.add_argument("--features", default="pixels")
    options.add_argument("--seeds", type=lambda v: [int(s) for s in v.split(",")], default=[0])
    options.add_argument("--device", type=place, default="cpu", help="cpu, cuda, cuda:1 …, or auto")
    options.add_argument("--out", type=Path, required=True)
    return options.parse_args()


def measured(o: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One seed: a row a model, and a row a bin of t."""
    dataset, test = (data.load(o.data, split=s, size=o.size) for s in ("train", "test"))
    paths, minutes = {ORIGINAL: o.out / ORIGINAL}, {}
    if not (paths[ORIGINAL] / "config.json").exists():
        foreign.load(o.source, o.adapter).save_pretrained(paths[ORIGINAL], image=image_of(dataset))
    if o.scratch:
        paths[SCRATCH] = Path(o.scratch)
    for plan in plans(o):
        minutes[plan.name] = make(o, plan, dataset)
        paths[plan.name] = o.out / plan.name
    found = {name: judged(o, name, path, test) for name, path in paths.items()}
    before = torch.tensor(found[ORIGINAL]["errors"], dtype=torch.float64)
    rows = {name: {"seed": o.seed} | summary(o, name, path, before, found[name]) for name, path in paths.items()}
    names = {str(path): name for name, path in paths.items()}
    for name, row in rows.items():
        row["minutes"] = minutes.get(name)
    for s in score(o, list(paths.values())):
        if s["run"] in names:
            rows[names[s["run"]]][column(s)] = s["fd"]
    edges = noised.bin_edges(1000, o.bins)
    by_bin = [
        {"seed": o.seed, "t": f"{edges[b]}–{edges[b + 1] - 1}"}
        | {n: float(np.mean(f["errors"][b])) for n, f in found.items()}
        for b in range(o.bins)
    ]
    return list(rows.values()), by_bin


def main() -> None:
    o = parsed()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    by_bin: list[dict[str, Any]] = []
    for seed in o.seeds:
        own = argparse.Namespace(**vars(o))
        own.seed, own.source = seed, o.source.format(seed=seed)
        own.scratch = o.scratch and o.scratch.format(seed=seed)
        own.out = o.out / f"seed-{seed}" if len(o.seeds) > 1 else o.out
        more, bins = measured(own)
        rows, by_bin = rows + more, by_bin + bins
    write_text(o.out / "models.csv", csv_text(rows))
    write_text(o.out / "errors.csv", csv_text(by_bin))
    distances = [c for c in rows[0] if ", " in c]
    print(markdown(rows, ["x0 error", "worst bin", "worst t", "worst z", "worse bins", "open", "minutes"]))
    print(markdown(rows, ["least", "largest", "beyond"]))
    print(markdown(rows, distances))
    if o.scratch:
        print(markdown(gains(rows, ["x0 error", *distances]), ["x0 error", *distances]))


if __name__ == "__main__":
    main()
