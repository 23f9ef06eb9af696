"""Every backend computes what eager does, in any batch; what it cannot compute, or what it gets wrong, is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualout
from dualout.errors import InputError
from dualout.evaluation.model import Model
from dualout.evaluation.sampling import Sampling
from dualout.networks import backends
from dualout.networks.backends import TOLERANCE, Backend, Call, choose
from dualout.networks.backends.base import FixedBatch
from dualout.networks.backends.eager import Eager
from dualout.networks.precision import Precision

CPU = torch.device("cpu")
FP32, BF16 = (Precision(name, CPU, "") for name in ("fp32", "bf16"))
OTHERS = sorted(name for name, kind in Backend.kinds().items() if name != "eager" and "cpu" in kind.devices)


class Small(nn.Module):
    """Convolution, normalization, attention, a time and a class: what backbones are made of, once each."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.normalize, self.project = nn.GroupNorm(4, 16), nn.Linear(16, 48)
        self.told = nn.Embedding(4, 16)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-torch.arange(8, device=t.device) / 2)
        angles = t[:, None] * frequencies
        told = torch.cat([angles.sin(), angles.cos()], 1) + self.told(class_labels)
        h = F.silu(self.normalize(self.enter(x_t)) + told[:, :, None, None])
        query, key, value = self.project(h.flatten(2).transpose(1, 2))[:, None].chunk(3, -1)
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return self.leave(h + attended.transpose(1, 2).unflatten(2, h.shape[2:]))


