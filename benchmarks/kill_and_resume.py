"""Does a training that is killed at a random moment and resumed end in the same weights, bit for bit?

    python benchmarks/kill_and_resume.py --kills 20

One training runs through; then each of the others is killed with SIGKILL at a random moment of its life, resumed by
the same command and compared: weights, average, optimizer, the published checkpoint, metrics.jsonl and sample grids.
Checkpoints are written every few steps, so that many kills fall into the writing of one. Each training is a process of
its own, forked from this one, which has the libraries loaded. Exit code 0 when all agree.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

TIMES = ("images_per_s", "seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how many trainings are killed")
    parser.add_argument("--steps", type=int, default=40, help="of each training")
    parser.add_argument("--checkpoint_every", type=int, default=4)
    parser.add_argument("--network", default="tiny:width=8")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    # trained on a processor: once this process has asked for a GPU, its forks cannot
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    warm_up()
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as work:
        return campaign(options, Path(work))


def warm_up() -> None:
    """Load the libraries, so that forked trainings need not."""
    from dualout import data
    from dualout.evaluation import sampling  # noqa: F401
    from dualout.training import TrainConfig
    from dualout.training.run import Run  # noqa: F401
    from dualout.training.setup import first_weights

    first_weights(TrainConfig(), data.load("digits"))


def campaign(options: argparse.Namespace, work: Path) -> int:
    command = [
        "train", "--data", "digits", "--network", options.network, "--batch_size", str(options.batch_size),
        "--steps", str(options.steps), "--checkpoint_every", str(options.checkpoint_every), "--log_every", "3",
        "--sample_every", "20", "--samples", "4", "--sampler", "ddim:steps=2", "--device", "cpu",
    ]  # fmt: skip
    begun = time.monotonic()
    whole = start([*command, "--out", str(work / "whole")], work / "whole.log")
    expect(whole, 0, work / "whole.log")
    life = time.monotonic() - begun
    expected = content(work / "whole")
    print(f"uninterrupted: {options.steps} steps in {life:.1f} s, {len(expected)} tensors and lines to agree on")
    moments = random.Random(options.seed)
    agreed = writing = 0
    for number in range(1, options.kills + 1):
        out, log = work / f"run-{number}", work / f"run-{number}.log"
        moment = moments.uniform(0, life)
        while not killed(start([*command, "--out", str(out)], log), moment):
            # it was quicker than the first: again, and earlier
            moment = moments.uniform(0, moment)
            out = out.with_name(out.name + "x")
        where, in_write = found(out)
        expect(start([*command, "--out", str(out)], log), 0, log)
        resumed = content(out)
        differing = sorted(k for k in expected.keys() | resumed.keys() if not equal(expected, resumed, k))
        agreed += not differing
        writing += in_write
        verdict = "the same" if not differing else f"DIFFERS in {len(differing)}: {', '.join(differing[:4])}"
        print(f"{number:3d}  killed after {moment:5.2f} s, {where:<44} resumed: {verdict}", flush=True)
    print(
        f"{agreed} of {options.kills} killed and resumed trainings end in the same bits as the uninterrupted one; "
        f"{writing} were killed while a checkpoint was being written"
    )
    return 0 if agreed == options.kills else 1


def start(command: list[str], log: Path) -> int:
    """A training in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with log.open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            from dualout.cli.main import main as dualout

            code = dualout(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def killed(child: int, moment: float) -> bool:
    """Kill it after so many seconds; False when it had ended before."""
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def expect(child: int, code: int, log: Path) -> None:
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != code:
        sys.exit(f"exit code {os.waitstatus_to_exitcode(status)} instead of {code}:\n{log.read_text()}")


def found(out: Path) -> tuple[str, bool]:
    """How far it was, and whether it was writing."""
    from dualout.training.checkpoint import states

    if not out.exists():
        return "before it had made its directory", False
    done = states(out)
    asides = [p for p in out.rglob(".*") if p.name.startswith(".step-") or p.suffix == ".tmp"]
    published = read(out / "config.json").get("training", {}).get("step")
    behind = bool(done) and done[-1][0] != published
    step = f"at step {done[-1][0]}" if done else "before a checkpoint"
    return step + (", writing" if asides or behind else ""), bool(asides or behind)


def content(out: Path) -> dict[str, object]:
    """All that has to agree, by name."""
    from dualout.checkpoint import read_tensors
    from dualout.training.checkpoint import states

    step, place = states(out)[-1]
    everything: dict[str, object] = {"step": step}
    for file in [*sorted(place.glob("*.safetensors")), out / "model.safetensors"]:
        everything |= {f"{file.stem}/{k}": v for k, v in read_tensors(file).items()}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        everything[f"metrics/{row['step']}"] = {k: v for k, v in row.items() if k not in TIMES}
    for file in sorted((out / "samples").glob("*.png")):
        everything[f"samples/{file.name}"] = file.read_bytes()
    return everything


def equal(a: dict[str, object], b: dict[str, object], name: str) -> bool:
    one, two = a.get(name), b.get(name)
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return torch.equal(one, two)
    return one is not None and one == two


def read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
