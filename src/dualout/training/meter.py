"""Means of what is measured at every step, without waiting for the device."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Meter:
    """Sums on the device, read as means over the steps since they were last read.

    Args:
        accelerator: of several processes, over which the means are taken too.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._together = accelerator if accelerator is not None and accelerator.num_processes > 1 else None
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._steps, self._images = 0, 0
        self._bad: Tensor | None = None
        self._busy = 0.0
        self.seconds = 0.0
        """How long the steps took, over the whole run."""
        self._since = time.perf_counter()

    def resume(self) -> None:
        """A step begins: its time counts."""
        self._since = time.perf_counter()

    def add(self, step: int, values: dict[str, Tensor], images: int) -> None:
        """The values of a step, scalars on the device, and how many images it took over all processes."""
        latest = torch.stack([v.detach().float() for v in values.values()])
        bad = torch.where(latest.isfinite().all(), 0, step)
        self._bad = bad if self._bad is None else torch.where(self._bad > 0, self._bad, bad)
        self._names = list(values)
        self._sums = latest if self._sums is None else self._sums.to(latest.device) + latest
        self._steps += 1
        self._images += images

    def pause(self) -> None:
        """A step has ended."""
        passed = time.perf_counter() - self._since
        self._busy += passed
        self.seconds += passed

    def first_bad(self) -> int:
        """The first step with a value that is no number; 0 when there is none. Waits for the device."""
        return 0 if self._bad is None else int(self._bad)

    def read(self) -> dict[str, float]:
        """The means, images_per_s and seconds; what comes next is counted anew. Waits for the device."""
        means = self._means()
        # on a GPU the steps that were only launched are over now
        self.pause()
        self.resume()
        rate = self._images / max(self._busy, 1e-9)
        self._sums, self._steps, self._images, self._busy = None, 0, 0, 0.0
        return means | {"images_per_s": rate, "seconds": self.seconds}

    def _means(self) -> dict[str, float]:
        if self._sums is None:
            return {}
        return dict(zip(self._names, (v / self._steps for v in self._over_processes().tolist()), strict=True))

    def _over_processes(self) -> Tensor:
        assert self._sums is not None
        return self._sums if self._together is None else self._together.reduce(self._sums.clone(), "mean")  # type: ignore[return-value]

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint: a run that is resumed gives the same means."""
        sums = [] if self._sums is None else self._over_processes().tolist()
        return {
            "names": self._names, "sums": sums, "steps": self._steps, "images": self._images, "busy": self._busy,
            "seconds": self.seconds,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._names, self._steps, self._images = list(state["names"]), int(state["steps"]), int(state["images"])
        self._sums = torch.tensor(state["sums"]) if state["sums"] else None
        self._busy, self.seconds = float(state["busy"]), float(state["seconds"])
