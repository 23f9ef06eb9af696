"""What computes a network fastest when images are made, and how far it is from eager."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import subjects
import torch
from report import Section, table
from subjects import GPU, PLACE
from timing import Spread, interleaved, ratio

from dualout.errors import InputError
from dualout.networks.backends import Backend, Call, Chosen, choose
from dualout.networks.precision import Precision, processor_units

QUESTION = """## Backends: the network of `sample` and `evaluate`

One call of S (64 images of 3×32×32, 7 channels out) without gradients, one thread. `difference` is from eager fp32, the
root mean square over that of the output; what exceeds the tolerance is refused. `preparing` is repaid after the number
of calls in the last column. A backend that is not installed, or a number format that the processor has no units for, is
left out; torch.compile is measured with `--full`."""

ON_GPU = """## Backends on a GPU: the network of `sample` and `evaluate`

As on a processor; ten calls are timed together, as in a sampler, which never waits. torch.compile is measured with
`--full`, in bf16."""

BATCH = 64


@torch.no_grad()
def measure(full: bool, peers: list[ModuleType]) -> Section:
    section = Section(ON_GPU if GPU else QUESTION)
    network = subjects.small(7).eval()
    call = Call(subjects.images(BATCH), torch.full((BATCH,), 500, device=PLACE), {})
    found: dict[str, tuple[Chosen, Precision, float]] = {}
    # compilers for GPUs work in processes of their own
    clock = time.perf_counter if GPU else time.process_time
    for kind in sorted(Backend.kinds().values(), key=lambda backend: backend.seconds):
        for name in kind.precisions:
            precision = Precision(name, PLACE, "as asked")
            slow = name == "bf16" and not (GPU or processor_units())
            skipped = kind.name == "compile" and not (full and (name == "bf16" or not GPU))
            if name == "fp16" or slow or skipped:
                continue
            begun = clock()
            try:
                kind().check(precision)
                chosen = choose(kind.name, network, [call], precision, 1)
            except InputError as error:
                print(f"{kind.name}, {name}: {error}", flush=True)
                continue
            found[f"{kind.name}, {name}"] = chosen, precision, clock() - begun
    cases = {name: _call(*ready[:2], call) for name, ready in found.items()}
    times = interleaved(cases, 15 if full else 7, calls=10 if GPU else 1)
    section.times["seconds a call"] = times
    rows = []
    for name, (chosen, _, preparing) in found.items():
        gain = ratio(times, "eager, fp32", name)
        saved = Spread.of(times["eager, fp32"]).median - Spread.of(times[name]).median
        other = name != "eager, fp32"
        rows.append(
            [
                name, Spread.of(times[name]).text(1e-3), gain.text(), str(chosen.record.get("difference", "")),
                f"{preparing:.1f} s" if other else "", f"{preparing / saved:.0f}" if other and saved > 0 else "",
            ]
        )  # fmt: skip
    header = ["backend", "ms a call", "× eager fp32", "difference", "preparing", "repaid after calls"]
    section.tables = [table(header, rows)]
    return section


def _call(chosen: Chosen, precision: Precision, call: Call) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad(), precision.autocast():
            chosen.network(call.x, call.t)

    return run