class Tiny(nn.Module):
    """A convolution: compiling more takes a compiler of C++ most of a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve, self.told = nn.Conv2d(1, 3, 3, padding=1), nn.Embedding(4, 1)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        return self.convolve(x_t + self.told(class_labels)[:, :, None, None]) * (1 + t[:, None, None, None] / 1000)


def model_of(network: type[nn.Module]) -> Model:
    torch.manual_seed(0)
    denoiser = dualout.Denoiser(network().eval(), dualout.Dual(), dualout.schedules.Linear())
    return Model("runs/small", denoiser, (1, 8, 8), 3, {"sha256": "0"})


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of(Small)


@pytest.mark.parametrize("name", OTHERS)
def test_images_are_those_of_eager(name):
    for package in Backend.kinds()[name].packages:
        pytest.importorskip(package)
    model = model_of(Tiny if name == "compile" else Small)
    sampler = dualout.samplers.DPMSolver(steps=4, order=2)
    # of a middle level alone, so that the network is called with batches of two sizes
    guided = {"guidance": 2.0, "guidance_interval": (0.1, 5.0)}
    eager, other = (Sampling(model, sampler, backend=b, **guided) for b in ("eager", name))
    expected = eager.images(range(5))
    assert expected.float().std() > 10
    got = other.images(range(5))
    assert int((got.int() - expected.int()).abs().max()) <= 1
    # a batch of another size, and single images, are the same images: nothing is made ready anew
    (prepared,) = model.prepared.values()
    assert torch.equal(torch.cat([other.images([0, 1]), other.images([2])]), got[:3])
    assert torch.equal(other.images(range(7))[:5], got)
    (still,) = model.prepared.values()
    assert still is prepared
    record = other.computed()["computed_by"]
    assert record["backend"] == name
    assert record["difference"] <= record["tolerance"] == TOLERANCE["fp32"]
    assert other.protocol()["backend"] == name
    # the model itself goes on as it was
    assert torch.equal(eager.images(range(5)), expected)


def test_bfloat16_is_within_its_bound_and_not_float32(model):
    call = call_of(model)
    network = model.denoiser.network
    with torch.no_grad():
        expected = network(call.x, call.t, **call.conditions)
        with BF16.autocast():
            got = network(call.x, call.t, **call.conditions).float()
    difference = float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert 1e-4 < difference < TOLERANCE["bf16"]


def test_images_are_made_in_the_precision_that_is_asked_for():
    model, dtypes = model_of(Tiny), []
    model.denoiser.network.convolve.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        dtypes.clear()
        sampling = Sampling(model, dualout.samplers.DDIM(steps=2), precision=name)
        sampling.images(range(2))
        list(sampling.trajectory(range(2)))
        assert dtypes == [dtype] * 4


def call_of(model: Model, batch: int = 4) -> Call:
    x = torch.randn(batch, *model.shape, generator=torch.Generator().manual_seed(1))
    return Call(x, torch.full((batch,), 500), {"class_labels": torch.arange(batch) % 4})


# a base is not found by name: other tests must not meet these two
class Off(Eager, ABC):
    """Gives something else than the network does."""

    name = "off"

    def prepare(self, network, call, precision):
        return FixedBatch(lambda *tensors: network(*tensors) * 1.001, call)


class Quick(Eager, ABC):
    """Gives what the network does, at once."""

    name = "quick"
    seconds = 1.0

    def prepare(self, network, call, precision):
        known = network(call.x, call.t, **call.conditions)
        return FixedBatch(lambda *tensors: known, call)


@pytest.fixture
def kinds(monkeypatch):
    """Which backends there are, by name."""

    def there(*classes):
        monkeypatch.setattr(Backend, "kinds", lambda: {c.name: c for c in classes})

    return there


def test_a_backend_that_differs_is_refused(model, kinds):
    kinds(Eager, Off)
    with pytest.raises(InputError, match=r"--backend off in fp32 differs from eager fp32 by 0\.001 .* 0\.0001 is"):
        choose("off", model.denoiser.network, [call_of(model)], FP32, 1)
    chosen = choose("auto", model.denoiser.network, [call_of(model)], FP32, 10**9)
    assert chosen.network is model.denoiser.network
    assert "differs" in chosen.record["not tried"]["off"]


def test_auto_takes_what_is_quicker_and_repaid(model, kinds):
    kinds(Eager, Quick)
    network, calls = model.denoiser.network, [call_of(model, 64)]
    few = choose("auto", network, calls, FP32, 1)
    assert few.record["backend"] == "eager"
    assert "preparing it takes about 1 s" in few.record["not tried"]["quick"]
    many = choose("auto", network, calls, FP32, 10**7)
    assert many.record["backend"] == "quick"
    assert many.record["ms a call"]["quick"] < many.record["ms a call"]["eager"]


def test_auto_does_not_take_what_is_slower(model, kinds):
    class Slow(Eager):
        name = "slow"

        def prepare(self, network, call, precision):
            return FixedBatch(lambda *tensors: torch.stack([network(*tensors) for _ in range(20)])[0], call)

    kinds(Eager, Slow)
    assert choose("auto", model.denoiser.network, [call_of(model, 64)], FP32, 10**9).record["backend"] == "eager"


def test_what_cannot_be_used_is_told_before_any_work(monkeypatch):
    with pytest.raises(InputError, match="unknown backend 'openvin'; did you mean 'openvino'"):
        backends.check("openvin", FP32)
    with pytest.raises(InputError, match=r"--backend onnx computes in fp32, not in bf16: take --precision fp32"):
        backends.check("onnx", BF16)
    with monkeypatch.context() as installed:
        installed.setattr("dualout.networks.backends.base.find_spec", lambda name: True)
        with pytest.raises(InputError, match=r"--backend openvino computes on cpu, not on cuda"):
            backends.check("openvino", Precision("fp32", torch.device("cuda"), ""))
    with pytest.raises(InputError, match=r"--backend graph computes on cuda, not on cpu"):
        backends.check("graph", FP32)
    monkeypatch.setattr("dualout.networks.backends.base.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs openvino, which is not installed.*dualout\[openvino\]"):
        backends.check("openvino", FP32)
    backends.check("eager", FP32)
    backends.check("auto", FP32)


def test_samplings_of_a_model_share_what_is_prepared_for_their_precision(kinds):
    class Noted(Eager):
        name = "noted"

        def prepare(self, network, call, precision):
            asked.append(precision.name)
            return super().prepare(network, call, precision)

    kinds(Eager, Noted)
    model, asked = model_of(Small), []
    for name in ("fp32", "bf16", "fp32", "bf16"):
        sampling = Sampling(model, dualout.samplers.DDIM(steps=2), backend="noted", precision=name)
        sampling.images(range(2))
        assert sampling.computed()["computed_by"]["tolerance"] == TOLERANCE[name]
    assert asked == ["fp32", "bf16"]


def test_conditions_that_were_not_prepared_for_are_refused(model):
    fixed = FixedBatch(lambda *tensors: tensors[0], call_of(model))
    with pytest.raises(InputError, match="class_labels"):
        fixed(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))


def test_what_computes_a_network_writes_nothing_at_home(tmp_path):
    packages = [package for package in ("onnxruntime", "openvino") if find_spec(package)]
    if not packages:
        pytest.skip("neither onnxruntime nor openvino is installed")
    program = "from dualout.networks.backends import quiet; " + "; ".join(f"quiet.{p}()" for p in packages)
    known = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    subprocess.run([sys.executable, "-c", program], check=True, env=known | {"HOME": str(tmp_path)})
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
