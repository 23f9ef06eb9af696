"""The loop: against one written by hand, in parts, with a loss that breaks."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dualout import Denoiser, Dual, noise, schedules
from dualout.card import heading
from dualout.data import order, pixels
from dualout.data.dataset import Dataset
from dualout.errors import InputError
from dualout.networks.precision import choose
from dualout.randomness import mix
from dualout.training import Learner, Run, TrainConfig, loop, train
from dualout.training.setup import first_weights

SMALL = {"batch_size": 8, "network": "tiny:width=8", "precision": "fp32", "warmup": 3, "log_every": 2}


def images(n: int = 40, labels: bool = False) -> Dataset:
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    classes = {"labels": torch.arange(n) % 3, "classes": ("a", "b", "c")} if labels else {}
    return Dataset("test", stored, **classes)


def test_other_kinds_of_data_sets_are_refused(tmp_path) -> None:
    config = TrainConfig(steps=1, sample_every=0, out=str(tmp_path / "run"), **SMALL)
    other: Any = torch.utils.data.TensorDataset(torch.zeros(4, 1, 8, 8))
    with pytest.raises(InputError, match=r"a dualout\.data\.Dataset, say .*; got a TensorDataset"):
        Run(config, dataset=other).__enter__()
    learner = Learner(first_weights(config, images()), config)
    with pytest.raises(InputError, match=r"a dualout\.data\.Dataset, say .*; got a TensorDataset"):
        next(train(learner, other))


def test_images_of_ones_own_are_called_by_their_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = replace(images(), name="mine")
    with Run(TrainConfig(steps=1, sample_every=0, device="cpu", **SMALL), dataset=mine) as run:
        list(run)
    assert run.path == Path("runs/mine-dual")
    card = (run.path / "README.md").read_text()
    assert "# A dual diffusion model of mine" in card
    assert heading("eps") == "An eps diffusion model"
    assert "digits" not in card
    assert Run(TrainConfig(data="hub:mine"), dataset=mine).config.data == "hub:mine"


def learned(dataset: Dataset, **fields) -> tuple[Learner, list]:
    config = TrainConfig(**(SMALL | fields))
    learner = Learner(first_weights(config, dataset), config)
    return learner, list(train(learner, dataset))


def test_equals_a_loop_written_by_hand():
    dataset, steps, b = images(), 5, 8
    config = TrainConfig(**SMALL, steps=steps, seed=3, weight_decay=0.1, grad_clip=0.5)
    denoiser = first_weights(config, dataset)
    by_hand, average = copy.deepcopy(denoiser), copy.deepcopy(denoiser)
    learner = Learner(denoiser, config)
    losses = [float(step.loss) for step in train(learner, dataset)]

    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=config.lr, weight_decay=0.1, foreach=False, fused=False)
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    signal = (1 - betas).cumprod(0)
    gains = torch.cat([signal.new_ones(1), signal[:-1]]).sqrt() * betas / (1 - signal)
    expected = []
    for s in range(steps):
        g = np.arange(s * b, (s + 1) * b)
        x0 = pixels.to_model(dataset.batch(order.indices(3, len(dataset), s * b, b)))
        t = torch.tensor([int(mix(3, 0x74, int(i)) % np.uint64(1000)) for i in g])
        eps = noise([int(mix(3, 0x6E6F697365, int(i))) for i in g], (1, 8, 8))
        alpha, sigma, gain = (v[t].float().view(-1, 1, 1, 1) for v in (signal.sqrt(), (1 - signal).sqrt(), gains))
        p = by_hand(alpha * x0 + sigma * eps, t)
        blend = (
            p.parts["ratio"] * p.parts["x0"].detach()
            + (1 - p.parts["ratio"]) * ((p.x_t - sigma * p.parts["eps"]) / alpha).detach()
        )
        total = (
            (eps - p.parts["eps"]).square().mean()
            + (x0 - p.parts["x0"]).square().mean()
            + (gain * (x0 - blend)).square().mean()
        ) / 3
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = config.lr * min(1, (s + 1) / 3)
        optimizer.step()
        decay = min(0.999, (2 + s) / (11 + s))
        with torch.no_grad():
            for a, w in zip(average.parameters(), by_hand.parameters(), strict=True):
                a.mul_(decay).add_(w, alpha=1 - decay)
        expected.append(float(total.detach()))
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(learner.denoiser.state_dict()[name], weight, rtol=1e-3, atol=2e-5)
    for name, weight in average.state_dict().items():
        torch.testing.assert_close(learner.ema.state_dict()[name], weight, rtol=1e-3, atol=2e-5)


def test_a_batch_in_parts_is_the_same_batch():
    whole, steps = learned(images(), steps=6)
    parts, same = learned(images(), steps=6, accumulate=4)
    assert [float(s.loss) for s in same] == pytest.approx([float(s.loss) for s in steps], rel=1e-4)
    for a, b in zip(whole.denoiser.parameters(), parts.denoiser.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_same_seed_same_weights_other_seed_others():
    one, _ = learned(images(), steps=3)
    two, _ = learned(images(), steps=3)
    other, _ = learned(images(), steps=3, seed=1)
    assert all(map(torch.equal, one.ema.parameters(), two.ema.parameters()))
    assert not all(map(torch.equal, one.ema.parameters(), other.ema.parameters()))


def test_dropout_is_drawn_from_the_sample_too():
    network = "tiny:width=8:dropout=0.5"
    one, _ = learned(images(), steps=3, network=network)
    torch.manual_seed(99)
    two, _ = learned(images(), steps=3, network=network)
    assert all(map(torch.equal, one.denoiser.parameters(), two.denoiser.parameters()))


def test_learns():
    _, steps = learned(images(), steps=60, lr=5e-3)
    losses = [float(s.loss) for s in steps]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_metrics_are_means_since_the_last():
    _, steps = learned(images(), steps=5)
    due = [s.index for s in steps if s.metrics]
    assert due == [2, 4, 5]
    means = steps[3].metrics
    assert means["loss"] == pytest.approx(float(steps[2].loss + steps[3].loss) / 2, rel=1e-5)
    assert set(means) == {"loss", "loss/eps", "loss/x0", "loss/mu", "grad_norm", "images_per_s", "seconds", "lr"}
    assert means["lr"] == steps[3].lr == pytest.approx(1e-3)
    total = (means["loss/eps"] + means["loss/x0"] + means["loss/mu"]) / 3
    assert means["loss"] == pytest.approx(total, rel=1e-5)


def test_bf16_follows_fp32():
    full, half = (learned(images(), steps=30, precision=p)[1] for p in ("fp32", "bf16"))
    a, b = (np.array([float(s.loss) for s in steps]) for steps in (full, half))
    assert not np.array_equal(a, b)
    assert np.abs(a - b).max() < 0.02 * a.max()


def test_classes_are_told_and_some_withheld():
    dataset, told = images(labels=True), []
    config = TrainConfig(**SMALL, steps=20, conditional=True, label_dropout=0.3)
    denoiser = first_weights(config, dataset)
    denoiser.network.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["class_labels"]), with_kwargs=True
    )
    list(train(Learner(denoiser, config), dataset))
    seen = torch.cat(told)
    expected = dataset.labels[order.indices(0, len(dataset), 0, 160)]
    kept = seen != 3
    assert torch.equal(seen[kept], expected[kept])
    assert 0.1 < 1 - kept.float().mean() < 0.5
    # a network that is not of classes is told none
    config = TrainConfig(**SMALL, steps=1)
    list(train(Learner(first_weights(config, dataset), config), dataset))


def test_weights_without_gradient_stay():
    dataset = images()
    config = TrainConfig(**SMALL, steps=3)
    denoiser = first_weights(config, dataset)
    denoiser.network.requires_grad_(False)
    denoiser.network.conv_out.requires_grad_(True)
    before = copy.deepcopy(denoiser.state_dict())
    learner = Learner(denoiser, config)
    list(train(learner, dataset))
    changed = {k for k, v in learner.denoiser.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"network.conv_out.weight", "network.conv_out.bias"}
    assert all(torch.equal(v, before[k]) for k, v in learner.ema.state_dict().items() if k not in changed)
    denoiser.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        Learner(denoiser, config)


def test_only_what_is_of_this_network_is_gone_on_from():
    dataset = images()
    learner, _ = learned(dataset, steps=2)
    written, numbers = copy.deepcopy(learner.tensors()), learner.numbers()
    again = Learner(first_weights(learner.config, dataset), learner.config)
    begun = copy.deepcopy(again.tensors())
    name = next(k for k in written["optimizer"] if k.endswith("exp_avg"))
    mean = written["optimizer"][name]
    others = written["optimizer"].items() - {(name, mean)}
    for damaged in ({name: mean * float("nan")}, {name: mean[:1]}, {name: mean[None]}, {}, {name: mean, "more": mean}):
        with pytest.raises(InputError, match=r"here/optimizer is not of this network \(.*\); nothing was loaded"):
            again.load({**written, "optimizer": {**dict(others), **damaged}}, numbers, "here")
    assert all(torch.equal(v, begun[f][k]) for f, tensors in again.tensors().items() for k, v in tensors.items())
    kept = copy.deepcopy(written)
    again.load(written, numbers, "here")
    assert all(torch.equal(v, kept[f][k]) for f, tensors in again.tensors().items() for k, v in tensors.items())
    # and going on leaves what was read as it was
    again.backward(again.denoiser.loss(torch.zeros(2, 1, 8, 8), 5, torch.ones(2, 1, 8, 8)).total)
    again.update()
    assert all(torch.equal(v, kept[f][k]) for f, tensors in written.items() for k, v in tensors.items())


class Breaks(nn.Module):
    """A network whose output is NaN from some call on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.layer, self.calls, self.after = nn.Conv2d(1, 3, 1), 0, after

    def forward(self, x, t):
        self.calls += 1
        return self.layer(x) * (float("nan") if self.calls > self.after else 1.0)


