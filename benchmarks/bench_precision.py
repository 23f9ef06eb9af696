"""Where a training step's time goes, and what changes it: number format, memory layout, attention, heads."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import subjects
import torch
from report import Section, table
from subjects import GPU, PLACE
from timing import Spread, Times, digits, interleaved
from torch import nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from dualout.networks.precision import choose, processor_units

QUESTION = """## Precision: where the time of a training step goes

Forward and backward of S (64 images) and M (8 images), one thread. The peak is what one large matrix product and the
networks' own 3×3 convolutions reach. `bf16` is autocast alone; `attention in fp32` is what `dualout train` does on
processors. The profile is of that, by kind of operation."""

BATCHES = {"S": 64, "M": 128 if GPU else 8}
CALLS = 10 if GPU else 1

ON_GPU = f"""## Precision on a GPU: where the time of a training step goes

Forward and backward of S (64 images) and M ({BATCHES["M"]} images), {CALLS} timed together. The peak is what one large
matrix product and the networks' own 3×3 convolutions reach. `bf16` is autocast, attention included. The profile is of
the GPU's time in bf16, by kind of operation."""

KINDS = {
    "convolution": ("convolution", "conv2d"),
    "attention": ("attention",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "linear"),
    "normalization": ("norm",),
    "activation": ("silu",),
    "casts and copies": ("copy_", "_to_copy", "cat", "clone"),
}


def measure(full: bool, peers: list[ModuleType]) -> Section:
    section = Section(ON_GPU if GPU else QUESTION)
    section.tables.append(_peaks(5 if full else 3))
    # without units for bf16 most of the time goes to what is slow beyond doubt
    many = full and bool(processor_units() or GPU)
    for name, build in {"S": subjects.small, "M": subjects.cifar10}.items():
        cases = _cases(name, build)
        times = interleaved(cases, (7 if name == "S" else 5) if many else 2, calls=CALLS)
        section.times[f"{name}, seconds of forward and backward"] = times
        # a backward pass is two forward ones
        operations = 3 * BATCHES[name] * subjects.operations(build(), subjects.images(1)) / 1e9
        section.tables.append(_table(name, times, operations))
        which = "bf16" if GPU else "bf16, attention in fp32"
        section.tables.append(_profile(f"{name}, {which}", cases[which]))
    return section


def _cases(name: str, build: Callable[..., nn.Module]) -> dict[str, Callable[[], None]]:
    found = {
        "fp32": _step(name, build()),
        "bf16": _step(name, build(), bf16=True),
        "fp32, channels_last": _step(name, build(), layout=torch.channels_last),
    }
    if name == "S":
        found["fp32, one head"] = _step(name, build(heads=1))
        found["bf16, one head"] = _step(name, build(heads=1), bf16=True)
    if GPU:
        # attention stays in bf16 there
        return found | {"bf16, channels_last": _step(name, build(), bf16=True, layout=torch.channels_last)}
    found |= {
        "bf16, attention in fp32": _step(name, build(), bf16=True, apart=True),
        "bf16, attention in fp32, channels_last": _step(
            name, build(), bf16=True, apart=True, layout=torch.channels_last
        ),
    }
    if name == "S":
        found["bf16, attention in fp32, one head"] = _step(name, build(heads=1), bf16=True, apart=True)
    return found


def _step(
    name: str,
    network: nn.Module,
    *,
    bf16: bool = False,
    apart: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
) -> Callable[[], None]:
    """Forward and backward; `apart` keeps attention in float32."""
    batch = BATCHES[name]
    network.to(memory_format=layout)  # type: ignore[call-overload]
    x, t = subjects.images(batch).contiguous(memory_format=layout), torch.randint(0, 1000, (batch,), device=PLACE)
    target = torch.randn(x.shape, device=PLACE)

    def step() -> None:
        with ExitStack() as stack:
            if apart:
                stack.enter_context(choose("bf16", x.device).autocast())
            elif bf16:
                stack.enter_context(torch.autocast(PLACE.type, torch.bfloat16))
            out = network(x, t)
        F.mse_loss(out.float(), target).backward()
        network.zero_grad(set_to_none=True)

    return step


def _peaks(rounds: int) -> str:
    """GFLOP/s of a large matrix product and of convolutions."""
    cases, work = {}, {}
    side_of_matrix = 8192 if GPU else 2048
    shapes = ((128, 128, 32), (128, 256, 16)) if GPU else ((64, 32, 32), (8, 256, 16))
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(side_of_matrix, side_of_matrix, dtype=dtype, device=PLACE)
        cases[f"matrix product, {dtype}"] = lambda a=a: a @ a
        work[f"matrix product, {dtype}"] = 2 * side_of_matrix**3
        for batch, channels, side in shapes:
            x = torch.randn(batch, channels, side, side, dtype=dtype, device=PLACE, requires_grad=True)
            convolution = nn.Conv2d(channels, channels, 3, padding=1).to(PLACE, dtype)
            ahead = f"convolution {batch}×{channels}×{side}×{side}"
            flop = 2 * batch * side**2 * channels**2 * 9

            def forward(x: Any = x, convolution: Any = convolution) -> None:
                with torch.no_grad():
                    convolution(x)

            def both(x: Any = x, convolution: Any = convolution) -> None:
                convolution(x).sum().backward()

            cases[f"{ahead} forward, {dtype}"], work[f"{ahead} forward, {dtype}"] = forward, flop
            cases[f"{ahead} forward and backward, {dtype}"], work[f"{ahead} forward and backward, {dtype}"] = (
                both,
                3 * flop,
            )
    times = interleaved(cases, rounds, calls=3)
    rate = {name: work[name] / min(values) / 1e9 for name, values in times.items()}
    names = [n.removesuffix(", torch.float32") for n in cases if n.endswith("torch.float32")]
    rows = [[n, digits(rate[f"{n}, torch.float32"]), digits(rate[f"{n}, torch.bfloat16"])] for n in names]
    return table(["GFLOP/s, best of the rounds", "fp32", "bf16"], rows)


def _table(name: str, times: Times, operations: float) -> str:
    """Times beside fp32's; `operations` is how many 10⁹ floating-point operations forward and backward are."""
    slow = statistics.median(times["fp32"])
    rows = [
        [
            case,
            Spread.of(v).text(1e-3),
            f"{slow / statistics.median(v):.2f}",
            digits(operations / statistics.median(v)),
        ]
        for case, v in times.items()
    ]
    return table([f"{name}: ms of forward and backward", "median [min..max]", "× fp32", "GFLOP/s"], rows)


def _profile(name: str, step: Callable[[], None]) -> str:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    with profile(activities=activities) as measured:
        step()
    shares: Counter[str] = Counter()
    for event in measured.key_averages():
        # kernels are also listed by themselves: their time is that of the operations that launched them
        if event.device_type != DeviceType.CPU:
            continue
        kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), "other")
        shares[kind] += event.self_device_time_total if GPU else event.self_cpu_time_total
    total = sum(shares.values())
    if not total:
        return f"{name}: the profiler saw no work on the GPU."
    rows = [[kind, f"{share / total:.0%}"] for kind, share in shares.most_common()]
    return table([f"{name}: kind of operation", "share of the time"], rows)
