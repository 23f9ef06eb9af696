"""On a device without float64, everything is computed, and is what it is on the processor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dualout
from apple import Apple, here
from dualout.analysis.routes import routes
from dualout.analysis.trajectories import Gaussian, drift
from dualout.calibrated import NEUTRAL, Calibrated
from dualout.data import pixels
from dualout.data.dataset import Dataset
from dualout.denoiser import Denoiser
from dualout.evaluation.features import Features
from dualout.evaluation.statistics import Statistics
from dualout.networks.widen import as_before
from dualout.parameterizations import Dual, Epsilon, LearnedVariance, Parameterization, Upgraded
from dualout.randomness import SeededDraw, noise
from dualout.samplers import DDIM, DDPM, FromDiffusers, Sampler
from dualout.training import noised, opening, readout
from dualout.training.calibrate import Fit, fit
from dualout.training.config import TrainConfig
from dualout.training.learner import Learner
from dualout.training.loop import train
from dualout.training.upgrade import output_layer, upgrade
from variants import parameterizations, samplers, short

SHAPE = (1, 4, 4)


class Conv(nn.Module):
    """A small network with a random part."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.drop = nn.Conv2d(1, 8, 3, padding=1), nn.Dropout(0.1)
        self.down, self.last = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = torch.tanh(self.first(x) + (t / 50).to(x.dtype).view(-1, 1, 1, 1))
        return self.last(x + nn.functional.interpolate(self.drop(self.down(x)), scale_factor=2))


def model(parameterization: Parameterization) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(Conv(parameterization.channels(1)), parameterization, short()).eval()


def data(count: int = 96) -> Dataset:
    generator = np.random.default_rng(0)
    return Dataset("some", generator.integers(0, 256, (count, 4, 4), dtype=np.uint8), "nhw")


def images(count: int, device: str) -> Tensor:
    return pixels.to_model(data().batch(range(count))).to(device)


def alike(compute: Callable[[str], Any]) -> None:
    """What is computed there is what is computed here, to float32's rounding."""
    expected = compute("cpu")
    with Apple():
        got = here(compute("mps"))
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5, equal_nan=True)


def test_what_such_a_device_lacks_is_noticed() -> None:
    with Apple():
        there = torch.ones(2, device="mps")
        assert here(there * 2).tolist() == [2.0, 2.0]
        for wrong, error, said in (
            (lambda: there.double(), TypeError, "float64"),
            (lambda: torch.ones(2, dtype=torch.float64).to("mps"), TypeError, "float64"),
            (lambda: torch.zeros(2, dtype=torch.float64, device="mps"), TypeError, "float64"),
            (lambda: torch.ones(2).to("mps", non_blocking=True), RuntimeError, "without waiting"),
            (lambda: there + torch.ones(2), AssertionError, "tensor of the host"),
            (lambda: torch.special.log_ndtr(there), NotImplementedError, "log_ndtr"),
            (lambda: nn.utils.get_total_norm([there], foreach=True), RuntimeError, "foreach"),
            (lambda: there.numpy(), (TypeError, RuntimeError), ""),
        ):
            with pytest.raises(error, match=said):
                wrong()


@pytest.mark.parametrize("sampler", samplers())
def test_samplers(sampler: Sampler) -> None:
    if isinstance(sampler, FromDiffusers):
        sampler = replace(sampler, scheduler="DPMSolverMultistepScheduler")
    denoiser = model(Dual(gate="balanced"))

    def made(device: str) -> Tensor:
        draw = SeededDraw(range(2), SHAPE, device=device)
        return sampler.sample(denoiser.to(device), noise(range(2), SHAPE, device=device), draw)

    alike(made)


@pytest.mark.filterwarnings("ignore:this network learned a variance")
@pytest.mark.parametrize("parameterization", parameterizations())
def test_losses_and_readings(parameterization: Parameterization) -> None:
    denoiser = model(parameterization)

    def looked(device: str) -> Any:
        there, x0 = copy.deepcopy(denoiser).to(device), images(4, device)
        t = torch.tensor([0, 1, 30, 49], device=device)
        loss = there.loss(x0, t, noise(range(4), SHAPE, device=device))
        loss.total.backward()
        gradients = {k: p.grad for k, p in there.named_parameters() if p.grad is not None}
        return loss.parts, gradients, DDIM(steps=2).sample(there, noise(range(2), SHAPE, device=device))

    alike(looked)


