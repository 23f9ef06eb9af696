"""The peak memory of sampling 50,000 images of 3×32×32 beside that of 500, each in a process of its own.

All of them together are 146 MiB, so that keeping even a quarter of them would be noticed.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator

from campaign import subjects
from campaign.harness import Box, Count, box, ended, judged, start

IMAGES = (500, 50_000)
"""In the usual batches of 64, so that 500 are some of them, too."""


def run(part: float, seed: int) -> Iterator[Count]:
    """PNG and npz."""
    model = subjects.cheap()
    few, many = IMAGES if part >= 1 else (500, 2000)
    for form in ("npz", "png"):
        peaks, failures = [], []
        for images in (few, many):
            with box() as where:
                more = ["--format", form, "--steps", "1"]
                command = subjects.sampling(model, where.out, images, *more)
                child = start(command, where, lambda where=where: peak_told(where))
                failures += judged(ended(child, where, 3000), where, (0,))
                peaks.append(int((where.path / "log" / "peak").read_text()) / 1024)
        if peaks[1] > 1.05 * peaks[0]:
            failures.append(f"{peaks[1]:.0f} MiB instead of {peaks[0]:.0f} MiB")
        told = f"{peaks[0]:.1f} MiB for {few:,} images, {peaks[1]:.1f} MiB for {many:,}"
        yield Count(f"memory: {form}", 1, failures, told)


def peak_told(where: Box) -> None:
    """Write the peak down as the forked process ends."""
    import dualout.cli.sample as command

    work, file = command.run, (where.path / "log" / "peak").open("w")

    def run_and_tell(arguments: list[str]) -> int | None:
        try:
            return work(arguments)
        finally:
            file.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
            file.flush()

    command.run = run_and_tell