def test_a_loss_that_is_no_number_names_step_and_images():
    dataset = images()
    learner = Learner(Denoiser(Breaks(3), Dual(), schedules.Linear()), TrainConfig(**SMALL, steps=10))
    seen = []
    with pytest.raises(InputError, match="not finite at step 4") as caught:
        seen.extend(step.index for step in train(learner, dataset))
    assert seen == [1, 2, 3]
    assert str(order.indices(0, len(dataset), 24, 8).tolist()) in str(caught.value)


def halved(broken: bool = False) -> tuple[Learner, list]:
    """Thirty steps with scaled losses, where a gradient is of half precision, or no number whatever its scale."""
    config = TrainConfig(**SMALL, steps=30)
    denoiser = first_weights(config, images())
    for weight in denoiser.parameters():
        weight.register_hook(lambda g: g * float("nan") if broken else g.half().float())
    learner = Learner(denoiser, config, scaled=True)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    return learner, list(train(learner, images()))


def test_a_scale_that_is_too_large_is_halved_and_no_fault():
    learner, steps = halved()
    skipped = sum(float(step.grad_norm) == 0 for step in steps)
    assert 0 < skipped < 20
    assert learner.scaler.get_scale() == 2.0 ** (24 - skipped)
    assert all(w.isfinite().all() for w in learner.denoiser.parameters())
    assert float(steps[-1].loss) < float(steps[0].loss)
    # a gradient that is no number at the smallest scale either is one
    with pytest.raises(InputError, match="not finite at step 25"):
        halved(broken=True)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x, t):
        return self.convolution(x) * (t / 1000).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("place", "last", "compiled", "written"),
    [
        ("cuda", True, True, True),
        ("cuda", False, True, False),
        ("cuda", True, False, False),
        ("cpu", True, True, False),
    ],
)
def test_group_norm_is_written_out_where_it_would_copy(monkeypatch, place, last, compiled, written):
    found = []
    monkeypatch.setattr(loop, "write_out", found.append)
    monkeypatch.setattr(loop, "_seeding", lambda device: None)
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    config = TrainConfig(network="tiny:width=8", channels_last=last, compile=compiled)
    denoiser = Denoiser(nn.GroupNorm(2, 4), Dual(), schedules.Linear())
    weight = SimpleNamespace(device=torch.device(place))
    learner = SimpleNamespace(denoiser=denoiser, config=config, parameters={"weight": weight})
    loop.Part(learner, choose("fp32", torch.device("cpu")))
    assert found == [denoiser.network] * written


def test_compiling_changes_no_loss_and_what_cannot_be_compiled_is_told(monkeypatch):
    def losses(**fields):
        torch.manual_seed(0)
        learner = Learner(Denoiser(Small(), Dual(), schedules.Linear()), TrainConfig(**SMALL, steps=2, **fields))
        return [float(step.loss) for step in train(learner, images())]

    graphs, compiled = [], nn.Module.compile

    def traced(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def damaged(graph, inputs):
        raise OSError("file too short")

    # the forward pass as the compiler sees it; to make code of it takes minutes
    plain = losses()
    try:
        monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend=traced))
        assert losses(compile=True) == pytest.approx(plain, rel=1e-6)
        assert len(graphs) == 1
        torch.compiler.reset()
        monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend=damaged))
        with pytest.raises(InputError, match=r"file too short.*leave out --compile.*TORCHINDUCTOR_CACHE_DIR"):
            losses(compile=True)
    finally:
        torch.compiler.reset()
