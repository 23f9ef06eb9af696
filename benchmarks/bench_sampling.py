"""What a sampler's step costs above the call of the network, which is the same for all."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import subjects
import torch
from report import Goal, Section, table
from timing import Spread, Times, above, fastest, interleaved, ratio
from torch import Tensor, nn

import dualout
from dualout.networks.backends.fused import Fused

QUESTION = """## Sampling: what a step costs above the network

A network that returns a tensor made before (3×32×32), one thread: what is left is the sampler's own work. The call of
that network alone is subtracted. Peers sample as their documentation says, all with an eps-network of DDPM's schedule;
none of them has dual output, so that dual output is compared with their single output. `by hand` is the least that
single operations of torch take: DDIM written out for this one case, all coefficients made before, in place, without a
look at x0 or at the arguments. `compiled` is what `--backend compile` makes of a step besides the network: reading,
blending and stepping in one kernel."""

GOALS = {1: (0.25, 0.1), 64: (0.5, 1 / 7)}
"""By batch size: what dual and single output may cost, of the best peer's cost."""
COMPILED = ", compiled"


def measure(full: bool, peers: list[ModuleType]) -> Section:
    section, columns = Section(QUESTION), {}
    for batch, (dual, single) in GOALS.items():
        steps, calls = (50, 4) if batch == 1 else (20, 1)
        times = interleaved(cases(peers, batch, steps), rounds=61 if full else 15, calls=calls)
        section.times[f"batch {batch}, seconds a call of {steps} steps"] = times
        cost = {k: [t / steps for t in v] for k, v in above(times, "bare").items()}
        columns[batch] = cost
        best = fastest(cost, [name for name in cost if not name.startswith(("ours", "by hand", "the authors"))])
        if best:
            section.goals += [
                Goal(f"{output} output{how} / {best}, batch {batch}", ratio(cost, f"ours, {output}{how}", best), goal)
                for how in ("", COMPILED)
                for output, goal in (("dual", dual), ("single", single))
                if f"ours, {output}{how}" in cost
            ]
    section.tables = [table(["µs a step", *(f"batch {b}" for b in GOALS)], rows(columns))]
    return section


def rows(columns: dict[int, Times]) -> list[list[str]]:
    """Ours first, then from fast to slow."""
    first = next(iter(columns.values()))
    names = sorted(first, key=lambda n: (not n.startswith("ours"), not n.startswith("by"), statistics.median(first[n])))
    return [[name, *(Spread.of(cost[name]).text(1e-6) for cost in columns.values())] for name in names]


def cases(peers: list[ModuleType], batch: int, steps: int) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    noise, single, dual = (torch.randn((batch, c, 32, 32), generator=generator) for c in (3, 3, 7))
    sampler, schedule = dualout.samplers.DDIM(steps=steps), dualout.schedules.Linear()
    network, two = subjects.Prepared(single), subjects.Prepared(dual)
    eps_model = dualout.Denoiser(network, dualout.Epsilon(), schedule)
    dual_model = dualout.Denoiser(two, dualout.Dual(), schedule)
    t = torch.zeros(batch, dtype=torch.long)

    def bare() -> None:
        for _ in range(steps):
            network(noise, t)

    levels = [*(schedule.scalars(t) for t in sampler.timesteps(schedule)), dualout.schedules.CLEAN]
    found = {
        "bare": bare,
        "by hand, single": by_hand(network, noise, levels),
        "by hand, dual": by_hand_dual(two, noise, levels),
        "ours, single": lambda: sampler.sample(eps_model, noise),
        "ours, dual": lambda: sampler.sample(dual_model, noise),
    }
    if shutil.which("c++"):
        one, both = (Fused(model, sampler, noise) for model in (eps_model, dual_model))
        found |= {
            f"ours, single{COMPILED}": lambda: one.sample(noise),
            f"ours, dual{COMPILED}": lambda: both.sample(noise),
        }
    for peer in peers:
        found |= peer.samplers(network, noise, steps)
        if peer.NAME == "the authors' code":
            found |= peer.samplers(two, noise, steps)
    return found


def by_hand(network: nn.Module, noise: Tensor, levels: list[Any]) -> Callable[[], Tensor]:
    times = torch.zeros(len(noise), dtype=torch.long)
    plan = [(-t.sigma, torch.tensor(1 / t.alpha), torch.tensor(s.alpha), s.sigma) for t, s in pairwise(levels)]

    @torch.no_grad()
    def sample() -> Tensor:
        x = noise
        for sigma, inverse, alpha_s, sigma_s in plan:
            eps = network(x, times)
            x = torch.add(x, eps, alpha=sigma).mul_(inverse).clamp_(-1, 1).mul_(alpha_s).add_(eps, alpha=sigma_s)
        return x

    return sample


def by_hand_dual(network: nn.Module, noise: Tensor, levels: list[Any]) -> Callable[[], Tensor]:
    times = torch.zeros(len(noise), dtype=torch.long)
    plan = [
        (-t.sigma, torch.tensor(1 / t.alpha), torch.tensor(s.alpha), s.sigma / t.sigma, -s.sigma * t.alpha / t.sigma)
        for t, s in pairwise(levels)
    ]

    @torch.no_grad()
    def sample() -> Tensor:
        x = noise
        for sigma, inverse, alpha_s, on_x, on_x0 in plan:
            eps, x0, logit = network(x, times).split_with_sizes((3, 3, 1), 1)
            mix = torch.add(x, eps, alpha=sigma).mul_(inverse).lerp_(x0, logit.sigmoid())
            x = mix.clamp(-1, 1).mul_(alpha_s).add_(x, alpha=on_x).add_(mix, alpha=on_x0)
        return x

    return sample
