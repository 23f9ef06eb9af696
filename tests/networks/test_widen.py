"""Widening: the old outputs stay as they were, bit for bit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout import checkpoint
from dualout.errors import InputError
from dualout.networks import Keyword, Output, Positional, ScaledTime, build, widen
from dualout.networks.wide import KINDS, wider
from widened import Plain, same_first

SAMPLERS = [
    dualout.samplers.DDIM(steps=10),
    dualout.samplers.DDPM(steps=10),
    dualout.samplers.DPMSolver(steps=10),
    dualout.samplers.UniPC(steps=5),
]


class Line(nn.Module):
    """A network of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None] / 1000], 1))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
def test_a_widened_network_samples_exactly_as_the_original(sampler: dualout.Sampler, tiny: nn.Module) -> None:
    schedule, seeds, shape = dualout.schedules.Linear(), range(3), (3, 8, 8)
    original = dualout.Denoiser(tiny, dualout.Epsilon(), schedule).eval()
    upgraded = dualout.Denoiser(widen(tiny, 7), dualout.Dual(), schedule).eval()
    noise, draw = dualout.noise(seeds, shape), dualout.SeededDraw(seeds, shape)
    expected = sampler.sample(original, noise, draw)
    assert expected.std() > 0.1
    assert torch.equal(sampler.sample(upgraded.route("eps"), noise, draw), expected)


def test_an_x0_network_keeps_its_route_too(tiny: nn.Module) -> None:
    schedule, noise = dualout.schedules.Cosine(), dualout.noise(range(3), (3, 8, 8))
    original = dualout.Denoiser(tiny, dualout.CleanImage(), schedule).eval()
    upgraded = dualout.Denoiser(widen(tiny, 7, places=[3, 4, 5]), dualout.Dual(), schedule).eval()
    sampler = dualout.samplers.DDIM(steps=10)
    assert torch.equal(sampler.sample(upgraded.route("x0"), noise), sampler.sample(original, noise))


def test_unet_gains_rows_of_zeros_and_says_so(tiny: nn.Module) -> None:
    wide = widen(tiny, np.int64(7))  # type: ignore[arg-type]
    assert type(wide) is type(tiny)
    assert torch.equal(wide.conv_out.weight[:3], tiny.conv_out.weight)
    assert torch.equal(wide.conv_out.bias[:3], tiny.conv_out.bias)
    assert not wide.conv_out.weight[3:].any()
    assert not wide.conv_out.bias[3:].any()
    assert (wide.config.out_channels, tiny.config.out_channels) == (7, 3)
    assert tiny.conv_out.out_channels == 3
    more = sum(p.numel() for p in wide.parameters()) - sum(p.numel() for p in tiny.parameters())
    assert more == 4 * (24 * 9 + 1)
    plain = build("tiny", 3, 8, 7)
    plain.load_state_dict(wide.state_dict())


