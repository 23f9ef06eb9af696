"""What a sampler's step costs above the call of the network, which is the same for all."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import subjects
import torch
from report import Goal, Section, table
from subjects import GPU, PLACE
from timing import Spread, Times, above, fastest, interleaved, ratio, told
from torch import Tensor, nn

import dualout
from dualout.errors import InputError
from dualout.levels import CLEAN
from dualout.networks.backends.fused import Fused
from dualout.networks.backends.graph import RecordedTrajectory

QUESTION = """## Sampling: what a step costs above the network

A network that returns a tensor made before (3×32×32), one thread: what is left is the sampler's own work. The call of
that network alone is subtracted. Peers sample as their documentation says, all with an eps-network of DDPM's schedule;
none of them has dual output, so that dual output is compared with their single output. `by hand` is the least that
single operations of torch take: DDIM written out for this one case, all coefficients made before, in place, without a
look at x0 or at the arguments. `compiled` is what `--backend compile` makes of a step besides the network: reading,
blending and stepping in one kernel."""

ON_GPU = """## Sampling on a GPU: what a step costs above the network

As on a processor; the network launches nothing, so that what is left is small kernels, and the host that launches them.
Four calls are timed together. `clock` is the host's time until they were launched, the rest the time between two events
on the GPU; where both are alike, the host is what is waited for. `graph` is all steps replayed as one CUDA graph, as
`--backend graph` does it."""

GOALS = {1: (0.25, 0.1), 64: (0.5, 1 / 7)}
"""By batch size: what dual and single output may cost, of the best peer's cost."""
COMPILED, GRAPH = ", compiled", ", graph"


def measure(full: bool, peers: list[ModuleType]) -> Section:
    section, columns = Section(ON_GPU if GPU else QUESTION), {}
    for batch, (dual, single) in GOALS.items():
        steps, calls = (50, 4) if batch == 1 else (20, 4 if GPU else 1)
        rounds, launched = (61 if full else 15) // (3 if GPU else 1), {}
        with told(f"batch {batch}: preparing"):
            compared = cases(peers, batch, steps)
        with told(f"batch {batch}"):
            times = interleaved(compared, rounds, calls=calls, launching=launched)
        section.times[f"batch {batch}, seconds a call of {steps} steps"] = times
        cost = _a_step(times, steps)
        columns[f"batch {batch}"] = cost
        if GPU:
            columns[f"batch {batch}, clock"] = _a_step(launched, steps)
        best = fastest(cost, [name for name in cost if not name.startswith(("ours", "by hand", "the authors"))])
        if best:
            section.goals += [
                Goal(f"{output} output{how} / {best}, batch {batch}", ratio(cost, f"ours, {output}{how}", best), goal)
                for how in ("", COMPILED, GRAPH)
                for output, goal in (("dual", dual), ("single", single))
                if f"ours, {output}{how}" in cost
            ]
    section.tables = [table(["µs a step", *columns], rows(columns))]
    return section


def _a_step(times: Times, steps: int) -> Times:
    return {k: [t / steps for t in v] for k, v in above(times, "bare").items()}


def rows(columns: dict[str, Times]) -> list[list[str]]:
    """Ours first, then from fast to slow."""
    first = next(iter(columns.values()))
    names = sorted(first, key=lambda n: (not n.startswith("ours"), not n.startswith("by"), statistics.median(first[n])))
    return [
        [name, *(Spread.of(cost[name]).text(1e-6) if name in cost else "" for cost in columns.values())]
        for name in names
    ]


def cases(peers: list[ModuleType], batch: int, steps: int) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    noise, single, dual = (torch.randn((batch, c, 32, 32), generator=generator).to(PLACE) for c in (3, 3, 7))
    sampler, schedule = dualout.samplers.DDIM(steps=steps), dualout.schedules.Linear()
    network, two = subjects.Prepared(single), subjects.Prepared(dual)
    eps_model = dualout.Denoiser(network, dualout.Epsilon(), schedule).to(PLACE)
    dual_model = dualout.Denoiser(two, dualout.Dual(), schedule).to(PLACE)
    t = torch.zeros(batch, dtype=torch.long, device=PLACE)

    def bare() -> None:
        for _ in range(steps):
            network(noise, t)

    levels = [*(schedule.scalars(t) for t in sampler.timesteps(schedule)), CLEAN]
    found = {
        "bare": bare,
        "by hand, single": by_hand(network, noise, levels),
        "by hand, dual": by_hand_dual(two, noise, levels),
        "ours, single": lambda: sampler.sample(eps_model, noise),
        "ours, dual": lambda: sampler.sample(dual_model, noise),
    }
    # what --backend compile, and on a GPU --backend graph, makes of all but the network
    how, trajectory = (GRAPH, RecordedTrajectory) if GPU else (COMPILED, Fused)
    if GPU or shutil.which("c++"):
        for output, model in (("single", eps_model), ("dual", dual_model)):
            try:
                found[f"ours, {output}{how}"] = partial(trajectory(model, sampler, noise).sample, noise)
            except InputError as error:
                print(f"ours, {output}{how}: {error}", flush=True)
    for peer in peers:
        found |= peer.samplers(network, noise, steps)
        if peer.NAME == "the authors' code":
            found |= peer.samplers(two, noise, steps)
    return found


def by_hand(network: nn.Module, noise: Tensor, levels: list[Any]) -> Callable[[], Tensor]:
    times = torch.zeros(len(noise), dtype=torch.long, device=PLACE)
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
    times = torch.zeros(len(noise), dtype=torch.long, device=PLACE)
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
