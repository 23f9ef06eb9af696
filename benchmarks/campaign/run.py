"""Break dualout in every way we know, and count what does not end in a clear error or a correct result.

    python benchmarks/campaign/run.py [--part 0.1] [--seed 0] [--dry] [NAME ...]

NAME is a file beside this one (kills, files, flags, configurations, checkpoints, images, not_finite, memory,
every_step_count); by default all of them. The counts go to docs/results/reliability.md, rows of names that are not run
stay as they were; --part runs a share of the cases; --dry writes nothing. Exit code 0 when nothing failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
HERE = Path(__file__).resolve().parent
# in the place of this directory
sys.path[0] = str(HERE.parent)

import torch  # noqa: E402
from filelock import FileLock  # noqa: E402

from campaign.harness import Count  # noqa: E402
from machine import describe  # noqa: E402

NAMES = (
    "kills", "files", "flags", "configurations", "checkpoints", "images", "not_finite", "memory", "every_step_count",
)  # fmt: skip
RESULTS = HERE.parents[1] / "docs" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; by default all")
    parser.add_argument("--part", type=float, default=1.0, help="the share of the cases that is run")
    parser.add_argument("--dry", action="store_true", help="write no results")
    parser.add_argument("--seed", type=int, default=0, help="of what is mutated and when is killed")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(NAMES)}")
    torch.set_num_threads(1)
    failed = 0
    for name in options.names or NAMES:
        begun, counts = time.monotonic(), []
        module = importlib.import_module(f"campaign.{name}")
        for count in module.run(options.part, options.seed):
            counts.append(count)
            tell(count)
            if not options.dry:
                record(name, module.__doc__ or "", counts, time.monotonic() - begun, options)
        failed += sum(len(count.failures) for count in counts)
    print(f"{failed} failures")
    return 1 if failed else 0


def tell(count: Count) -> None:
    print(f"{count.kind}: {count.cases} cases, {len(count.failures)} failures{f'; {count.note}' if count.note else ''}")
    for text in count.failures[:20]:
        print(f"    {text}")
    sys.stdout.flush()


def record(name: str, about: str, counts: list[Count], seconds: float, options: argparse.Namespace) -> None:
    """Put the counts of one file into the results, and write the page anew."""
    kept = RESULTS / "reliability.json"
    with FileLock(Path(tempfile.gettempdir()) / "dualout-reliability.lock"):
        _record(kept, name, about, counts, seconds, options)


def _record(
    kept: Path, name: str, about: str, counts: list[Count], seconds: float, options: argparse.Namespace
) -> None:
    known = json.loads(kept.read_text()) if kept.exists() else {}
    known[name] = {
        "about": about.partition("\n\n")[0].replace("\n", " "),
        "date": date.today().isoformat(),
        "seed": options.seed,
        "part": options.part,
        "seconds": round(seconds),
        "machine": describe(),
        "rows": [
            {"kind": c.kind, "cases": c.cases, "failures": len(c.failures), "note": c.note} for c in counts
        ],
    }  # fmt: skip
    kept.write_text(json.dumps({n: known[n] for n in NAMES if n in known}, indent=2, ensure_ascii=False) + "\n")
    (RESULTS / "reliability.md").write_text(page(known))


def page(known: dict[str, dict]) -> str:
    """docs/results/reliability.md."""
    rows = [row for name in NAMES if name in known for row in known[name]["rows"]]
    total = sum(row["cases"] for row in rows)
    faults = total - sum(row["cases"] for row in known.get("every_step_count", {"rows": []})["rows"])
    machine = next(iter(known.values()))["machine"]
    lines = [
        "# Reliability",
        "",
        f"**In short:** {faults:,} faulty runs and {total - faults:,} numbers of steps, "
        f"{sum(row['failures'] for row in rows)} failures, by",
        "",
        "    python benchmarks/campaign/run.py",
        "",
        "Every case runs the command line, or the function behind it, in a process of its own, in a box. It has failed when it",
        "",
        "- ends in a traceback, by a signal that was not sent, or with another exit code than 0 or 2;",
        "- does not end;",
        "- is wrong where it says 0, or leaves a partial file or anything at all where it says 2;",
        "- writes elsewhere than to --out and the cache of computed things;",
        "- starts a program, opens a connection, or unpickles an object.",
        "",
        "What the campaign found on the way is in [the log](../LOG.md). --part tells which share of a file's cases was run; a",
        "file that is missing below was not run.",
        "",
        f"Machine: {machine['processor']}; {machine['system']}; {machine['versions']}.",
    ]  # fmt: skip
    for name in NAMES:
        if name not in known:
            continue
        part = known[name]
        lines += ["", f"## {name.replace('_', ' ')}", "", part["about"], ""]
        took = f", {part['seconds']} s" if part.get("seconds") else ""
        lines += [f"{part['date']}, --seed {part['seed']} --part {part['part']:g}{took}.", ""]
        lines += ["| kind | cases | failures | |", "|---|---:|---:|---|"]
        lines += [f"| {r['kind']} | {r['cases']:,} | {r['failures']} | {r['note']} |" for r in part["rows"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
