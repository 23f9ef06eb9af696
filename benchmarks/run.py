"""Measures dualout beside its peers, and writes docs/results/performance.md.

    python benchmarks/run.py                   a few minutes
    python benchmarks/run.py --full            everything, with more rounds
    python benchmarks/run.py sampling          one question: bench_sampling.py
    python benchmarks/run.py --authors PATH    also the authors' code, from a checkout of it

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
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
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
    for name in given.questions or questions:
        print(f"\n== {name}", flush=True)
        section = importlib.import_module(f"bench_{name}").measure(given.full, present)
        if section is None:
            continue
        print(section.text(), flush=True)
        report.write(given.out, name, section, how)
    print(f"\nwritten: {given.out / 'performance.md'}")


if __name__ == "__main__":
    main()
