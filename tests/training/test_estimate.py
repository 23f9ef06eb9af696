"""What a training will cost."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from dualout.networks.backends import graph
from dualout.training.config import TrainConfig
from dualout.training.estimate import estimate
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
