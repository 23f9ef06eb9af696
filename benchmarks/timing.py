"""Times alternatives side by side: in turn, in one process, so that what the machine does meanwhile hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Spread(NamedTuple):
    """A median, and how far single rounds were from it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, unit: float = 1.0) -> str:
        """``median [min..max]`` in the unit, with three digits that count."""
        return f"{digits(self.median / unit)} [{digits(self.low / unit)}..{digits(self.high / unit)}]"


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    places = 2
    while abs(value) * 10 ** (places - 2) < 1 and places < 6:
        places += 1
    return f"{value:.{places if abs(value) < 10 else 1}f}"


Times = dict[str, list[float]]
"""Seconds of each round, by case."""


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 1,
    calls: int = 1,
    launching: Times | None = None,
) -> Times:
    """The seconds that each case takes, once a round, after `warmup` rounds that do not count.

    On the CPU it is the process's CPU time, all threads together: what other processes do costs less of it than of the
    clock. On a GPU it is the time between two events in the stream: where the host cannot launch as fast as the GPU
    computes, that is the host's time.

    Args:
        cases: what is timed, by name; every second round goes through them backwards.
        rounds: how many times each is timed.
        warmup: rounds before.
        calls: how many calls are timed together; the result is of one. On a GPU only those that are timed together run
            ahead of it, as they do in a loop that never waits.
        launching: gets, on a GPU, the seconds of the clock until the host had launched the calls.
    """
    clock = _cuda if torch.cuda.is_available() else _cpu
    times: Times = {name: [] for name in cases}
    for round_ in range(-warmup, rounds):
        order = list(cases.items())
        for name, case in order if round_ % 2 else reversed(order):
            seconds, launched = clock(case, calls)
            if round_ >= 0:
                times[name].append(seconds / calls)
                if launching is not None:
                    launching.setdefault(name, []).append(launched / calls)
    return times


def _cpu(case: Callable[[], Any], calls: int) -> tuple[float, float]:
    start = time.process_time()
    for _ in range(calls):
        case()
    seconds = time.process_time() - start
    return seconds, seconds


def _cuda(case: Callable[[], Any], calls: int) -> tuple[float, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun = time.perf_counter()
    start.record()
    for _ in range(calls):
        case()
    end.record()
    launched = time.perf_counter() - begun
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, launched


@contextmanager
def told(part: str) -> Iterator[None]:
    """Print how long a part of a question took, by the clock."""
    begun = time.perf_counter()
    yield
    print(f"{part}: {time.perf_counter() - begun:.1f} s", flush=True)


def above(times: Times, bare: str) -> Times:
    """What each case takes more than `bare` did in the same round."""
    return {
        name: [t - b for t, b in zip(values, times[bare], strict=True)]
        for name, values in times.items()
        if name != bare
    }


def ratio(times: Times, one: str, other: str) -> Spread:
    """`one` over `other`, round by round."""
    return Spread.of([a / b for a, b in zip(times[one], times[other], strict=True)])


def fastest(times: Times, names: Sequence[str]) -> str | None:
    """The one of `names` with the least median; None where there are none."""
    return min(names, key=lambda name: statistics.median(times[name]), default=None)
