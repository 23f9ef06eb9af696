"""The average of the weights, against its definition."""

from __future__ import annotations

import torch
from torch import nn

from dualout.training.ema import Ema


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 2))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))


def test_is_the_weighted_sum_of_all_weights():
    net = Net()
    ema = Ema(net, 0.7)
    expected = net.w.detach().double().clone()
    for n in range(1, 31):
        with torch.no_grad():
            net.w.normal_()
            net.count += 1
        ema.update(n)
        decay = min(0.7, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * net.w.detach().double()
    torch.testing.assert_close(ema.module.w.double(), expected, rtol=1e-5, atol=1e-6)
    assert ema.module.count == 30
    assert torch.equal(ema.module.frozen, net.frozen)


def test_weights_of_two_names_are_averaged_once():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    with torch.no_grad():
        net[0].weight.zero_()
        ema = Ema(net, 0.9, warmup=False)
        net[0].weight.fill_(1)
    ema.update(1)
    torch.testing.assert_close(ema.module[1].weight, torch.full((2, 2), 0.1))


def test_without_warm_up_good_weights_are_left_slowly():
    net = Net()
    first = net.w.detach().clone()
    ema = Ema(net, 0.99, warmup=False)
    with torch.no_grad():
        net.w.zero_()
    for n in range(1, 11):
        ema.update(n)
    torch.testing.assert_close(ema.module.w, first * 0.99**10)


def test_shares_no_memory_and_wants_no_gradient():
    net = Net()
    ema = Ema(net, 0.9)
    with torch.no_grad():
        net.w.zero_()
    assert not (ema.module.w == 0).any()
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert not ema.module.training
