"""Every sampler, parameterization and loss keeps to the device of its input, and never waits for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from dualout.calibrated import NEUTRAL, Calibrated
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.guidance import ClassifierFree
from dualout.parameterizations import Dual, Karras, LearnedVariance, Parameterization
from dualout.randomness import SeededDraw, noise
from dualout.samplers import DDIM, DDPM, FromDiffusers, Sampler
from dualout.training.distances import Energy, SlicedWasserstein
from dualout.training.ema import Ema
from dualout.training.meter import Meter
from elsewhere import NoSynchronisation
from variants import parameterizations, samplers, short

SHAPE = (2, 4, 4)
# diffusers' schedulers keep float32 coefficients, and ask for their values
OWN = pytest.mark.parametrize("sampler", [s for s in samplers() if not isinstance(s.values[0], FromDiffusers)])
EVERY = pytest.mark.parametrize("parameterization", parameterizations())


class Conv(nn.Module):
    """A small network with weights, that may be told a class."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        shift = 0 if label is None else label.view(-1, 1, 1, 1)
        return self.last(torch.tanh(self.first(x) + (t / 50).to(x.dtype).view(-1, 1, 1, 1) + shift))


def elsewhere(parameterization: Parameterization) -> Denoiser:
    """A denoiser on the device, whose schedule's tables are there already."""
    denoiser = Denoiser(Conv(parameterization.channels(2)), parameterization, short()).to("meta")
    denoiser.schedule.level(torch.zeros(1, dtype=torch.long, device="meta"))
    return denoiser


def images(count: int = 2) -> Tensor:
    return torch.empty(count, *SHAPE, device="meta")


def sampled(sampler: Sampler, denoiser: nn.Module, **conditions: Tensor) -> None:
    x = images()
    with NoSynchronisation():
        for m in sampler.trajectory(denoiser, x, lambda k: torch.empty_like(x), **conditions):  # type: ignore[arg-type]
            assert m.x_next.is_meta
            assert m.x_next.shape == x.shape
            assert all(part.is_meta for part in (m.prediction.eps, *m.prediction.parts.values()))


@OWN
@pytest.mark.parametrize("parameterization", [Dual(), Dual(gate="balanced"), Dual(ratio="step"), Karras()])
def test_no_step_waits_for_the_device(sampler: Sampler, parameterization: Parameterization) -> None:
    sampled(sampler, elsewhere(parameterization))


@pytest.mark.filterwarnings("ignore:this network learned a variance")
@EVERY
def test_no_reading_waits_for_the_device(parameterization: Parameterization) -> None:
    denoiser = elsewhere(parameterization)
    sampled(DDIM(steps=2), denoiser)
    for route in ("eps", "x0", "velocity", "flow", 0.3):
        try:
            view = denoiser.route(route)
        except InputError:
            continue  # one output, one route
        sampled(DDIM(steps=2), view)


def test_guidance_and_calibrations_do_not_wait() -> None:
    denoiser, times = elsewhere(Dual()), DDIM(steps=3).timesteps(short())
    values = {name: [value + 0.1] * 3 for name, value in NEUTRAL.items()}
    fitted = {name: torch.empty(3, device="meta") for name in NEUTRAL}
    for numbers in (values, fitted):
        sampled(DDIM(steps=3), Calibrated(denoiser, times, numbers))
    label = torch.empty(2, dtype=torch.long, device="meta")
    for null in (7, label[:1]):
        sampled(DDIM(steps=3), ClassifierFree(denoiser, 2.0, label=null), label=label)
    sampled(DDPM(steps=3, variance="learned"), elsewhere(LearnedVariance(Dual())))


@EVERY
def test_no_loss_waits_for_the_device(parameterization: Parameterization) -> None:
    denoiser, x0, noise = elsewhere(parameterization), images(3), images(3)
    average, meter = Ema(denoiser, 0.9), Meter()
    with NoSynchronisation():
        for step in (1, 2):
            loss = denoiser.loss(x0, torch.empty(3, dtype=torch.long, device="meta"), noise)
            loss.total.backward()
            average.update(step)
            meter.add(step, {"loss": loss.total, **{k: v.mean() for k, v in loss.parts.items()}}, 3)
    assert all(p.grad is not None and p.grad.is_meta for p in denoiser.parameters())


@pytest.mark.parametrize("distance", [SlicedWasserstein(), Energy()])
def test_distances_are_where_the_images_are(distance) -> None:
    made, real = (images(5).flatten(1) for _ in range(2))
    made.requires_grad_()
    distance(made, real, 0).backward()
    assert made.grad is not None
    assert made.grad.is_meta


def test_the_guard_notices_a_wait_and_what_does_not_belong_together() -> None:
    there, here = torch.empty(2, 2, device="meta"), torch.ones(2, 2)
    with NoSynchronisation():
        assert (there * torch.tensor(2.0)).is_meta
        with pytest.raises(RuntimeError, match="meta"):
            there[0, 0].item()
        for wrong in (
            lambda: here.to("meta"),
            lambda: torch.as_tensor(0.3, device="meta"),
            lambda: torch.where(there > 0, there, torch.tensor(1.0)),
            lambda: torch.lerp(there, there, torch.tensor(0.5)),
            lambda: there[torch.tensor([0])],
        ):
            with pytest.raises((AssertionError, RuntimeError)):
                wrong()


@OWN
def test_the_default_device_is_where_noise_is_and_not_the_tables(sampler: Sampler) -> None:
    spaced = dataclasses.replace(sampler, spacing="logsnr")
    with torch.device("meta"):  # as after torch.set_default_device
        denoiser, x = Denoiser(Conv(5), Dual(), short()), noise(range(2), SHAPE)
        assert x.is_meta
        assert noise(range(2), SHAPE, device="cpu").device.type == "cpu"
        assert spaced.sample(denoiser, x, SeededDraw(range(2), SHAPE)).is_meta
        assert denoiser.loss(x, torch.tensor([1, 2]), x).total.is_meta
        assert denoiser.schedule.level(3).alpha.device.type == "cpu"
    assert spaced.timesteps(denoiser.schedule) == spaced.timesteps(short())
