"""The paper's method written once more, from the paper, with none of the package's code.

Benny & Wolf, arXiv 2203.04304, section 3. Steps count from 1, the network's output is [x0, eps, r], and the two
routes are mixed in the mean of the posterior rather than in x0; the package must agree in spite of all three.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dualout import Denoiser, Dual
from dualout.samplers import DDIM, DDPM
from dualout.schedules import Linear

Network = Callable[[Tensor, Tensor], Tensor]
T, C, BOUND = 1000, 3, 2e-3
BETA = np.linspace(1e-4, 0.02, T)
ALPHA_BAR = np.concatenate([[1.0], np.cumprod(1 - BETA)])  # ᾱ_0 = 1, ᾱ_1 … ᾱ_T


def column(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def posterior_mean(x0: Tensor, x_t: Tensor, now: np.ndarray, before: np.ndarray) -> Tensor:
    """μ̃ of q(x_s | x_t, x0): √ᾱ_s·β/(1−ᾱ_t)·x0 + √(1−β)·(1−ᾱ_s)/(1−ᾱ_t)·x_t, with β = 1 − ᾱ_t/ᾱ_s."""
    beta = 1 - now / before
    return column(np.sqrt(before) * beta / (1 - now)) * x0 + column(np.sqrt(1 - beta) * (1 - before) / (1 - now)) * x_t


def outputs(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return raw[:, :C], raw[:, C : 2 * C], torch.sigmoid(raw[:, 2 * C :])


def paper_loss(network: Network, x0: Tensor, n: np.ndarray, eps: Tensor) -> Tensor:
    """L_simple of both outputs and of the mixed mean, the last with both routes' gradients stopped."""
    now, before = ALPHA_BAR[n], ALPHA_BAR[n - 1]
    x_t = column(np.sqrt(now)) * x0 + column(np.sqrt(1 - now)) * eps
    x_theta, eps_theta, r = outputs(network(x_t, torch.from_numpy(n)))
    from_eps = (x_t - column(np.sqrt(1 - now)) * eps_theta) / column(np.sqrt(now))
    mean_x = posterior_mean(x_theta, x_t, now, before).detach()
    mean_eps = posterior_mean(from_eps, x_t, now, before).detach()
    mean = r * mean_x + (1 - r) * mean_eps
    target = posterior_mean(x0, x_t, now, before)
    return ((eps - eps_theta) ** 2).mean() + ((x0 - x_theta) ** 2).mean() + ((target - mean) ** 2).mean()


def paper_sample(network: Network, x: Tensor, visited: list[int], noise: list[Tensor] | None, clip: bool) -> Tensor:
    """Algorithm 2 over some of the steps: DDIM without noise, DDPM with the variance β."""
    for k, (n, m) in enumerate(zip(visited, [*visited[1:], 0], strict=True)):
        now, before = np.full(len(x), ALPHA_BAR[n]), np.full(len(x), ALPHA_BAR[m])
        x_theta, eps_theta, r = outputs(network(x, torch.full((len(x),), n)))
        from_eps = (x - column(np.sqrt(1 - now)) * eps_theta) / column(np.sqrt(now))
        mixed = r * x_theta + (1 - r) * from_eps
        kept = mixed.clamp(-1, 1) if clip else mixed
        if noise is None:
            eps = (x - column(np.sqrt(now)) * mixed) / column(np.sqrt(1 - now))
            x = column(np.sqrt(before)) * kept + column(np.sqrt(1 - before)) * eps
        else:
            x = posterior_mean(kept, x, now, before)
            if m > 0:
                x = x + column(np.sqrt(1 - now / before)) * noise[k]
    return x


class Small(torch.nn.Module):
    """A network of the paper's convention: steps from 1, channels [x0, eps, r]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(C, 16, 3, padding=1)
        self.time = torch.nn.Linear(1, 16)
        self.last = torch.nn.Conv2d(16, 2 * C + 1, 3, padding=1)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        hidden = self.first(x) + self.time(n.to(x.dtype).view(-1, 1) / T)[:, :, None, None]
        return self.last(torch.nn.functional.silu(hidden))


def permuted(network: Network) -> Network:
    """The same network in the package's convention: steps from 0, channels [eps, x0, r]."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        x0, eps, r = network(x, t + 1).split([C, C, 1], 1)
        return torch.cat([eps, x0, r], 1)

    return call


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradients(seed: int) -> None:
    torch.manual_seed(seed)
    network = Small()
    x0, eps = torch.rand(8, C, 8, 8) * 2 - 1, torch.randn(8, C, 8, 8)
    n = np.array([1, 2, 10, 100, 300, 700, 999, 1000])
    weights = list(network.parameters())
    theirs = paper_loss(network, x0, n, eps)
    ours = 3 * Denoiser(permuted(network), Dual(), Linear()).loss(x0, torch.from_numpy(n - 1), eps).total
    assert ours.item() == pytest.approx(theirs.item(), rel=BOUND)
    for a, b in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True):
        assert relative(a, b) < BOUND
        assert b.abs().max() > 0


@pytest.mark.parametrize("n", [1, 2, 10, 100, 500, 1000])
def test_gate_gradients_at_one_step(n: int) -> None:
    # at high noise they are many orders smaller than the heads': compared alone, at their own scale, and the paper's
    # in float64, since it subtracts two means that agree to eight digits
    network = Small()
    x0, eps = torch.rand(4, C, 8, 8) * 2 - 1, torch.randn(4, C, 8, 8)
    ours = 3 * Denoiser(permuted(network), Dual(), Linear()).loss(x0, torch.full((4,), n - 1), eps).total
    (a,) = torch.autograd.grad(ours, [network.last.weight])
    exact = network.double()
    theirs = paper_loss(exact, x0.double(), np.full(4, n), eps.double())
    (b,) = torch.autograd.grad(theirs, [exact.last.weight])
    for head in (slice(0, C), slice(C, 2 * C), slice(2 * C, None)):
        assert relative(a[head], b[head]) < BOUND


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("ancestral", [False, True])
def test_sampling(ancestral: bool, steps: int, clip: bool) -> None:
    network = Small()
    x = torch.randn(4, C, 8, 8)
    noise = [torch.randn(4, C, 8, 8) for _ in range(steps)]
    visited = [T - k * T // steps for k in range(steps)]
    kind = DDPM if ancestral else DDIM
    sampler = kind(steps=steps, spacing="trailing", clip=(-1.0, 1.0) if clip else None)
    assert sampler.timesteps(Linear()) == [n - 1 for n in visited]
    ours = sampler.sample(Denoiser(permuted(network), Dual(), Linear()), x, draw=lambda k: noise[k])
    with torch.no_grad():
        theirs = paper_sample(network, x, visited, noise if ancestral else None, clip)
    assert relative(ours, theirs) < BOUND
