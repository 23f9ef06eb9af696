"""Group normalization written out is torch's, and leaves the layout as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualout.networks.build import build
from dualout.networks.norms import WrittenOut, write_out


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch.compiler.reset()


def norm(**options: Any) -> nn.GroupNorm:
    torch.manual_seed(0)
    found = nn.GroupNorm(4, 12, **options)
    for p in found.parameters():
        nn.init.normal_(p)
    return found


def pair(**options: Any) -> tuple[nn.GroupNorm, Any]:
    """torch's, and ours as the compiler traces it."""
    usual = norm(**options)
    ours = copy.deepcopy(usual)
    write_out(ours)
    assert type(ours) is WrittenOut
    return usual, torch.compile(ours, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("shape", [(3, 12), (3, 12, 5), (3, 12, 4, 6), (2, 12, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.3}, {"dtype": torch.float64}], ids=str)
def test_values_and_gradients_are_torchs(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    usual, ours = pair(**options)
    x = torch.randn(shape, dtype=options.get("dtype")) * 3 + 1
    cotangent = torch.randn_like(x)

    def all_of(function: Any) -> list[Tensor]:
        given = x.clone().requires_grad_()
        made = function(given)
        weights = list(function.parameters())
        return [made, *torch.autograd.grad(made, [given, *weights], cotangent)]

    for found, expected in zip(all_of(ours), all_of(usual), strict=True):
        near = 1e-12 if x.dtype == torch.float64 else 2e-5
        torch.testing.assert_close(found, expected, rtol=near, atol=near)
        assert found.dtype == expected.dtype


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_normalized_in_float32(half: torch.dtype) -> None:
    usual, ours = pair()
    # a mean that half precision has no digits left beside
    x = (torch.randn(2, 12, 8, 8) + 200).to(half)
    for both in (usual, ours):
        both.to(half)
    found = ours(x)
    assert found.dtype == half
    exact = nn.functional.group_norm(x.double(), 4, usual.weight.double(), usual.bias.double()).detach()
    assert float((found.detach().double() - exact).abs().max()) <= 2 * torch.finfo(half).eps * float(exact.abs().max())


def test_autocast_gets_float32_as_of_a_gpus_group_norm() -> None:
    _, ours = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(2, 12, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_channels_last_stay_last() -> None:
    _, ours = pair()
    last = torch.randn(2, 12, 4, 4).to(memory_format=torch.channels_last)
    assert ours(last).is_contiguous(memory_format=torch.channels_last)
    assert ours(last.contiguous()).is_contiguous()


def test_a_network_keeps_its_weights_and_is_torchs_where_it_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = build("tiny:width=8", 1, 8, 3).eval()
    before = copy.deepcopy(network)
    write_out(network)
    assert any(isinstance(m, WrittenOut) for m in network.modules())
    assert not any(type(m) is nn.GroupNorm for m in network.modules())
    assert list(network.state_dict()) == list(before.state_dict())
    # not compiled, not a bit is different
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    assert torch.equal(network(x, t).sample, before(x, t).sample)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(network(x, t).sample, before(x, t).sample, rtol=1e-4, atol=1e-5)


def test_one_of_a_class_of_its_own_stays() -> None:
    class Own(nn.GroupNorm):
        pass

    network = nn.Sequential(Own(2, 4), nn.GroupNorm(2, 4))
    write_out(network)
    assert [type(m) for m in network] == [Own, WrittenOut]
