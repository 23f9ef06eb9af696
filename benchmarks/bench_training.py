"""What one training step costs, all of it: noise, forward, backward, clipping, optimizer and average."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any

import subjects
import torch
from report import Goal, Section, table
from timing import Spread, Times, above, fastest, interleaved, ratio
from torch import Tensor, nn
from torch.nn import functional as F

import dualout
from dualout.data.dataset import Dataset
from dualout.errors import InputError
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


def measure(full: bool, peers: list[ModuleType]) -> Section:
    section = Section(QUESTION)
    _measure_step(section, "S, batch 64", subjects.small, 64, peers, rounds=7 if full else 3, full=full)
    _measure_step(section, "M, batch 8", subjects.cifar10, 8, peers, rounds=4 if full else 2, full=full)
    _measure_overhead(section, peers, rounds=31 if full else 11)
    return section


def _measure_step(
    section: Section, name: str, build: Callable[..., nn.Module], batch: int, peers: list[ModuleType],
    *, rounds: int, full: bool,
) -> None:  # fmt: skip
    network, images, small = build(), subjects.images(batch), name.startswith("S")
    cases = {
        "ours, default": ours(network, batch),
        "ours, fp32": ours(network, batch, precision="fp32"),
        "ours, dual output, default": ours(build(7), batch, parameterization="dual"),
    }
    if full and small:
        compiled = ours(copy.deepcopy(network), batch, compile=True)
        try:
            compiled()
            cases["ours, compiled, default"] = compiled
        except InputError as error:
            print(f"{name}, compiled: {error}", flush=True)
    found: dict[str, Times] = {}
    for kind, wrapped in (("default", network), ("bf16", InBf16(network))):
        theirs = {f"{n}, {kind}": step for peer in peers for n, step in peer.trainers(wrapped, images).items()}
        # a processor without units for bf16 takes three times as long, and no round says more than another
        slow = kind == "bf16" and not (processor_units() or torch.cuda.is_available())
        both = {k: _clean(step, network) for k, step in (cases | theirs).items()}
        found[kind] = interleaved(both, 2 if slow else rounds, warmup=0 if slow else 1)
        section.times[f"{name}, {kind}, seconds a step"] = found[kind]
        # with the peers in bf16 only what it is compared with is timed again
        cases = {"ours, default": cases["ours, default"]}
    times = found["default"]
    default, half = (
        fastest(found[kind], [n for n in found[kind] if n.endswith(kind) and not n.startswith("ours")])
        for kind in ("default", "bf16")
    )
    if default and half:
        section.goals.append(_goal(times, name, default, "ours, default", 1.7 if small else 2.5))
        if "ours, compiled, default" in times:
            section.goals.append(_goal(times, name, default, "ours, compiled, default", 2.2))
        if not small:
            section.goals.append(_goal(found["bf16"], name, half, "ours, default", 1.2))
            section.goals.append(_goal(times, name, default, "ours, fp32", 1.2))
    reference = statistics.median(times[default]) if default else None
    shown = found["bf16"] | times
    rows = [
        [
            case,
            Spread.of(shown[case]).text(1e-3),
            f"{reference / statistics.median(shown[case]):.2f}" if reference else "",
        ]
        for case in sorted(shown, key=lambda c: (not c.startswith("ours"), statistics.median(shown[c])))
    ]
    section.tables.append(table([f"{name}: ms a step", "median [min..max]", "× fastest peer, default"], rows))


def _goal(times: Times, name: str, peer: str, own: str, least: float) -> Goal:
    return Goal(f"{name}: {peer} / {own}", ratio(times, peer, own), least, least=True)


def _measure_overhead(section: Section, peers: list[ModuleType], rounds: int) -> None:
    network, images, noise = subjects.small(), subjects.images(4), torch.randn(4, 3, 32, 32)
    t = torch.randint(0, 1000, (4,))

    def bare() -> None:
        F.mse_loss(network(images, t), noise).backward()

    cases = {"bare": bare, "ours": ours(network, 4, precision="fp32")}
    for peer in peers:
        cases |= peer.trainers(network, images)
    times = interleaved({k: _clean(step, network) for k, step in cases.items()}, rounds, warmup=2)
    section.times["S, batch 4, seconds a step"] = times
    cost, whole = above(times, "bare"), Spread.of(times["bare"])
    rows = [
        [name, Spread.of(cost[name]).text(1e-3), f"{statistics.median(cost[name]) / whole.median:.0%}"]
        for name in sorted(cost, key=lambda n: (n != "ours", statistics.median(cost[n])))
    ]
    heading = f"S, batch 4, fp32: ms above forward and backward ({whole.text(1e-3)} ms)"
    section.tables.append(table([heading, "median [min..max]", "share"], rows))


def ours(network: nn.Module, batch: int, *, images: Dataset | None = None, **options: Any) -> Callable[[], Any]:
    """Steps of the loop behind `dualout train`."""
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
