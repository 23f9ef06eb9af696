"""Compiled steps are those of eager torch, in any batch, for every sampler that plans in numbers."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout.errors import InputError
from dualout.evaluation.model import Model
from dualout.evaluation.sampling import Sampling
from dualout.networks.backends import compile as compiled
from dualout.networks.backends import fused
from dualout.networks.backends.fused import Fused
from dualout.samplers import Sampler

SHAPE = (2, 4, 4)


class Net(nn.Module):
    def __init__(self, channels: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * (1 + t.view(-1, 1, 1, 1) / 1000)


def denoiser(parameterization: dualout.Parameterization | None = None) -> dualout.Denoiser:
    parameterization = parameterization or dualout.Dual()
    return dualout.Denoiser(Net(parameterization.channels(2)), parameterization, dualout.schedules.Linear()).eval()


def made(model: dualout.Denoiser, sampler: Sampler, seeds: range, by: Fused | None = None) -> Tensor:
    noise, draw = dualout.noise(seeds, SHAPE), dualout.SeededDraw(seeds, SHAPE)
    return sampler.sample(model, noise, draw) if by is None else by.sample(noise, draw)


@pytest.fixture
def quick(monkeypatch):
    """torch.compile without a compiler of C++: the same functions, operation by operation."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def samplers() -> list[Sampler]:
    found = [kind(steps=4) for name, kind in Sampler.kinds().items() if name != "diffusers"]
    found = [sampler for sampler in found if sampler.evaluations == sampler.steps]
    noisy = dualout.samplers.DPMSolver(steps=4, eta=1.0, reach=1.5)
    return [*found, dualout.samplers.DDIM(steps=4, eta=0.7, clip=None), noisy]


@pytest.mark.parametrize("sampler", samplers(), ids=lambda sampler: sampler.spec)
def test_images_are_those_of_eager_torch(quick, sampler):
    model = denoiser()
    one = Fused(model, sampler, dualout.noise(range(3), SHAPE))
    expected, got = made(model, sampler, range(3)), made(model, sampler, range(3), one)
    assert expected.std() > 0.1
    assert float((got - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize(
    "parameterization",
    [
        dualout.Epsilon(),
        dualout.Velocity(),
        dualout.Karras(),
        dualout.Dual(gate="balanced"),
    ],
)
def test_whatever_the_network_says(quick, parameterization):
    model, sampler = denoiser(parameterization), dualout.samplers.DDIM(steps=2)
    one = Fused(model, sampler, dualout.noise(range(3), SHAPE))
    expected = made(model, sampler, range(3))
    assert float((made(model, sampler, range(3), one) - expected).norm() / expected.norm()) < 1e-6


def test_steps_share_functions_and_nothing_is_compiled_later(quick, monkeypatch):
    model = denoiser()
    one = Fused(model, dualout.samplers.DDIM(steps=20), dualout.noise(range(2), SHAPE))
    # the last step leads to no noise: there, x_t has no part in the images
    assert [turn.run is one.turns[0].run for turn in one.turns] == [True] * 19 + [False]
    monkeypatch.setattr(torch, "compile", None)
    one.sample(dualout.noise(range(5), SHAPE))


def test_images_do_not_depend_on_their_batch(quick):
    model, sampler = denoiser(), dualout.samplers.DDIM(steps=2, eta=1.0)
    one = Fused(model, sampler, dualout.noise(range(4), SHAPE))
    got = made(model, sampler, range(4), one)
    assert torch.equal(made(model, sampler, range(2), one), got[:2])
    assert torch.equal(made(model, sampler, range(6), one)[:4], got)
    assert torch.equal(made(model, sampler, range(6), one)[5], made(model, sampler, range(5, 6), one)[0])


def test_conditions_go_with_their_images(quick):
    def network(x: Tensor, t: Tensor, *, class_labels: Tensor) -> Tensor:
        return 0 * x + class_labels.view(-1, 1, 1, 1) / 10

    model, noise = (
        dualout.Denoiser(network, dualout.CleanImage(), dualout.schedules.Linear()),
        dualout.noise(range(5), SHAPE),
    )
    one = Fused(model, dualout.samplers.DDIM(steps=1), noise[:2], class_labels=torch.tensor([0, 1]))
    got = one.sample(noise, class_labels=torch.arange(5))
    torch.testing.assert_close(got[:, 0, 0, 0], torch.arange(5) / 10)


def test_other_noise_than_it_was_made_for_is_refused(quick):
    one = Fused(denoiser(), dualout.samplers.DDIM(steps=1), dualout.noise(range(2), SHAPE))
    for wrong in (torch.zeros(2, 2, 4, 5), torch.zeros(2, *SHAPE, dtype=torch.float64)):
        with pytest.raises(InputError, match=r"made for \(2, 4, 4\) of torch.float32 on cpu, and this noise is"):
            one.sample(wrong)


def test_samplers_that_look_twice_or_count_are_refused():
    for sampler in (dualout.samplers.Heun(steps=3), dualout.samplers.FromDiffusers(steps=3)):
        with pytest.raises(InputError, match="looks more than once a step, or has a state of its own"):
            Fused(denoiser(), sampler, dualout.noise(range(2), SHAPE))


def test_a_step_that_differs_is_refused(quick, monkeypatch):
    turn = fused._turn
    monkeypatch.setattr(fused, "_turn", lambda *a: lambda *given: tuple(1.001 * x for x in turn(*a)(*given)))
    with pytest.raises(InputError, match=r"a step of ddim:steps=3 differs by 0\.001 of the images"):
        Fused(denoiser(), dualout.samplers.DDIM(steps=3), dualout.noise(range(2), SHAPE))


def test_what_is_left_unread_is_said(quick):
    model = denoiser(dualout.LearnedVariance())
    with pytest.warns(UserWarning, match="learned a variance, which the sampler ddpm:steps=2 does not use"):
        Fused(model, dualout.samplers.DDPM(steps=2), dualout.noise(range(2), SHAPE))


def sampling(**options) -> Sampling:
    model = Model("runs/small", denoiser(), SHAPE, None, {"sha256": "0"})
    return Sampling(model, dualout.samplers.DDIM(steps=2), **options)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler of C++")
def test_sample_and_evaluate_have_their_steps_compiled_where_it_is_repaid(monkeypatch):
    # that the network is compiled has a test of its own, and takes long
    monkeypatch.setattr(compiled.Compile, "prepare", lambda self, network, call, precision: network)
    few = sampling(backend="compile")
    expected = few.images(range(3)).int()
    assert few.computed()["computed_by"]["steps"] == "eager"
    monkeypatch.setattr(compiled, "REPAID_NUMBERS", 1)
    many = sampling(backend="compile")
    got = many.images(range(3))
    assert many.computed()["computed_by"]["steps"] == "compile"
    assert int((got - expected).abs().max()) <= 1
    assert torch.equal(many.images(range(5))[:3], got)


def test_what_cannot_be_compiled_is_taken_by_eager_torch(monkeypatch):
    monkeypatch.setattr(compiled, "REPAID_NUMBERS", 1)
    monkeypatch.setattr(compiled.Compile, "prepare", lambda self, network, call, precision: network)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda *a: 1 / 0))
    got = sampling(backend="compile")
    assert torch.equal(got.images(range(3)), sampling().images(range(3)))
    assert "cannot compile this step here: " in got.computed()["computed_by"]["steps"]
