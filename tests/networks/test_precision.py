"""Number formats: what is chosen where, and that attention keeps float32 on a processor."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dualout.errors import InputError
from dualout.networks import precision
from dualout.networks.precision import Precision, choose

CPU = torch.device("cpu")
ATTENTION = F.scaled_dot_product_attention


class Watch(torch.overrides.TorchFunctionMode):
    """What attention is computed of, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[torch.Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is ATTENTION:
            self.seen.append([v for v in [*args, *(kwargs or {}).values()] if isinstance(v, torch.Tensor)])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("amx", "avx", "name", "why"), [
    (True, True, "bf16", "AMX"),
    (False, True, "bf16", "AVX512-BF16"),
    (False, False, "fp32", "no bfloat16 units"),
])  # fmt: skip
def test_auto_takes_bf16_where_the_processor_has_it(monkeypatch, amx, avx, name, why):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    chosen = choose("auto", CPU)
    assert chosen.name == name
    assert why in chosen.why


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(InputError, match="did you mean 'bf16'"):
        choose("bf61", CPU)
    with pytest.raises(InputError, match="fp16 is for GPUs"):
        choose("fp16", CPU)
    assert choose("fp32", CPU) == Precision("fp32", CPU, "as asked")


def test_attention_is_float32_and_the_rest_is_not():
    query, key, value = torch.randn(3, 2, 1, 5, 4)
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.3)
    with Watch() as watch, Precision("bf16", CPU, "").autocast():
        by_place = F.scaled_dot_product_attention(query, key, value, scale=0.3)
        by_name = F.scaled_dot_product_attention(query=query, key=key, value=value, scale=0.3)
        product = query[0, 0] @ key[0, 0].T
    assert [{tensor.dtype for tensor in call} for call in watch.seen] == [{torch.float32}, {torch.float32}]
    torch.testing.assert_close(by_place, expected)
    assert torch.equal(by_name, by_place)
    assert product.dtype == torch.bfloat16


def test_half_precision_attention_comes_back_as_it_came():
    query, key, value = torch.randn(3, 2, 1, 5, 4, dtype=torch.bfloat16)
    with Precision("bf16", CPU, "").autocast():
        out = F.scaled_dot_product_attention(query, key, value)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), F.scaled_dot_product_attention(query.float(), key.float(), value.float()),
                               rtol=1e-2, atol=1e-2)  # fmt: skip


def test_a_mask_of_attention_may_be_half_or_of_bools():
    query, key, value = torch.randn(3, 2, 1, 5, 4, dtype=torch.bfloat16)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    added = torch.zeros(5, 5, dtype=torch.bfloat16).masked_fill(hidden, float("-inf"))
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True).bfloat16()
    with Precision("bf16", CPU, "").autocast():
        found = [
            F.scaled_dot_product_attention(query, key, value, added),
            F.scaled_dot_product_attention(query, key, value, attn_mask=added),
            F.scaled_dot_product_attention(query, key, value, ~hidden, 0.0),
            F.scaled_dot_product_attention(query, key, value, None, 0.0, True),
        ]
    for out in found:
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    ("width", "values", "widths"), [(8, 8, {16}), (16, 16, {16}), (40, 40, {40}), (8, 20, {8, 20})]
)
def test_narrow_heads_are_widened_and_their_output_and_gradients_stay(scale, width, values, widths):
    given = [torch.randn(2, 3, 5, w, requires_grad=True) for w in (width, width, values)]
    expected = F.scaled_dot_product_attention(*given, scale=scale)
    of = torch.randn_like(expected)
    with Watch() as watch, Precision("bf16", CPU, "").autocast():
        found = F.scaled_dot_product_attention(*given, scale=scale)
    assert [{tensor.shape[-1] for tensor in call} for call in watch.seen] == [widths]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, given, of), torch.autograd.grad(expected, given, of))


def test_fp32_changes_nothing():
    with Precision("fp32", CPU, "").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert precision.processor_units() in ("", "AMX", "AVX512-BF16")
