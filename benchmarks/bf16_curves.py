"""Whether training in bfloat16 reaches float32's loss: digits, a narrow tiny network, over seeds.

    python benchmarks/bf16_curves.py --steps 2000 --seeds 3

Prints the mean loss of each tenth of the steps, by number format and seed, and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import dualout
from dualout import data
from dualout.networks import build
from dualout.training.config import TrainConfig
from dualout.training.learner import Learner
from dualout.training.loop import train


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--batch_size", type=int, default=32)
    options.add_argument("--network", default="tiny:width=8")
    given = options.parse_args()
    torch.set_num_threads(1)
    ends: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for seed in range(given.seeds):
        for precision, found in ends.items():
            tenths = curve(precision, seed, given.steps, given.batch_size, given.network)
            found.append(tenths[-1])
            print(precision, seed, *(f"{loss:.4f}" for loss in tenths), flush=True)
    for precision, found in ends.items():
        spread = f"{min(found):.4f} to {max(found):.4f}"
        print(f"{precision}: last tenth {statistics.mean(found):.4f}, over seeds {spread}")
    apart = [b - a for a, b in zip(ends["fp32"], ends["bf16"], strict=True)]
    print(f"bf16 - fp32 of the same seed: {', '.join(f'{d:+.4f}' for d in apart)}")


def curve(precision: str, seed: int, steps: int, batch_size: int, network: str) -> list[float]:
    """The mean loss of each tenth of the steps, with dual output."""
    torch.manual_seed(seed)
    config = TrainConfig(steps=steps, batch_size=batch_size, precision=precision, seed=seed, log_every=steps // 10)
    denoiser = dualout.Denoiser(build(network, 1, 8, 3), dualout.Dual(), dualout.schedules.Linear())
    steps_ = train(Learner(denoiser, config), data.load("digits"))
    return [step.metrics["loss"] for step in steps_ if step.metrics is not None]


if __name__ == "__main__":
    main()