def test_the_increase_on_the_papers_network() -> None:
    with torch.device("meta"):
        wide = widen(build("ddpm-cifar10", 3, 32, 3), 7)
    assert sum(p.numel() for p in wide.parameters()) == 35_750_919


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_unet_in_every_precision_and_layout(
    tiny: nn.Module, dtype: torch.dtype, channels_last: bool, batch: int
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = copy.deepcopy(tiny).to(dtype).to(memory_format=layout)
    wide = widen(network, 7)
    assert {p.dtype for p in wide.parameters()} == {dtype}
    assert wide.conv_out.weight.is_contiguous(memory_format=layout)
    x, t = torch.randn(batch, 3, 8, 8).to(dtype).to(memory_format=layout), torch.arange(batch) * 199
    same_first(wide, network, 7, x, t)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("places", ["first", "spread"])
def test_every_kind_of_layer_at_many_sizes(kind: Callable[..., nn.Module], bias: bool, places: str) -> None:
    for old, inside, batch in itertools.product([1, 3, 4], [5, 16, 32], [1, 2]):
        new = 2 * old + 1
        if kind is nn.Linear:
            layer, x = nn.Linear(inside, old, bias), torch.randn(batch, 6, inside)
        else:
            transposed = {"stride": 2, "output_padding": 1, "dilation": 2}
            own = transposed if "Transpose" in kind.__name__ else {"padding_mode": "circular"}
            layer = kind(inside, old, 3, padding=1, bias=bias, **own)
            x = torch.randn(batch, inside, *[6] * (layer.weight.ndim - 2))
        where = list(range(old)) if places == "first" else list(range(new - 1, 0, -2))[:old]
        wide = wider(layer, new, where, nn.init.ones_)
        dim = -1 if kind is nn.Linear else 1
        y = wide(x).movedim(dim, 0)
        assert torch.equal(y[where], layer(x).movedim(dim, 0))
        # the plain layer of these weights agrees but for rounding, also in its gradients
        plain = kind(**{name: getattr(wide, name) for name in wide.names}, bias=bias)
        plain.load_state_dict(wide.state_dict())
        torch.testing.assert_close(wide(x), plain(x))
        for one in (wide, plain):
            (one(x) ** 2).sum().backward()
        for a, b in zip(wide.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tail", [None, nn.Tanh(), nn.Upsample(scale_factor=2)], ids=str)
def test_a_plain_network_is_traced(tail: nn.Module | None) -> None:
    network = Plain(tail=tail)
    seen = int(network.norm.num_batches_tracked)
    wide = widen(network, 5)
    assert wide.last.out_channels == 5
    assert wide.training
    assert int(network.norm.num_batches_tracked) == int(wide.norm.num_batches_tracked) == seen
    same_first(wide.eval(), network.eval(), 5, torch.randn(3, 2, 9, 9), torch.tensor([0, 5, 999]))


class Classes(nn.Module):
    """A network that is called as (x, t, y)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.classes = nn.Embedding(4, 8)
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.last((self.first(x) + self.classes(y)[:, :, None, None]).relu())


@pytest.mark.parametrize("around", [lambda network: network, lambda network: Positional(network, ["y"])])
def test_what_a_network_is_told_besides_is_taken_for_classes(around: Any) -> None:
    network, x, t = around(Classes()), torch.randn(3, 2, 8, 8), torch.tensor([0, 5, 999])
    told = {"y": torch.tensor([0, 1, 3])}
    assert torch.equal(widen(network, 5)(x, t, **told)[:, :2], network(x, t, **told))


def test_a_network_of_vectors() -> None:
    network, example = Line(), (torch.randn(4, 2), torch.arange(4))
    same_first(widen(network, 5, example=example), network, 5, *example)
    same_first(widen(network, 5, layer="layers.2"), network, 5, *example)
    with pytest.raises(InputError, match=r"cannot be called as \(x_t, t\).*example=.*layers.2 \(Linear, 2\)"):
        widen(network, 5)


def test_new_rows_filled_otherwise_and_widened_twice(tiny: nn.Module) -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 700])
    once = widen(tiny, 7, init=nn.init.xavier_uniform_)
    assert once.conv_out.weight[3:].std() > 0
    with torch.no_grad():
        assert torch.equal(once(x, t).sample[:, :3], tiny(x, t).sample)
    same_first(widen(once, 9), once, 9, x, t)
    same_first(widen(tiny, 3), tiny, 3, x, t)


def test_frozen_stays_frozen_and_training_reaches_the_new_rows(tiny: nn.Module) -> None:
    wide = widen(copy.deepcopy(tiny).requires_grad_(False), 7)
    assert not any(p.requires_grad for p in wide.parameters())
    wide.conv_out.requires_grad_(True)
    wide(torch.randn(2, 3, 8, 8), torch.tensor([1, 700])).sample.sum().backward()
    assert wide.conv_out.weight.grad.flatten(1).any(1).all()


def test_in_place(tiny: nn.Module) -> None:
    network = copy.deepcopy(tiny)
    assert widen(network, 7, inplace=True) is network
    assert network.config.out_channels == 7


def test_a_network_that_cannot_be_copied_is_changed_itself() -> None:
    network = Plain()
    network.kept = network.last.weight * 2  # torch copies no tensor that was computed with gradients
    with pytest.raises(InputError, match=r"this Plain cannot be copied \(.*; widen\(…, inplace=True\) changes"):
        widen(network, 5)
    assert widen(network, 5, inplace=True).last.out_channels == 5


def test_compiled_and_adapted_networks(tiny: nn.Module) -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 700])
    compiled: Any = torch.compile(tiny)
    wide = widen(compiled, 7)
    assert type(wide) is type(tiny)
    same_first(wide, tiny, 7, x, t)
    adapter = ScaledTime(compiled, 0.5)
    wide = widen(adapter, 7)
    assert type(wide) is ScaledTime
    assert adapter.network is compiled
    assert wide.network.config.out_channels == 7
    same_first(wide, ScaledTime(tiny, 0.5), 7, x, t)
    traced = widen(Positional(Plain()), 5)
    assert traced.network.last.out_channels == 5


@pytest.mark.parametrize("layer", [None, "last", "last._orig_mod"])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_compiled_part_of_a_network(layer: str | None, inplace: bool) -> None:
    network, x, t = Plain().eval(), torch.randn(2, 2, 8, 8), torch.tensor([1, 700])
    parts: Any = copy.deepcopy(network)
    parts.last, parts.first = torch.compile(parts.last), torch.compile(parts.first)
    wide = widen(parts, 5, layer=layer, inplace=inplace)
    same_first(wide, network, 5, x, t)
    assert wide.state_dict().keys() == network.state_dict().keys()
    assert hasattr(parts.last, "_orig_mod") is not inplace


def test_networks_without_numbers_yet() -> None:
    with torch.device("meta"):
        assert widen(Plain(), 5).last.out_channels == 5
        with pytest.raises(InputError, match="no layer of this Plain makes just its 2"):
            widen(Plain(tail=nn.Tanh()), 5)
    network = Plain()
    network.first = nn.LazyConv2d(12, 3, padding=1)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"'first.weight' of this Plain is lazy.*call the network once"):
        widen(network, 5)
    network(torch.randn(1, 2, 8, 8), torch.zeros(1))
    assert widen(network, 5).last.out_channels == 5


@pytest.mark.parametrize(
    "example", [(torch.randn(1, 2, 8, 8),), torch.randn(2, 2, 8, 8), (*[torch.ones(1)] * 3,), (1, 2)]
)
def test_an_example_that_is_none(example: Any) -> None:
    with pytest.raises(InputError, match=r"an example is \(x_t, t\) or"):
        widen(Plain(), 5, example=example)


def test_transformers_interleave_channels_in_patches() -> None:
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip
    wide = widen(network, 7)
    arguments = (torch.randn(2, 3, 8, 8), torch.tensor([1, 700]))
    labels = torch.tensor([3, 4])
    same_first(wide, network, 7, *arguments, class_labels=labels)
    assert wide.proj_out_2.out_features == 7 * 4
    again = checkpoint.construct(checkpoint.describe(wide)).eval()
    again.load_state_dict(wide.state_dict())
    same_first(again, network, 7, *arguments, class_labels=labels)


def test_conditional_unet() -> None:
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 16), norm_num_groups=4,
        layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    text = torch.randn(2, 5, 8)
    wide = widen(network, 9)
    same_first(wide, network, 9, torch.randn(2, 4, 8, 8), torch.tensor([1, 700]), encoder_hidden_states=text)
    assert wide.config.out_channels == 9


def test_a_new_architecture_is_one_class() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class PlainEntry(Output):
        classes = (f"{Plain.__module__.partition('.')[0]}.Plain",)
        layer: str = "last"

        def rows(self, channels: int, each: int) -> Tensor:
            return torch.arange(channels * each).view(channels, each)

        def check(self, network: Any) -> None:
            raise InputError("found by its class")

    try:
        with pytest.raises(InputError, match="found by its class"):
            widen(Plain(), 5)
    finally:
        PlainEntry.classes = ()


class Folded(nn.Module):
    """Ends with a rearrangement: of patches whose channels run fastest, as DiT's, or slowest, as a pixel shuffle's."""

    def __init__(self, fastest: bool, linear: bool) -> None:
        super().__init__()
        self.fastest, self.linear, self.out_channels = fastest, linear, 3
        self.first = nn.Conv2d(3, 16, 2, stride=2)
        self.last = nn.Linear(16, 12) if linear else nn.Conv2d(16, 12, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x) + t.view(-1, 1, 1, 1) / 1000
        y = self.last(h.movedim(1, -1)).movedim(-1, 1) if self.linear else self.last(h)
        if self.fastest:
            y = y.unflatten(1, (4, self.out_channels)).transpose(1, 2).flatten(1, 2)
        return nn.functional.pixel_shuffle(y, 2)


@pytest.mark.parametrize("layer", [None, "last"])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("fastest", [True, False])
def test_rows_that_are_rearranged_into_the_output_are_found(fastest: bool, linear: bool, layer: str | None) -> None:
    network, x, t = Folded(fastest, linear), torch.randn(2, 3, 8, 8), torch.tensor([1, 700])
    wide = widen(network, 7, layer=layer)
    same_first(wide, network, 7, x, t)
    rows = len(wide.last.weight)
    assert rows == 28
    assert wide.out_channels == 7
    # row r makes one channel, and no other
    with torch.no_grad():
        wide.last.weight.zero_()
        wide.last.bias.copy_(torch.arange(rows) % 7 if fastest else torch.arange(rows) // 4)
        assert torch.equal(wide(x, t), torch.arange(7.0).view(1, 7, 1, 1).expand(2, 7, 8, 8))


def test_transformers_that_are_not_known_by_name() -> None:
    from diffusers import AuraFlowTransformer2DModel, WanTransformer3DModel

    aura = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pos_embed_max_size=16,
    ).eval()  # fmt: skip
    wan = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    text = {"encoder_hidden_states": torch.randn(2, 5, 12)}
    for inner, shape in ((aura, (4, 8, 8)), (wan, (4, 2, 8, 8))):
        network, x, t = Keyword(inner), torch.randn(2, *shape), torch.tensor([3, 700])
        wide = widen(network, 9, example=(x, t, text))
        same_first(wide, network, 9, x, t, **text)
        again = checkpoint.construct(checkpoint.describe(wide)).eval()
        again.load_state_dict(wide.state_dict())
        same_first(again, network, 9, x, t, **text)


def test_a_transposed_convolution_at_the_end() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(8, 3, 3, stride=2, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.up(torch.tanh(self.down(x) + 1e-3 * t.view(-1, 1, 1, 1)), output_size=x.shape[2:])

    network, x, t = Decoder(), torch.randn(2, 3, 9, 8), torch.tensor([3, 700])
    wide = widen(network, 7)
    assert (type(wide.up).__name__, wide.up.out_channels) == ("WideConvTranspose2d", 7)
    same_first(wide, network, 7, x, t)
    same_first(widen(wide, 9), wide, 9, x, t)
    more = sum(p.numel() for p in wide.parameters()) - sum(p.numel() for p in network.parameters())
    assert more == 4 * (8 * 3 * 3 + 1)
    dual = dualout.Denoiser(wide, dualout.Dual(), dualout.schedules.Linear())
    dual.loss(x, t, torch.randn_like(x)).total.backward()
    assert wide.up.weight.grad.abs().amax((0, 2, 3)).bool().all()


def test_an_example_is_given_in_the_networks_precision(tiny: nn.Module) -> None:
    network, x, t = copy.deepcopy(tiny).bfloat16(), torch.randn(2, 3, 8, 8), torch.tensor([1, 700])
    same_first(widen(network, 7, example=(x, t)), network, 7, x.bfloat16(), t)
