"""What one training step costs, all of it: noise, forward, backward, clipping, optimizer and average."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import subjects
import torch
from report import Goal, Section, table
from subjects import GPU, PLACE
from timing import Spread, Times, above, digits, fastest, interleaved, ratio, told
from torch import Tensor, nn
from torch.nn import functional as F

import dualout
from dualout.data.dataset import Dataset
from dualout.networks.precision import processor_units
from dualout.training.config import TrainConfig
from dualout.training.learner import Learner
from dualout.training.loop import train

QUESTION = """## Training: what a step costs

One whole step with the same network, weights and images, one thread. S is a UNet of 1.74 million parameters and
3×32×32 images (attention in 8 heads of width 8, diffusers' default), M is DDPM's CIFAR-10 UNet of 35.7 million. Ours is
the loop behind `dualout train`, with an eps-network like the peers' and also with dual output; it draws each image's
noise from its own seed, reads and prepares its batches, clips the gradient and averages the weights. The peers' steps
are those of their examples, on a batch that lies ready; what some of them leave out is not added. `bf16` gives a peer
our number format, by autocast around its network; `default` is as its example does it."""


ON_GPU = """## Training on a GPU: what a step costs

As on a processor, but for the batch of M, which is 128, its dropout, which is 0.1 as in recipes/cifar10.yaml, and the
layout: ours has its weights in channels_last, as `dualout train` does there, unless `contiguous` is said. `recorded` is
`--graph true`: forward and backward passes are replayed as a CUDA graph. Eight steps
are timed together, so that the host runs ahead of the GPU as it does over a whole training; `ms, launched` is what the
host alone takes. In fp32 TF32 is as torch has it by default: on in convolutions, off in matrix products. The share of
the peak is of 3 forward passes' operations; that of rows in fp32 is of bf16's peak too."""


class Case(NamedTuple):
    """A network and a batch, and how it is timed."""

    name: str
    build: Callable[..., nn.Module]
    batch: int
    rounds: int
    calls: int = 1
    compiled: tuple[str, ...] = ()
    """Which of `PARAMETERIZATIONS` are compiled, too."""


PARAMETERIZATIONS = {"": "eps", "dual output, ": "dual"}
"""By what our cases are called."""


def measure(full: bool, peers: list[ModuleType]) -> Section:
    if not GPU:
        section = Section(QUESTION)
        compiled = ("",) if full else ()
        _measure_step(section, Case("S, batch 64", subjects.small, 64, 7 if full else 3, compiled=compiled), peers)
        _measure_step(section, Case("M, batch 8", subjects.cifar10, 8, 4 if full else 2), peers)
        _measure_overhead(section, peers, rounds=31 if full else 11)
        return section
    section, rounds = Section(ON_GPU), 4 if full else 3
    peak = bf16_peak()
    section.tables.append(f"The peak: {peak / 1e12:.0f} TFLOP/s, of a product of 8192 × 8192 matrices in bf16.")
    compiled = tuple(PARAMETERIZATIONS) if full else ()
    network = partial(subjects.cifar10, dropout=0.1)
    _measure_step(section, Case("M, batch 128", network, 128, rounds, 8, compiled), peers, peak)
    _measure_step(section, Case("S, batch 64", subjects.small, 64, rounds, 8, compiled[:1]), peers, peak)
    with told("overhead"):
        _measure_overhead(section, peers, rounds, calls=10)
    return section


def _measure_step(section: Section, case: Case, peers: list[ModuleType], peak: float | None = None) -> None:
    """Args: peak: FLOP/s that shares are of, on a GPU."""
    name, network, second = case.name, case.build(), case.build(7)
    images = subjects.images(case.batch)
    cases = {
        "ours, default": ours(network, case.batch),
        "ours, fp32": ours(network, case.batch, precision="fp32"),
        "ours, dual output, default": ours(second, case.batch, parameterization="dual"),
    }
    if GPU:
        cases["ours, contiguous, default"] = ours(network, case.batch, channels_last=False)
        cases["ours, recorded, default"] = ours(network, case.batch, graph=True)
        cases["ours, dual output, recorded, default"] = ours(second, case.batch, parameterization="dual", graph=True)
    found: dict[str, Times] = {}
    launched: Times = {}
    theirs: dict[str, Callable[[], Any]] = {}

    def timed(what: str, cases: dict[str, Callable[[], Any]], slow: bool = False) -> None:
        both = {k: _clean(step, network) for k, step in cases.items()}
        with told(f"{name}, {what}"):
            found[what] = interleaved(
                both, 2 if slow else case.rounds, warmup=0 if slow else 1, calls=case.calls, launching=launched
            )
        section.times[f"{name}, {what}, seconds a step"] = found[what]

    def shown() -> str:
        return _shown(case, found, launched, reference, {"": network, "dual output, ": second}, peak)

    for kind, wrapped in (("default", network), ("bf16", InBf16(network))):
        own = {f"{n}, {kind}": step for peer in peers for n, step in peer.trainers(wrapped, images).items()}
        theirs |= own
        # a processor without units for bf16 takes three times as long, and no round says more than another
        timed(kind, cases | own, slow=kind == "bf16" and not (processor_units() or GPU))
        # with the peers in bf16 only what it is compared with is timed again
        cases = {k: v for k, v in cases.items() if k in ("ours, default", "ours, recorded, default")}
    fastest_of = [
        fastest(found[kind], [n for n in found[kind] if n.endswith(kind) and not n.startswith("ours")])
        for kind in ("default", "bf16")
    ]
    rivals = [peer for peer in fastest_of if peer]
    reference = statistics.median(found["default"][fastest_of[0]]) if fastest_of[0] else None
    # compiling takes longest, and a machine that is borrowed may be gone before it is done
    print(shown(), flush=True)
    compiled: dict[str, Callable[[], Any]] = {}
    for which in case.compiled:
        compiled |= _compiled(case, which, second if which else network)
        timed("compiled", compiled | cases | {peer: theirs[peer] for peer in rivals})
        print(shown(), flush=True)
    if len(rivals) == 2:
        _add_goals(section, name, found, *rivals)
    section.tables.append(shown())
    if GPU:
        for key, step in (cases | compiled).items():
            section.tables.append(_profiled(f"{name}, {key}", step))
            print(section.tables[-1], flush=True)


def _shown(
    case: Case,
    found: dict[str, Times],
    launched: Times,
    reference: float | None,
    networks: dict[str, nn.Module],
    peak: float | None,
) -> str:
    """The table of all cases that were timed."""
    times = {k: v for kind in ("compiled", "bf16", "default") for k, v in found.get(kind, {}).items()}
    image = subjects.images(1)
    rows = []
    for key in sorted(times, key=lambda c: (not c.startswith("ours"), statistics.median(times[c]))):
        median = statistics.median(times[key])
        row = [key, Spread.of(times[key]).text(1e-3), f"{reference / median:.2f}" if reference else ""]
        if peak:
            done = 3 * case.batch * subjects.operations(networks["dual output, " if "dual" in key else ""], image)
            row += [digits(1e3 * statistics.median(launched[key])), digits(case.batch / median)]
            row += [f"{done / median / peak:.1%}"]
        rows.append(row)
    header = [f"{case.name}: ms a step", "median [min..max]", "× fastest peer, default"]
    return table(header + (["ms, launched", "images/s", "of the bf16 peak"] if peak else []), rows)


def _compiled(case: Case, which: str, network: nn.Module) -> dict[str, Callable[[], Any]]:
    """Ours of one parameterization with the network compiled, which happens here."""
    # recorded on a GPU, as `dualout train` does it there
    key = f"ours, {which}compiled, {'recorded, ' if GPU else ''}default"
    step = ours(copy.deepcopy(network), case.batch, compile=True, graph=GPU, parameterization=PARAMETERIZATIONS[which])
    try:
        with told(f"{case.name}, {key}: compiling"):
            step()
    # of the compiler's own, and of those that it calls
    except Exception as error:
        print(f"{case.name}, {key}: {error}", flush=True)
        return {}
    return {key: step}


def _add_goals(section: Section, name: str, found: dict[str, Times], default: str, half: str) -> None:
    """Args: default, half: the fastest peer at its default, and in bf16."""
    times, small, both = found["default"], name.startswith("S"), found.get("compiled", {})
    compiled = [k for k in both if "compiled" in k]
    if GPU:
        # the peers' networks have a single output: dual output has a little more to do
        for kind, peer in (("default", default), ("bf16", half)):
            section.goals += [_goal(found[kind], name, peer, f"ours, {own}default", 1) for own in ("", "recorded, ")]
            section.goals += [_goal(both, name, peer, own, 1) for own in compiled]
        section.goals.append(_goal(times, name, default, "ours, fp32", 1))
        return
    section.goals.append(_goal(times, name, default, "ours, default", 1.7 if small else 2.5))
    section.goals += [_goal(both, name, default, own, 2.2) for own in compiled]
    if not small:
        section.goals.append(_goal(found["bf16"], name, half, "ours, default", 1.2))
        section.goals.append(_goal(times, name, default, "ours, fp32", 1.2))


def _goal(times: Times, name: str, peer: str, own: str, least: float) -> Goal:
    return Goal(f"{name}: {peer} / {own}", ratio(times, peer, own), least, least=True)


KERNELS = {
    "compiled: normalizations, activations, dropout": ("triton",),
    "convolutions": ("fprop", "dgrad", "wgrad", "conv"),
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "copies to another layout": ("direct_copy", "copy_kernel", "nchwtonhwc", "nhwctonchw"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
    "optimizer, average and clipping": ("multi_tensor", "adam"),
}
"""What kernels are for, by parts of their names; the first that fits: the compiler's bear those of all they replace."""


def _purpose(kernel: str) -> str:
    low = kernel.lower()
    return next((kind for kind, parts in KERNELS.items() if any(part in low for part in parts)), "everything else")


def _profiled(name: str, step: Callable[[], Any], calls: int = 3) -> str:
    """Where the GPU's time of a step goes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in recorded.events() or []:
        # annotations span the kernels that they are of
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
            kind = _purpose(event.name)
            spent[kind] = spent.get(kind, 0.0) + event.self_device_time_total / 1e3 / calls
    whole = sum(spent.values())
    rows = [[kind, digits(ms), f"{ms / whole:.0%}"] for kind, ms in sorted(spent.items(), key=lambda item: -item[1])]
    return table([f"{name}: ms of the GPU a step, {digits(whole)} in all", "ms", "share"], rows)


def bf16_peak() -> float:
    """FLOP/s of a matrix product in bf16 that is large enough for a GPU."""
    a, b = (torch.randn(8192, 8192, device=PLACE, dtype=torch.bfloat16) for _ in range(2))
    times = interleaved({"product": lambda: a @ b}, 10, warmup=3)
    return 2 * 8192**3 / statistics.median(times["product"])


def _measure_overhead(section: Section, peers: list[ModuleType], rounds: int, calls: int = 1) -> None:
    network, images, noise = subjects.small(), subjects.images(4), torch.randn(4, 3, 32, 32, device=PLACE)
    t = torch.randint(0, 1000, (4,), device=PLACE)

    def bare() -> None:
        F.mse_loss(network(images, t), noise).backward()

    cases = {"bare": bare, "ours": ours(network, 4, precision="fp32")}
    for peer in peers:
        cases |= peer.trainers(network, images)
    times = interleaved({k: _clean(step, network) for k, step in cases.items()}, rounds, warmup=2, calls=calls)
    section.times["S, batch 4, seconds a step"] = times
    cost, whole = above(times, "bare"), Spread.of(times["bare"])
    rows = [
        [name, Spread.of(cost[name]).text(1e-3), f"{statistics.median(cost[name]) / whole.median:.0%}"]
        for name in sorted(cost, key=lambda n: (n != "ours", statistics.median(cost[n])))
    ]
    heading = f"S, batch 4, fp32: ms above forward and backward ({whole.text(1e-3)} ms)"
    section.tables.append(table([heading, "median [min..max]", "share"], rows))


def ours(network: nn.Module, batch: int, *, images: Dataset | None = None, **options: Any) -> Callable[[], Any]:
    """Steps of the loop behind `dualout train`; on a GPU, of a copy of the network, which is laid out as there."""
    if GPU:
        options = {"channels_last": True, **options}
        layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
        network = copy.deepcopy(network).to(memory_format=layout)  # type: ignore[call-overload]
    options = {"parameterization": "eps", "steps": 10**9, "log_every": 50, "batch_size": batch, **options}
    config = TrainConfig(**options)
    parameterization = dualout.Parameterization.parse(config.parameterization or "")
    denoiser = dualout.Denoiser(network, parameterization, dualout.schedules.Linear())
    steps = train(Learner(denoiser, config), images or subjects.dataset())
    return lambda: next(steps)


class InBf16(nn.Module):
    """A network in bfloat16 as accelerate makes it: autocast inside, float32 outside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.network(x, t).float()


def _clean(step: Callable[[], Any], network: nn.Module) -> Callable[[], None]:
    """A step that leaves no gradient behind for the next case, which has the same weights."""

    def clean() -> None:
        step()
        network.zero_grad(set_to_none=True)

    return clean
