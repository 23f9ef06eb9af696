"""Vectors from a separate float64 implementation (README.md beside this file says what each is)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dualout.denoiser import Denoiser
from dualout.parameterizations import CleanImage, Dual, Epsilon, Velocity
from dualout.parameterizations.base import subtract
from dualout.parameterizations.dual import optimal_ratio
from dualout.samplers import DDIM, DDPM, DPMSolver, Sampler
from dualout.schedules import Cosine, Linear, Schedule
from oracles import GAUSSIAN, MIXTURE, toy_denoiser, toy_output

GOLDEN = np.load(Path(__file__).with_name("golden.npz"))
SCHEDULES: dict[str, Schedule] = {"linear": Linear(), "cosine": Cosine()}
BOTH = pytest.mark.parametrize("name", SCHEDULES)
BOUNDS = pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
SAMPLERS = {
    "ddpm_small": (DDPM, {"variance": "small"}),
    "ddpm_large": (DDPM, {"variance": "large"}),
    "ddim_eta0.0": (DDIM, {"eta": 0.0}),
    "ddim_eta0.5": (DDIM, {"eta": 0.5}),
    "ddim_eta1.0": (DDIM, {"eta": 1.0}),
    "dpmpp2m": (DPMSolver, {"order": 2}),
}


def golden(*key: object) -> Tensor:
    return torch.from_numpy(GOLDEN["/".join(map(str, key))])


def close(ours: Tensor, name: str, *key: object, bound: float) -> None:
    """Compare, sample by sample, with the largest number of the sample as the scale."""
    theirs = golden(name, *key)
    assert ours.shape == theirs.shape
    scale = theirs.abs().flatten(1).amax(1).view(-1, *[1] * (theirs.ndim - 1)) if theirs.ndim > 1 else theirs.abs()
    error = ((ours.double() - theirs).abs() / scale.clamp(min=1e-300)).flatten(1 if theirs.ndim > 1 else 0)
    assert error.max() <= bound, f"{name}/{key}: {error.max():.1e}"


def step(name: str, dtype: torch.dtype, detach: bool = True) -> tuple[Denoiser, Tensor, Tensor]:
    raw = golden(name, "step/out").to(dtype).requires_grad_()
    return Denoiser(lambda x, t: raw, Dual(detach=detach), SCHEDULES[name]), raw, golden(name, "step/i").long()


@BOTH
def test_tables(name: str) -> None:
    schedule, signal, posterior = SCHEDULES[name], golden(name, "ab"), golden(name, "post")
    level = schedule.level(torch.arange(1000))
    alpha, sigma, gain = level.alpha, level.sigma, level.gain
    torch.testing.assert_close(schedule.variances(), golden(name, "betas"), rtol=1e-12, atol=0)  # type: ignore[attr-defined]
    for ours, theirs in ((alpha**2, signal), (sigma**2, 1 - signal), (gain, posterior[:, 0])):
        # 1 − ᾱ near ᾱ = 1, and ᾱ near 0, lose digits in any implementation
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
    snr = schedule.log_snr.exp()[golden(name, "step/i").long()]
    close(snr.clamp(max=1), name, "step/w_minsnr1", bound=1e-9)


@BOTH
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_steps(name: str, variance: str) -> None:
    # all thousand steps, each by the posterior's own columns
    gain, rest, *variances = golden(name, "post").T
    spread = variances[0 if variance == "small" else 1].sqrt()
    belief, z = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: belief, CleanImage(), SCHEDULES[name])
    sampler = DDPM(steps=1000, variance=variance, spacing="leading", clip=None)
    for m in sampler.trajectory(denoiser, torch.randn_like(z), draw=lambda k: z):
        noise = spread[m.t] if m.t > 0 else 0  # the last step adds none
        expected = gain[m.t] * belief + rest[m.t] * m.x_t + noise * z
        torch.testing.assert_close(m.x_next, expected, rtol=1e-9, atol=1e-9)


@BOTH
@BOUNDS
def test_reading(name: str, dtype: torch.dtype, bound: float) -> None:
    denoiser, _, t = step(name, dtype)
    p = denoiser(golden(name, "step/xt").to(dtype), t)
    close(p.x0.detach(), name, "step/x0_mix", bound=bound)
    close(p.parts["ratio"].detach(), name, "step/r", bound=bound)
    close(subtract(p.parts["eps"], p.x_t, p.level).detach(), name, "step/x0_from_eps_head", bound=bound)
    if dtype == torch.float64:  # the eps of a huge x0 is a small difference
        close(p.eps.detach(), name, "step/eps_mix", bound=bound)
        close(denoiser.route("x0")(p.x_t, t).eps.detach(), name, "step/eps_from_x_head", bound=bound)
    # samples 3, 4 and 5 have the ratios 1, 0 and ½
    torch.testing.assert_close(p.x0[3].detach(), p.parts["x0"][3].detach(), rtol=bound, atol=bound)
    assert p.parts["ratio"][5].detach().double().sub(0.5).abs().max() < bound


@BOTH
@BOUNDS
def test_noising(name: str, dtype: torch.dtype, bound: float) -> None:
    alpha, sigma = SCHEDULES[name].level(golden(name, "step/i").long()).like(golden(name, "step/x0").to(dtype))[:2]
    close(
        alpha * golden(name, "step/x0").to(dtype) + sigma * golden(name, "step/eps").to(dtype),
        name,
        "step/xt",
        bound=bound,
    )


@BOTH
@BOUNDS
def test_losses(name: str, dtype: torch.dtype, bound: float) -> None:
    denoiser, _, t = step(name, dtype)
    loss = denoiser.loss(golden(name, "step/x0").to(dtype), t, golden(name, "step/eps").to(dtype))
    for part, key in (("eps", "L_eps"), ("x0", "L_x"), ("mu", "L_mu")):
        close(loss.parts[part].detach(), name, "step", key, bound=bound)
    expected = sum(golden(name, "step", key).mean() for key in ("L_eps", "L_x", "L_mu")) / 3
    assert loss.total.item() == pytest.approx(float(expected), rel=bound)


@BOTH
@BOUNDS
@pytest.mark.parametrize(("detach", "key"), [(True, "grad_total_sg1"), (False, "grad_total_sg0")])
def test_gradients(name: str, dtype: torch.dtype, bound: float, detach: bool, key: str) -> None:
    denoiser, raw, t = step(name, dtype, detach)
    loss = denoiser.loss(golden(name, "step/x0").to(dtype), t, golden(name, "step/eps").to(dtype))
    (3 * loss.total).backward()
    assert raw.grad is not None
    channels = raw.shape[1] // 2
    for head in (slice(0, channels), slice(channels, 2 * channels), slice(2 * channels, None)):
        # each head at its own scale: the gate's gradients are smaller by many orders of magnitude
        theirs, ours = golden(name, "step", key)[:, head], raw.grad[:, head].double()
        scale = theirs.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
        assert ((ours - theirs).abs() <= bound * scale + 1e-300).all()


@BOTH
def test_means_mix_as_clean_images_do(name: str) -> None:
    denoiser, _, t = step(name, torch.float64)
    p = denoiser(golden(name, "step/xt"), t)
    mean = {k: golden(name, "post")[t, k].view(-1, 1, 1, 1) for k in (0, 1)}
    for x0, key in (
        (p.x0, "mu"),
        (p.parts["x0"], "mu_x"),
        (subtract(p.parts["eps"], p.x_t, p.level), "mu_eps"),
        (golden(name, "step/x0"), "mu_true"),
    ):
        gain = p.level.gain
        assert gain is not None
        close((gain * x0 + mean[1] * p.x_t).detach(), name, "step", key, bound=1e-9)
    torch.testing.assert_close(p.level.gain, mean[0], rtol=1e-9, atol=1e-13)


@BOTH
def test_one_error_in_every_loss(name: str) -> None:
    # w turns |x0 − x0_mix|² into the loss of that name
    schedule, t = SCHEDULES[name], golden(name, "step/i").long()
    x0, eps, x_t = (golden(name, "step", key) for key in ("x0", "eps", "xt"))
    mix = step(name, torch.float64)[0](x_t, t)
    error = (x0 - mix.x0).square().flatten(1).mean(1).detach()
    alpha, sigma = mix.level.alpha, mix.level.sigma
    raw = {"eps": (Epsilon(), mix.eps), "v": (Velocity(), alpha * mix.eps - sigma * mix.x0)}
    for key, (parameterization, output) in raw.items():
        denoiser = Denoiser(lambda x, t, output=output: output, parameterization, schedule)
        (part,) = denoiser.loss(x0, t, eps).parts.values()
        # near ᾱ = 1 the loss on eps is the square of a small difference
        torch.testing.assert_close(part.detach() / error, golden(name, f"step/w_{key}"), rtol=1e-6, atol=0)
    torch.testing.assert_close(mix.level.gain.flatten() ** 2, golden(name, "step/w_mu"), rtol=1e-9, atol=1e-20)  # type: ignore[union-attr]
    assert (golden(name, "step/w_x0") == 1).all()


@pytest.mark.parametrize("key", [k for k in GOLDEN.files if k.startswith("ts/")])
def test_spacings(key: str) -> None:
    _, spacing, steps = key.split("/")
    assert DDIM(steps=int(steps), spacing=spacing).timesteps(Linear()) == GOLDEN[key].tolist()


@BOTH
@BOUNDS
def test_the_toy_network_is_the_same(name: str, dtype: torch.dtype, bound: float) -> None:
    x = golden(name, "xT").to(dtype)
    for t, theirs in zip(golden(name, "step/i").tolist(), golden(name, "toy_out"), strict=True):
        ours = toy_output(x, SCHEDULES[name].level(torch.full((len(x),), t)))
        assert ((ours.double() - theirs).abs() <= bound * theirs.abs().clamp(min=1)).all()


@pytest.mark.parametrize("key", [k for k in GOLDEN.files if "/traj/" in k])
@BOUNDS
def test_trajectories(key: str, dtype: torch.dtype, bound: float) -> None:
    name, _, clip, steps, method = key.split("/")
    cls, fields = SAMPLERS[method]
    sampler = cls(steps=int(steps[1:]), clip=(-1.0, 1.0) if clip == "clip1" else None, **fields)
    noise = golden(name, "noise").to(dtype)
    denoiser = toy_denoiser(SCHEDULES[name], Dual())
    moments = list(sampler.trajectory(denoiser, golden(name, "xT").to(dtype), draw=lambda k: noise[k]))
    states = torch.stack([*(m.x_t for m in moments), moments[-1].x_next])
    assert states.dtype == dtype
    close(states, key, bound=bound)


@pytest.mark.parametrize("key", [k for k in GOLDEN.files if "/gauss/" in k or "/gmm/" in k])
def test_ends_with_exact_denoisers(key: str) -> None:
    name, data, steps, method = key.split("/")
    cls, fields = SAMPLERS[method]
    noise = golden(name, "noise")
    oracle = {"gauss": GAUSSIAN, "gmm": MIXTURE}[data]
    sampler: Sampler = cls(steps=int(steps[1:]), clip=None, **fields)
    ends = sampler.sample(oracle.denoiser(SCHEDULES[name]), golden(name, "xT"), draw=lambda k: noise[k])
    close(ends, key, bound=1e-9)


@BOTH
def test_optimal_ratio(name: str) -> None:
    cases: Any = golden(name, "ropt/varx_vare_rho")
    for row, t in enumerate(golden(name, "ropt/i").tolist()):
        ours = [optimal_ratio(SCHEDULES[name].scalars(t), *map(float, case)) for case in cases]
        exact = torch.tensor(ours, dtype=torch.float64)
        torch.testing.assert_close(exact, golden(name, "ropt/r")[row], rtol=1e-9, atol=1e-12)
