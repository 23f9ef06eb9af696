"""Give a trained model a second output, used only where it lowers the error on held-out images.

The source may be a checkpoint of dualout or of diffusers, or a file of weights; it is only read. The directory that is
written is a checkpoint for sample, evaluate, calibrate, export and train --init. Given again, an interrupted upgrade
goes on where it stopped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualout.cli import console
from dualout.cli.options import parse
from dualout.training.upgrade_config import UpgradeConfig

if TYPE_CHECKING:
    from dualout.training.upgrade_run import Check, Upgrade


@dataclass(kw_only=True)
class Options(UpgradeConfig):
    """The options of ``dualout upgrade``."""

    dry_run: bool = False
    """Print the configuration, the number of parameters and what memory and time to expect, and stop"""


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "upgrade", arguments, __doc__)

    from dualout.training.interrupt import interruptible
    from dualout.training.upgrade_run import RECORD, Upgrade

    with console.stages() as told, Upgrade(options, told) as work:
        if options.dry_run:
            return _dry_run(options, work)
        if work.finished:
            console.say(f"{work.path} has all of it; a higher --steps goes on")
            return 0
        console.say(repr(work.dataset))
        last = None

        def stop() -> None:
            if work.run is None:
                # a stage before the fine-tuning is made as a whole, or again
                raise KeyboardInterrupt
            work.stop()

        with interruptible(stop) as asked:
            try:
                for last in work:
                    console.say(_line(last))
            except KeyboardInterrupt:
                if not asked.signal:
                    raise
                console.say("stopped: the same command begins this stage again")
                return asked.code
    best = next((c for c in reversed(work.checks) if c.kept), None)
    title = f"{options.source}: mean squared error of x0 on {len(work.held)} held-out images"
    console.table(work.table, ["t", "before", "eps", "x0", "ratio", "after"], title)
    if best is not None and best.stage == "original":
        console.say("nothing was found to be better than the original, which is what was written, with its gate closed")
    elif last is not None and last.worse:
        console.say("the last weights err more at some t than --tolerance allows: the best before them were written")
    interrupted = last is not None and options.scope != "closed" and last.step < options.steps
    if interrupted:
        console.say("stopped: the same command goes on from there")
    console.wrote(work.path, f"{'interrupted' if interrupted else 'finished'}; the numbers are in {RECORD}")
    return asked.code if interrupted else 0


def _dry_run(options: Options, work: Upgrade) -> None:
    found = work.expected()
    trained = f"{found.cost.trained:,}" if found.steps else "the new rows"
    rows = {
        "images": repr(work.dataset),
        "network": f"{found.cost.parameters:,} parameters with the new output, of which {trained} are trained",
        "memory": f"about {found.cost.memory / 2**20:,.0f} MiB beside the images and the libraries",
        "work": f"{found.solved} images in the least squares, {found.steps} steps of {options.batch_size}, "
        f"{len(work.held)} images held out",
        "time": f"about {console.duration(found.seconds)}",
    }
    console.dry_run(work.config.asdict() | {"out": str(options.path)}, rows)


def _line(check: Check) -> str:
    where = f" step {check.step}" if check.step else ""
    worse = f", worse in {len(check.worse)}" if check.worse else ""
    kept = "kept" if check.kept else "not kept"
    return (
        f"{check.stage}{where}: x0 error {100 * math.expm1(check.score):+.1f}% (geometric mean over t), "
        f"gate open in {check.open} of {len(check.rows)} parts of t{worse}; {kept}, {check.seconds:.1f} s"
    )
