"""What each recipe would take on H100s, on paper: operations that are counted, at rates that are assumed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import yaml
from report import Section, table
from subjects import operations
from timing import digits
from torch import nn

from dualout.networks import build
from dualout.parameterizations import Parameterization

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

RATES = (100e12, 300e12)
"""FLOP/s of one GPU: 10% and 30% of an H100 SXM's 989e12 in dense bf16. UNets of 32×32 pixels are nearer the first,
because their layers are small; those of ADM nearer the second."""
MEASURED = 5350
"""Images a second of one H200 that trains recipes/cifar10.yaml's network, compiled: docs/results/performance.md."""
EIGHT = 0.9
"""The share of 8 GPUs' rate that is left when they exchange gradients."""
DOLLARS = 2.5
"""An hour of one GPU."""
SAMPLES, STEPS = 50_000, 20
"""The images of an FID, and the steps of each."""

QUESTION = f"""## Cost: what the recipes would take on H100s

**An estimate on paper, with one point that was measured.** Operations are counted exactly, by torch's counter on the
recipe's own network (a multiplication and an addition are two); a step of training is three forward passes of its
batch. Measured: cifar10's network trains {MEASURED:,} images a second on one H200 (bf16, compiled, batches of 128,
each step a CUDA graph), which is {{measured:.0f}} TFLOP/s. Assumed for the others: {RATES[0] / 1e12:.0f} to
{RATES[1] / 1e12:.0f} TFLOP/s a GPU (10% to 30% of its dense peak; small networks are nearer the first number),
{EIGHT:.0%} of eight times that on 8 GPUs, and {DOLLARS:.2f} dollars an hour and GPU. Memory is of weights, average,
gradients and the optimizer in float32, without activations. `dualout train --config RECIPE --dry_run` measures on your
machine."""


class Case(NamedTuple):
    """A recipe's network, and how long it is trained."""

    channels: int
    size: int
    classes: int | None


CASES = {
    "cifar10": Case(3, 32, None), "iddpm-cifar10": Case(3, 32, None), "celeba64": Case(3, 64, None),
    "imagenet64": Case(3, 64, 1000), "imagenet128": Case(3, 128, 1000),
    "fashion-mnist": Case(1, 28, None), "digits": Case(1, 8, None),
}  # fmt: skip


def measure(full: bool, peers: list[ModuleType]) -> Section:
    recipes = {name: yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8")) for name in CASES}
    counts = {name: counted(recipe, CASES[name]) for name, recipe in recipes.items()}
    rows = []
    for name, recipe in recipes.items():
        flop, parameters = counts[name]
        training = 3 * flop * recipe["batch_size"] * recipe["steps"]
        sampling = flop * SAMPLES * STEPS
        rows.append(
            [
                name, digits(parameters / 1e6), digits(flop / 1e9), f"{training:.1e}", _span(training, 1),
                _span(training, 8), _dollars(training), _span(sampling, 1), digits(20 * parameters / 2**30),
            ]
        )  # fmt: skip
    header = [
        "recipe", "million parameters", "GFLOP an image forward", "FLOP to train", "1 H100", "8 H100",
        "dollars (8 H100)", f"{SAMPLES:,} images, {STEPS} steps, 1 H100", "GiB a GPU",
    ]  # fmt: skip
    measured = 3 * counts["cifar10"][0] * MEASURED / 1e12
    return Section(QUESTION.format(measured=measured), tables=[table(header, rows)])


def counted(recipe: dict[str, Any], case: Case) -> tuple[int, int]:
    """FLOP of one image forward, and parameters; no number is computed."""
    classes = case.classes if recipe.get("conditional") else None
    channels = Parameterization.parse(recipe["parameterization"]).channels(case.channels)
    with torch.device("meta"):
        network: nn.Module = build(recipe["network"], case.channels, case.size, channels, classes=classes).eval()
        x = torch.empty(1, case.channels, case.size, case.size)
        told = {} if classes is None else {"class_labels": torch.zeros(1, dtype=torch.long)}
    return operations(network, x, **told), sum(p.numel() for p in network.parameters())


def _hours(flop: float, gpus: int, rate: float) -> float:
    return flop / (rate * gpus * (EIGHT if gpus > 1 else 1)) / 3600


def _span(flop: float, gpus: int) -> str:
    """From the fast rate to the slow."""
    fast, slow = (_hours(flop, gpus, rate) for rate in reversed(RATES))
    unit, name = (
        (24, "days") if fast > 48 else (1, "h") if fast > 1 else (1 / 60, "min") if fast > 1 / 60 else (1 / 3600, "s")
    )
    return f"{digits(fast / unit)}–{digits(slow / unit)} {name}"


def _dollars(flop: float) -> str:
    fast, slow = (8 * DOLLARS * _hours(flop, 8, rate) for rate in reversed(RATES))
    return "under 1" if slow < 1 else f"{fast:,.0f}–{slow:,.0f}"
