"""Whether training in bfloat16 reaches float32's loss: digits, a narrow tiny network, over seeds.

    python benchmarks/bf16_curves.py --steps 2000 --seeds 3
    python benchmarks/bf16_curves.py --network small --size 32 --batch_size 64 --device cuda --together 6

Prints the mean loss of each tenth of the steps, by number format and seed, and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from dualout.training.config import TrainConfig
from dualout.training.learner import Learner
from dualout.training.loop import train
from dualout.training.setup import assemble

PRECISIONS = ("fp32", "bf16")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--batch_size", type=int, default=32)
    options.add_argument("--network", default="tiny:width=8")
    options.add_argument("--data", default="digits")
    options.add_argument("--size", type=int, help="to make the images")
    options.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 …, or auto")
    options.add_argument("--together", type=int, default=1, help="processes; small networks leave a GPU much to do")
    given = options.parse_args()
    began = time.perf_counter()
    runs = [
        TrainConfig(
            steps=given.steps, batch_size=given.batch_size, precision=precision, seed=seed, log_every=given.steps // 10,
            network=given.network, data=given.data, size=given.size, device=given.device,
        )
        for seed, precision in itertools.product(range(given.seeds), PRECISIONS)
    ]  # fmt: skip
    ends: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    # a process that has used a GPU cannot be forked
    with ProcessPoolExecutor(given.together, multiprocessing.get_context("spawn")) as pool:
        for config, tenths in zip(runs, pool.map(curve, runs), strict=True):
            ends[config.precision].append(tenths[-1])
            print(config.precision, config.seed, *(f"{loss:.4f}" for loss in tenths), flush=True)
    for precision, found in ends.items():
        spread = f"{min(found):.4f} to {max(found):.4f}"
        print(f"{precision}: last tenth {statistics.mean(found):.4f}, over seeds {spread}")
    apart = [b - a for a, b in zip(ends["fp32"], ends["bf16"], strict=True)]
    print(f"bf16 - fp32 of the same seed: {', '.join(f'{d:+.4f}' for d in apart)}")
    print(f"{time.perf_counter() - began:.0f} s")


def curve(config: TrainConfig) -> list[float]:
    """The mean loss of each tenth of the steps, with dual output."""
    torch.set_num_threads(1)
    job = assemble(config)
    steps = train(Learner(job.denoiser, job.config), job.dataset, precision=job.precision)
    return [step.metrics["loss"] for step in steps if step.metrics is not None]


if __name__ == "__main__":
    main()
