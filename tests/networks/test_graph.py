"""Recorded trajectories are those of eager torch; where there is no GPU, `Replayed` plays its part."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout.calibrated import Calibrated
from dualout.errors import InputError
from dualout.evaluation.model import Model
from dualout.evaluation.sampling import Sampling
from dualout.guidance import ClassifierFree
from dualout.networks import build
from dualout.networks.backends import Call, graph
from dualout.networks.backends.base import Plain
from dualout.networks.backends.graph import RecordedTrajectory, Recording
from dualout.networks.backends.half import Half, plain_of
from dualout.networks.precision import Precision
from dualout.samplers import Sampler
from replayed import Replayed

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (2, 4, 4)
on_gpu = pytest.mark.skipif(PLACE.type == "cpu", reason="needs a GPU")


class Net(nn.Module):
    def __init__(self, channels: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.told = nn.Conv2d(2, channels, 3, padding=1), nn.Embedding(4, 2)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        if class_labels is not None:
            x = x + self.told(class_labels)[:, :, None, None]
        return self.conv(x) * (1 + t.view(-1, 1, 1, 1) / 1000)


@pytest.fixture(autouse=True)
def _standing_in(monkeypatch):
    if PLACE.type == "cpu":
        monkeypatch.setattr(graph, "Recording", Replayed)


@pytest.fixture
def model() -> dualout.Denoiser:
    return dualout.Denoiser(Net(), dualout.Dual(), dualout.schedules.Linear()).eval().to(PLACE)


def samplers() -> list[Sampler]:
    kinds = [kind for name, kind in Sampler.kinds().items() if name != "diffusers"]
    return [*(kind(steps=4) for kind in kinds), dualout.samplers.DDIM(steps=4, eta=0.7, clip=None)]


def given(seeds: range) -> tuple[Tensor, dualout.SeededDraw]:
    return dualout.noise(seeds, SHAPE, device=PLACE), dualout.SeededDraw(seeds, SHAPE, device=PLACE)


@pytest.mark.parametrize("sampler", samplers(), ids=lambda sampler: sampler.spec)
def test_images_are_those_of_eager_torch_in_any_batch(model, sampler):
    one = RecordedTrajectory(model, sampler, dualout.noise(range(3), SHAPE, device=PLACE))
    for seeds in (range(3), range(5, 8), range(2), range(7)):
        expected = sampler.sample(model, *given(seeds))
        assert torch.allclose(one.sample(*given(seeds)), expected, atol=1e-5)


def test_guidance_and_calibration_are_recorded(model):
    sampler, labels = dualout.samplers.DDIM(steps=3), torch.tensor([0, 1, 2], device=PLACE)
    values = {"x0_scale": [1.1, 1.0, 0.9], "ratio_shift": [0.5, 0.0, -0.5], "x0_trend": [0.0, 0.4, 0.2]}
    view = ClassifierFree(
        Calibrated(model, sampler.timesteps(model.schedule), values), 1.5, class_labels=torch.tensor(3, device=PLACE)
    )
    one = RecordedTrajectory(view, sampler, given(range(3))[0], class_labels=labels)
    for told in (labels, labels.flip(0)):
        noise = given(range(4, 7))[0]
        assert torch.allclose(
            one.sample(noise, class_labels=told), sampler.sample(view, noise, class_labels=told), atol=1e-5
        )
    assert not torch.allclose(one.sample(noise, class_labels=labels), one.sample(noise, class_labels=labels.flip(0)))


def test_without_a_draw_the_noise_is_fresh(model):
    sampler = dualout.samplers.DDPM(steps=4)
    one, noise = RecordedTrajectory(model, sampler, given(range(3))[0]), given(range(3))[0]
    assert not torch.allclose(one.sample(noise), one.sample(noise))


def test_noise_of_another_shape_is_refused(model):
    one = RecordedTrajectory(model, dualout.samplers.DDIM(steps=2), given(range(3))[0])
    with pytest.raises(InputError, match=r"made for \(2, 4, 4\) .* this noise is \(2, 8, 8\)"):
        one.sample(torch.zeros(3, 2, 8, 8, device=PLACE))


def test_few_trajectories_and_long_ones_are_not_recorded_as_a_whole(model):
    noise = given(range(2))[0]
    assert graph.recorded(model, dualout.samplers.DDIM(steps=5), noise, {}, 19) is None
    assert graph.recorded(model, dualout.samplers.DDIM(steps=5), noise, {}, 20) is not None
    with pytest.raises(InputError, match="more than 100 evaluations"):
        graph.recorded(model, dualout.samplers.DDIM(steps=101), noise, {}, 10_000)


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["graph", "compile"])
def test_images_of_the_backend_are_those_of_eager(model, backend, precision):
    whole = Model("runs/net", model, SHAPE, 3, {"sha256": "0"})
    for sampler in (dualout.samplers.DPMSolver(steps=4, order=2), dualout.samplers.DDPM(steps=4)):
        eager = Sampling(whole, sampler, precision=precision)
        other = Sampling(whole, sampler, precision=precision, backend=backend)
        other.prepare(5, 1000)
        expected = eager.images(range(12)).int()
        assert (other.images(range(12)).int() - expected).abs().float().mean() < (0.05 if precision == "fp32" else 2)
        assert other.computed()["computed_by"]["steps"] == backend
        # what autocast made half precision for the recording is not met outside it
        assert torch.equal(eager.images(range(12)).int(), expected)


@on_gpu
def test_what_waits_for_the_gpu_is_refused_and_nothing_is_spoilt():
    x = torch.randn(4, device=PLACE)
    with pytest.raises(InputError, match="cannot be recorded as a CUDA graph"):
        Recording(lambda v: v * float(v.sum()), x)
    assert torch.equal(Recording(lambda v: v + torch.ones_like(v), x)(2 * x), 2 * x + 1)
    assert torch.randn(3, device=PLACE).isfinite().all()


@on_gpu
def test_weights_may_be_changed_where_they_are(model):
    sampler, noise = dualout.samplers.DDIM(steps=3), given(range(3))[0]
    one = RecordedTrajectory(model, sampler, noise)
    with torch.no_grad():
        model.network.conv.weight.mul_(0.5)  # type: ignore[union-attr, operator]
    assert torch.allclose(one.sample(noise), sampler.sample(model, noise), atol=1e-5)


def unet() -> tuple[nn.Module, Call]:
    network = build("tiny:width=8", 1, 8, 3).eval()
    for p in network.parameters():  # the last layer begins with zeros
        nn.init.normal_(p, std=0.1) if p.ndim > 1 else None
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return network.to(PLACE), Call(x.to(PLACE), torch.full((4,), 500, device=PLACE), {})


def test_half_precision_is_throughout_where_the_network_allows_it():
    network, call = unet()
    bf16 = Precision("bf16", PLACE, "")
    half = plain_of(network, call, bf16)
    assert isinstance(half, Half)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = network(call.x, call.t).sample
        got = half(*call.tensors)
        # nothing of autocast is in it
        with torch.autocast(PLACE.type, torch.bfloat16):
            assert torch.equal(half(*call.tensors), got)
    assert got.dtype == torch.float32
    assert 1e-4 < float((got - expected).norm() / expected.norm()) < 0.1
    assert isinstance(plain_of(network, call, Precision("fp32", PLACE, "")), Plain)


def test_a_network_with_float32_tensors_of_its_own_or_that_overflows_is_left_to_autocast():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(1, 3, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.last(x * torch.linspace(0, 1, 8, device=x.device))

    class Large(Own):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.last((x * 1e5).tanh() * 1e3 * self.last.weight.new_tensor(1e3) * 1e-6)

    call, bf16, fp16 = unet()[1], *(Precision(name, PLACE, "") for name in ("bf16", "fp16"))
    with torch.no_grad(), pytest.raises(RuntimeError):
        Half(Own().to(PLACE), (), torch.bfloat16)(*call.tensors)
    assert isinstance(plain_of(Own().to(PLACE), call, bf16), Plain)
    large = Large().to(PLACE)
    with torch.no_grad():
        assert not Half(large, (), torch.float16)(*call.tensors).isfinite().any()
    assert isinstance(plain_of(large, call, fp16), Plain)


def test_a_recorded_trajectory_is_gone_with_who_held_it(model):
    """It holds a GPU's memory, which the next one needs before the collector would come."""
    noise, _ = given(range(2))
    recorded = RecordedTrajectory(model, dualout.samplers.DDPM(steps=3), noise)
    held = [weakref.ref(recorded), weakref.ref(recorded.recording)]
    gc.disable()
    try:
        del recorded
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()
