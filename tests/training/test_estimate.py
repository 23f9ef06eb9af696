"""What a training will cost."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

import dualout.training.estimate as module
from dualout.cli.main import main
from dualout.denoiser import Loss
from dualout.networks.backends import graph
from dualout.training.batches import Batch
from dualout.training.config import TrainConfig
from dualout.training.estimate import estimate
from dualout.training.loop import Part
from dualout.training.setup import assemble


def test_operations_are_those_of_the_layers():
    """By hand: two for each multiplication of a convolution, a linear layer, and attention's two products."""
    job = assemble(TrainConfig(data="digits:size=16", network="tiny:width=8", batch_size=4, device="cpu"))
    counted = 0

    def count(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal counted
        if isinstance(layer, Attention):
            tokens = inputs[0].flatten(2).shape[2] if inputs[0].ndim == 4 else inputs[0].shape[1]
            counted += 4 * tokens**2 * layer.inner_dim
        else:
            counted += 2 * output[0].numel() * layer.weight[0].numel()

    layers = [m for m in job.denoiser.modules() if isinstance(m, nn.Conv2d | nn.Linear | Attention)]
    assert any(isinstance(layer, Attention) for layer in layers)
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        job.denoiser(torch.zeros(1, 1, 16, 16), 500)
    for hook in hooks:
        hook.remove()
    assert estimate(job).flops == counted


def test_weights_and_gradients_are_left_as_they_were():
    job = assemble(TrainConfig(data="digits", network="tiny:width=8", batch_size=4, device="cpu"))
    before = [p.detach().clone() for p in job.denoiser.parameters()]
    cost = estimate(job)
    assert all(torch.equal(p, b) for p, b in zip(job.denoiser.parameters(), before, strict=True))
    assert all(p.grad is None for p in job.denoiser.parameters())
    assert cost.parameters == cost.trained == sum(b.numel() for b in before)
    assert cost.memory > 4 * 5 * cost.parameters


def test_no_graph_is_recorded(monkeypatch):
    """It would be of one size of batch, and several are timed."""
    job = assemble(TrainConfig(data="digits", network="tiny:width=8", batch_size=4, device="cpu"))

    def refuse(*_: object) -> None:
        raise AssertionError("recorded")

    monkeypatch.setattr(graph, "Recording", refuse)
    assert estimate(job._replace(config=replace(job.config, graph=True))).step > 0


def test_weights_that_are_cast_are_kept_once_however_many_images_there_are():
    def memory(precision: str, images: int) -> int:
        told = TrainConfig(data="digits", network="small", batch_size=images, device="cpu", precision=precision)
        return estimate(assemble(told)).memory

    (one, all32), (one16, all16) = ([memory(precision, n) for n in (1, 64)] for precision in ("fp32", "bf16"))
    assert all16 - one16 < all32 - one


def test_processes_share_what_a_batch_keeps():
    job = assemble(TrainConfig(data="digits", network="tiny:width=8", batch_size=64, device="cpu", precision="fp32"))
    half = assemble(TrainConfig(data="digits", network="tiny:width=8", batch_size=32, device="cpu", precision="fp32"))
    two = job._replace(accelerator=SimpleNamespace(num_processes=2))
    assert estimate(two).memory == pytest.approx(estimate(half).memory, rel=0.05)
    assert estimate(two).memory < 0.7 * estimate(job).memory


def test_a_pass_that_takes_long_is_not_repeated(monkeypatch):
    passes, made = [], Part.__call__

    def watched(part: Part, batch: Batch, last: bool) -> Loss:
        passes.append(len(batch.samples))
        return made(part, batch, last)

    monkeypatch.setattr(Part, "__call__", watched)
    job = assemble(TrainConfig(data="digits", network="tiny:width=8", batch_size=16, device="cpu", precision="fp32"))
    assert estimate(job).timed == 16
    assert passes == [1, 1, 16, 16, 16, 16]
    passes.clear()
    monkeypatch.setattr(module, "_LONG", 0.0)
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    assert estimate(job).timed == 2
    assert passes == [1, 2]
    passes.clear()
    assert estimate(job._replace(config=replace(job.config, batch_size=1))).timed == 1
    assert passes == [1]


def test_a_processor_is_not_waited_for_until_it_has_compiled(monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(nn.Module, "compile", refuse)
    command = ["train", "--data", "digits", "--network", "tiny:width=8", "--batch_size", "4", "--device", "cpu"]
    assert main([*command, "--compile", "true", "--dry_run"]) == 0
    assert "measured   by passes of 4 images, not compiled" in capsys.readouterr().out
    assert main([*command, "--dry_run"]) == 0
    assert "not compiled" not in capsys.readouterr().out
