"""Measures dualout beside its peers, and writes docs/results/performance.md.

    python benchmarks/run.py                   a few minutes
    python benchmarks/run.py --full            everything, with more rounds
    python benchmarks/run.py sampling          one question: bench_sampling.py
    python benchmarks/run.py --authors PATH    also the authors' code, from a checkout of it

Where there is a GPU, networks are measured on it, by the time between events; the answers stand beside those of a
processor. `throughput` is asked of a GPU alone.

A question is written down as soon as it is answered; one that fails, or is interrupted by Ctrl-C, leaves the others as
they are, and what is left is told at the end.

Peers that are not installed are told to be absent. To have them all, without what they pull in:

    pip install --no-deps azula denoising-diffusion-pytorch k-diffusion smalldiffusion einops ema-pytorch torchsde \\
        torchdiffeq trampoline dctorch
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent

MINUTES = {
    "backends": (1, 2.5), "cost": (0.5, 0.5), "data": (1, 1.5), "frechet": (0.5, 1), "precision": (2.5, 3.5),
    "processes": (0, 5), "sampling": (0.5, 1), "throughput": (0, 0), "training": (5, 10),
}  # fmt: skip
"""About what a question takes on two quiet cores with AVX-512: the short form, the long one."""


def main() -> int:
    questions = sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(questions)}; all by default")
    options.add_argument("--full", action="store_true", help="more rounds, and what takes long")
    options.add_argument("--threads", type=int, default=1, help="of one process (1)")
    options.add_argument("--authors", type=Path, help="a checkout of the authors' code")
    options.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results", help="where the results go")
    given = options.parse_args()
    wrong = sorted(set(given.questions) - set(questions))
    if wrong:
        options.error(f"no such question: {', '.join(wrong)}; known: {', '.join(questions)}")

    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    sys.path.insert(0, str(HERE))
    # threads are counted when torch is imported
    import importlib

    import machine
    import peers
    import report
    import subjects
    import torch

    torch.set_num_threads(given.threads)
    present, absent = peers.load(given.authors)
    print("peers:", ", ".join(f"{p.NAME} {p.version()}" for p in present) or "none", flush=True)
    for name, why in absent.items():
        print(f"absent: {name} ({why})", flush=True)
    shown = [a if a != str(given.authors) else "PATH" for a in sys.argv[1:]]
    how = {
        "command": shlex.join(["python", "benchmarks/run.py", *shown]),
        "date": datetime.date.today().isoformat(),
        **machine.describe(),
    }
    asked = given.questions or questions
    minutes = sum(MINUTES[name][given.full] for name in asked)
    print(f"about {minutes:.0f} minutes, on two quiet cores without a GPU", flush=True)
    unanswered: dict[str, str] = {}
    for place, name in enumerate(asked):
        print(f"\n== {name}, about {MINUTES[name][given.full]} minutes", flush=True)
        begun = time.monotonic()
        try:
            section = importlib.import_module(f"bench_{name}").measure(given.full, present)
            if section is not None:
                print(section.text(), flush=True)
                report.write(given.out, f"{name}, GPU" if subjects.GPU else name, section, how)
        except KeyboardInterrupt:
            unanswered |= dict.fromkeys(asked[place:], "interrupted")
            break
        except Exception as error:
            traceback.print_exc()
            unanswered[name] = f"{type(error).__name__}: {error}"
        print(f"took {time.monotonic() - begun:.0f} s", flush=True)
    print(f"\nwritten: {given.out / 'performance.md'}")
    for name, why in unanswered.items():
        print(f"unanswered: {name} ({why})")
    return 1 if unanswered else 0


if __name__ == "__main__":
    sys.exit(main())
