"""Compare dual output with ε-prediction on real digits, in a few minutes: train, sample, score, analyze, report.

Trains a dual-output model and an ε model with the same network, data order and budget; makes images with both in 5, 10
and 20 steps of DDIM and DPM-Solver++ at two spacings; scores them against real digits; and writes a report.
Given again, an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualout.cli import console
from dualout.cli._workers import Worker, watch
from dualout.cli.options import out_directory, parse
from dualout.errors import InputError
from dualout.files import explained, read_json, write_text
from dualout.machine import cores

if TYPE_CHECKING:
    import numpy as np

MARKER = "demo.json"
MODELS = ("dual", "eps")
SAMPLERS, SPACINGS, STEPS = ("ddim", "dpmsolver"), ("trailing", "linspace"), (5, 10, 20)
BATCH = 64
NETWORK = "tiny"
LOOK = ("--images", "295", "--repeats", "2")
"""How the models are looked into: at all digits that training does not see."""
_SHOWN = (("ddim", "trailing", 5), ("ddim", "trailing", 20), ("dpmsolver", "trailing", 5))
PICTURES = 32
"""Images of each sample grid."""
_LOG_SECONDS = 15.0


@dataclass(kw_only=True)
class Options:
    """The options of ``dualout demo``."""

    out: str = "runs/demo"
    """Output directory: new, empty, or of a demo that was interrupted"""
    steps: int = 1800
    """Training steps of each model, of 64 images each"""
    images: int = 1000
    """How many images are made for each score"""
    seed: int = 0
    """Seed of the initial weights, the order of the data and the noise"""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"--steps is 1 or more; got {self.steps}")
        if self.images < 4:
            raise InputError(f"--images is 4 or more, since scores need some; got {self.images}")


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "demo", arguments, __doc__)
    out = out_directory(options.out, holds="the models, scores and figures of a demo", marker=MARKER)
    _begin(options, out)

    from dualout.training.interrupt import interruptible

    began = time.monotonic()
    models = [Model(name, out, options) for name in MODELS]
    together = min(len(models), cores())
    console.say(
        f"Two models of 8×8 digits, dual and eps: the same network, data order and {options.steps} steps of {BATCH} "
        f"images; {together} at a time on {cores()} processor{'s' if cores() > 1 else ''}"
    )
    stopped: list[bool] = []
    with interruptible(lambda: stopped.append(True)) as asked:
        _watch(models, together, stopped)
    if stopped:
        console.say("stopped: the same command goes on from there")
        return asked.code
    console.say("drawing")
    rows = _results(models, out)
    page = _report(models, rows, options, out)
    _print_table(rows)
    console.wrote(out / "results.json", f"{len(rows)} scores with their protocols")
    console.wrote(page, "open it in a browser: figures, samples, and what they say")
    console.say(f"took {console.duration(time.monotonic() - began)}")
    return None


def _begin(options: Options, out: Path) -> None:
    """Write down what is asked for; go on only with the same."""
    wanted = {k: v for k, v in asdict(options).items() if k != "out"}
    file = out / MARKER
    if file.exists():
        before = read_json(file, then=f"; remove {out}")
        changed = [f"--{k} {before.get(k)}, now {v}" for k, v in wanted.items() if before.get(k) != v]
        if changed:
            raise InputError(f"--out {out} is a demo with other settings ({'; '.join(changed)}); give another --out")
        return
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(wanted) + "\n")


class Model:
    """One of the two, and how far it is.

    Work is counted in images that the network looks at; a training step's image counts for three.
    """

    def __init__(self, name: str, out: Path, options: Options) -> None:
        self.name, self.path, self.options = name, out / name, options
        path = str(self.path)
        seed = ["--seed", str(options.seed)]
        self.train = [
            "train", "--data", "digits", "--parameterization", name, "--network", NETWORK, "--precision", "fp32",
            "--steps", str(options.steps), "--batch_size", str(BATCH), "--ema", "0.998", *seed,
            "--log_every", "10", "--checkpoint_every", "200", "--sample_every", "0", "--out", path,
        ]  # fmt: skip
        self.evaluate = [
            "evaluate", path, "--data", "digits", "--split", "all", "--images", str(options.images),
            "--samplers", ",".join(SAMPLERS), "--spacings", ",".join(SPACINGS),
            "--steps", ",".join(map(str, STEPS)), "--features", "digits",
        ]  # fmt: skip
        self.analyze = ["analyze", path, "--data", "digits", *LOOK, *seed]
        commands = [self.train, self.evaluate] + ([] if self.looked_into else [self.analyze])
        self.worker = Worker(name, commands, out / f"{name}.log", _threads())
        self.work = (
            3 * BATCH * options.steps,
            options.images * len(SAMPLERS) * len(SPACINGS) * sum(STEPS),
            40_000,
        )

    def progress(self) -> tuple[float, str]:
        """How much work is done, and what is being done."""
        training, scoring, looking = self.work
        step = _last_step(self.path / "metrics.jsonl")
        if step < self.options.steps:
            return 3 * BATCH * step, f"training, step {step} of {self.options.steps}"
        rows = _rows(self.path / "evaluation" / "results.json")
        all_rows = len(SAMPLERS) * len(SPACINGS) * len(STEPS)
        if len(rows) < all_rows:
            done = sum(r["images"] * r["nfe"] for r in rows)
            return training + done, f"sampling and scoring, {len(rows)} of {all_rows}"
        done = training + scoring
        return (done + looking, "done") if self.looked_into else (done, "looking inside")

    @property
    def looked_into(self) -> bool:
        """Whether there is an analysis, which comes last."""
        return (self.path / "analysis" / "analysis.json").exists()


def _threads() -> int:
    return max(1, cores() // len(MODELS))


def _last_step(file: Path) -> int:
    """The step of the last whole line of metrics.jsonl."""
    if not file.exists():
        return 0
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        lines = stream.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def _rows(file: Path) -> list[dict[str, Any]]:
    return read_json(file, list) if file.exists() else []


def _watch(models: Sequence[Model], together: int, stopped: Sequence[bool]) -> None:
    began = logged = time.monotonic()
    before = sum(m.progress()[0] for m in models)
    total = sum(sum(m.work) for m in models)
    with console.progress("doing") as bar:
        tasks = [bar.add_task(m.name, total=sum(m.work), doing="") for m in models]
        whole = bar.add_task("both", total=total, doing="")
        for _ in watch([m.worker for m in models], together, lambda: bool(stopped)):
            states = [m.progress() for m in models]
            done = sum(work for work, _ in states)
            passed = time.monotonic() - began
            left = f"about {console.duration(passed / (done - before) * (total - done))} left" if done > before else "…"
            for task, (work, doing) in zip(tasks, states, strict=True):
                bar.update(task, completed=work, doing=doing)
            bar.update(whole, completed=done, doing=left)
            if bar.disable and time.monotonic() - logged >= _LOG_SECONDS:
                logged = time.monotonic()
                each = "; ".join(f"{m.name}: {doing}" for m, (_, doing) in zip(models, states, strict=True))
                console.say(f"{each}; {left}")


def _results(models: Sequence[Model], out: Path) -> list[dict[str, Any]]:
    """The scores of both, in one results.json and results.csv."""
    from dualout.analysis.tables import csv_text, json_text

    rows = [row for m in models for row in _rows(m.path / "evaluation" / "results.json")]
    write_text(out / "results.json", json_text(rows))
    flat = [{k: v for k, v in row.items() if k != "protocol"} for row in rows]
    write_text(out / "results.csv", csv_text(flat))
    return rows


def _report(models: Sequence[Model], rows: Sequence[dict[str, Any]], options: Options, out: Path) -> Path:
    from dualout.analysis.report import Material, report
    from dualout.cli._collect import collect

    found, _ = collect([str(m.path) for m in models])
    command = ["dualout", "demo", "--out", options.out, "--steps", str(options.steps)]
    command += ["--images", str(options.images), "--seed", str(options.seed)]
    material = Material(
        found,
        rows,
        _samples(models, options.seed),
        "Each pair starts from the same noise; the last are real.",
        {
            "scores": _lines(m.evaluate for m in models),
            "analysis": _lines(m.analyze for m in models),
            "samples": _lines(_sample_commands(models, options.seed)),
            "training": _lines(m.train for m in models),
            "report": shlex.join(command),
        },
    )
    lead = (
        f"Two models of handwritten digits (scikit-learn's, 8×8): the same network, data order and budget "
        f"({options.steps} steps of {BATCH} images, seed {options.seed}); one predicts the noise (eps), the other the "
        f"noise, the image and how to blend them (dual). Scores compare {options.images} made images with all 1,797 "
        "real ones."
    )
    page = out / "report.html"
    write_text(page, report(material, "Dual output against ε, on digits", lead))
    return page


def _lines(commands: Any) -> str:
    return "\n".join(shlex.join(["dualout", *c]) for c in commands)


def _sample_commands(models: Sequence[Model], seed: int) -> list[list[str]]:
    commands = []
    for (spec, spacing, steps), m in product(_SHOWN, models):
        sampler = ["--sampler", spec, "--spacing", spacing, "--steps", str(steps)]
        images = ["--images", str(PICTURES), "--seed", str(seed), "--out", f"out/{m.name}-{spec}-{steps}"]
        commands.append(["sample", str(m.path), *sampler, *images])
    return commands


def _samples(models: Sequence[Model], seed: int) -> dict[str, np.ndarray]:
    """Images of both models from the same seeds, and real ones."""
    from dualout import data
    from dualout.data.dataset import evenly
    from dualout.evaluation.model import Model as Loaded
    from dualout.evaluation.sampling import Sampling, build_sampler

    found = {}
    loaded = {m.name: Loaded.load(m.path) for m in models}
    for spec, spacing, steps in _SHOWN:
        for name, model in loaded.items():
            sampling = Sampling(model, build_sampler(spec, steps, spacing), seed=seed)
            images = next(sampling.batches(PICTURES, PICTURES))
            found[f"{name}, {spec}, {spacing} spacing, {steps} steps"] = images.permute(0, 2, 3, 1).numpy()
    real = data.load("digits", split="test")
    return found | {"real digits": real.batch(evenly(len(real), PICTURES)).permute(0, 2, 3, 1).numpy()}


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    from dualout.analysis import reading

    ratio = reading.ratio_name(*MODELS)
    table = []
    for row in reading.cells(reading.named(rows)):
        texts = {m: reading.spread_text(s) for m, s in row["spreads"].items()}
        table.append(row | texts | ({ratio: f"{row[ratio]:.2f}"} if ratio in row else {}))
    columns = [*reading.CELL, *MODELS, ratio]
    console.table(table, columns, "Fréchet distance in the features of a digit classifier (lower is better)")
    for sentence in reading.compare(rows):
        console.out.print(sentence.replace("**", ""))