def test_calibrated_and_learned_variance() -> None:
    times = DDIM(steps=3).timesteps(short())
    values = {name: [value + 0.1] * 3 for name, value in NEUTRAL.items()}

    def made(device: str) -> Any:
        start, draw = noise(range(2), SHAPE, device=device), SeededDraw(range(2), SHAPE, device=device)
        one = DDIM(steps=3).sample(Calibrated(model(Dual()).to(device), times, values), start)
        learned = model(LearnedVariance(Dual())).to(device)
        return one, DDPM(steps=3, variance="learned").sample(learned, start, draw)

    alike(made)


@pytest.mark.parametrize("parameterization", [Dual(), LearnedVariance(Dual(ratio="step"))])
def test_training(parameterization: Parameterization) -> None:
    config = TrainConfig(steps=3, batch_size=8, accumulate=2, precision="fp32", warmup=1, lr=1e-3)

    def trained(device: str) -> Any:
        learner = Learner(model(parameterization).to(device), config)
        metrics = [step.metrics for step in train(learner, data())][-1]
        assert metrics is not None
        assert learner.finite()
        again = Learner(model(parameterization).to(device), config)
        again.load(here(learner.tensors()), learner.numbers(), "here")
        return metrics["loss"], again.tensors()

    alike(trained)


@pytest.mark.parametrize("spec", ["pixels", "random:width=4"])
def test_features_and_their_statistics(spec: str) -> None:
    def gathered(device: str) -> Any:
        statistics = Statistics()
        statistics.add(Features.parse(spec)(data().batch(range(8)).to(device)))
        return statistics.moments, statistics.features

    alike(gathered)


def test_analysis() -> None:
    def found(device: str) -> Any:
        denoiser, real = model(Dual(ratio="channel")).to(device), images(6, device)
        measured = [(at.row, at.reliability, at.ratio_map) for at in routes(denoiser, real, [3, 40])]
        return measured, drift(denoiser, DDPM(steps=3), Gaussian.of(real), range(4), SHAPE)

    alike(found)


def test_a_calibration() -> None:
    how = Fit(iterations=1, batch=8, held_out=16, move_times=1, check_every=1)

    def fitted(device: str) -> Any:
        last = list(fit(model(Dual()).to(device), DDIM(steps=2), images(96, device), how))[-1]
        return last.held_out, last.calibration.protocol["held_out_before"]

    alike(fitted)


def test_an_upgrade() -> None:
    source = upgrade(model(Epsilon()), layer="last", example=(torch.zeros(1, *SHAPE), torch.ones(1).long()))
    assert isinstance(source.parameterization, Upgraded)

    def measured(device: str) -> Any:
        denoiser = copy.deepcopy(source).to(device)
        name = output_layer(denoiser.network)  # type: ignore[arg-type]
        stream = noised.Stream(data(), np.arange(16), noised.Bins(50, 2, 0), torch.device(device), batch_size=8)
        moments, rows = readout.collect(denoiser, name, slice(1, 2), stream, 2, pixels=8)
        layer = denoiser.network.get_submodule(name)  # type: ignore[union-attr]
        readout.write_rows(layer, rows, moments.solve(ridge=1e-3))
        errors = opening.measure(denoiser, stream, 2)
        return vars(moments), vars(errors), layer.weight

    alike(measured)

    def same(device: str) -> list[bool]:
        one = torch.ones(3, device=device)
        return [as_before(one, one, False), as_before(one, 2 * one, False)]

    alike(same)


def test_dropout_is_drawn_from_the_seed_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    config = TrainConfig(steps=2, batch_size=4, precision="fp32")
    with Apple():
        for learner in [Learner(model(Dual()).to("mps"), config) for _ in range(2)]:
            with monkeypatch.context() as patched:
                patched.setattr(torch.mps, "manual_seed", seeds.append)
                list(train(learner, data()))
    assert seeds[:2] == seeds[2:]
    assert seeds[0] != seeds[1]


def test_noise_levels_are_float32_there_and_float64_elsewhere() -> None:
    schedule = dualout.schedules.Linear()
    t = torch.tensor([0, 999])
    with Apple():
        there = schedule.level(t.to("mps"))
        assert there.alpha.dtype == torch.float32
        torch.testing.assert_close(here(there.alpha), schedule.level(t).alpha.float())
