"""Networks by name: their size, their shape for any image, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from dualout import checkpoint
from dualout.errors import InputError
from dualout.networks import Backbone, Heads, ScaledTime, build
from dualout.networks.adapter import innermost
from dualout.networks.backbones.unet import norm_groups
from dualout.networks.branched import BranchedConv2d

NAMES = sorted(Backbone.kinds())
LEARNED = ["iddpm-cifar10", "adm-imagenet64", "adm-imagenet128"]
SMALL: dict[str, Any] = {
    "class": "diffusers.UNet2DModel",
    "arguments": {
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
    },
}


def on_meta(*arguments: Any, **options: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return build(*arguments, **options)


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "size", "out_channels", "parameters"),
    [
        ("ddpm-cifar10", 32, 3, 35_746_307),
        ("ddpm-cifar10", 32, 7, 35_750_919),
        ("ddpm-celeba64", 64, 3, 78_700_803),
        ("ddpm-celeba64", 64, 7, 78_705_415),
        ("iddpm-cifar10", 32, 6, 52_546_438),
        ("iddpm-cifar10", 32, 10, 52_546_438 + 4 * (128 * 9 + 1)),
    ],
)
def test_published_parameter_counts(name: str, size: int, out_channels: int, parameters: int) -> None:
    assert count(on_meta(name, 3, size, out_channels)) == parameters


@pytest.mark.parametrize(
    ("name", "size", "width", "parameters"),
    [("adm-imagenet64", 64, 192, 295_904_454), ("adm-imagenet128", 128, 256, 421_529_606)],
)
@pytest.mark.parametrize("dual", [False, True])
def test_published_parameter_counts_with_classes(name: str, size: int, width: int, parameters: int, dual: bool) -> None:
    network = on_meta(name, 3, size, 10 if dual else 6, classes=1000)
    # one class more than the originals: "no class"
    assert innermost(network).class_embedding.num_embeddings == 1001
    assert count(network) - 4 * width == parameters + (4 * (width * 9 + 1) if dual else 0)


@pytest.mark.parametrize("name", LEARNED)
def test_every_architecture_of_learned_variance_is_the_original(name: str) -> None:
    network = innermost(on_meta(name, 3, 64, 6))
    resnets = [m for m in network.modules() if type(m).__name__ == "ResnetBlock2D"]
    assert resnets
    assert all(m.time_embedding_norm == "scale_shift" for m in resnets)
    convolutions = [m for m in network.modules() if type(m).__name__ in ("Downsample2D", "Upsample2D") and m.use_conv]
    assert bool(convolutions) == (name == "iddpm-cifar10")
    x = torch.arange(3.0)
    wave = network.time_proj(x)
    # cosines before sines, frequencies from 1 to almost 1/10000
    torch.testing.assert_close(wave[:, 0], x.cos())
    half = wave.shape[1] // 2
    torch.testing.assert_close(wave[:, -1], (x * 10000 ** (1 / half - 1)).sin())
    heads = {m.to_q.out_features: m.heads for m in network.modules() if type(m).__name__ == "Attention"}
    assert (
        heads
        == {
            "iddpm-cifar10": {256: 4},
            "adm-imagenet64": {384: 6, 576: 9, 768: 12},
            "adm-imagenet128": {512: 4, 768: 4, 1024: 4},
        }[name]
    )


@pytest.mark.parametrize("name", ["adm-imagenet64", "adm-imagenet128"])
def test_attention_is_at_32_16_and_8_pixels(name: str) -> None:
    network = innermost(on_meta(name, 3, int(name.removeprefix("adm-imagenet")), 6))
    size, seen = network.config.sample_size, []
    for block in network.down_blocks:
        seen += [size] if getattr(block, "attentions", None) else []
        size //= 2
    assert seen == [32, 16, 8]


@pytest.mark.parametrize("name", ["ddpm-cifar10", "ddpm-celeba64", *LEARNED])
def test_a_small_one_of_each_runs_there_and_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone.named(name)
    monkeypatch.setattr(type(backbone), "channels", tuple(c // 8 for c in backbone.channels))
    if name == "iddpm-cifar10":
        backbone = dataclasses.replace(backbone, time_scale=0.25)
    monkeypatch.setattr(type(backbone), "head_width", {"adm-imagenet128": None}.get(name, 8), raising=False)
    described = backbone.description(1, (16, 16), 4, 3 if name in LEARNED else None)
    arguments = described["arguments"].get("network", described)["arguments"]
    groups = {key: 8 for key in ("norm_num_groups", "attn_norm_num_groups") if arguments.get(key, 32) is not None}
    arguments |= groups if name in LEARNED else {"norm_num_groups": 8}
    network = checkpoint.construct(described)
    assert checkpoint.describe(checkpoint.construct(checkpoint.describe(network))) == checkpoint.describe(network)
    conditions = {"class_labels": torch.tensor([0, 3])} if name in LEARNED else {}
    network(torch.randn(2, 1, 16, 16), torch.tensor([0, 999]), **conditions).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_heads_are_those_of_the_width_they_make() -> None:
    four = build(SMALL | {"arguments": SMALL["arguments"] | {"attention_head_dim": 8}}, 3, 8, 3).eval()
    split = Heads(build(SMALL | {"arguments": SMALL["arguments"] | {"attention_head_dim": None}}, 3, 8, 3), 4).eval()
    split.network.load_state_dict(four.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(split(x, t).sample, four(x, t).sample)
        # also where heads and scale are read from the layer
        for layer in split.modules():
            if isinstance(layer, Attention):
                layer.set_processor(AttnProcessor())
        torch.testing.assert_close(split(x, t).sample, four(x, t).sample)
    for heads, message in [(0, "whole number"), (True, "whole number"), (3, "cannot be split into 3"), ("4", "whole")]:
        with pytest.raises(InputError, match=message):
            Heads(four, heads)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="none of diffusers' attention layers"):
        Heads(torch.nn.Linear(2, 2), 2)
    with pytest.raises(InputError, match=r"only a torch\.nn\.Module"):
        Heads(lambda x, t: x, 2)  # type: ignore[arg-type]


def test_the_clock_of_iddpm() -> None:
    network = on_meta("iddpm-cifar10:time_scale=0.25", 3, 32, 6)
    assert type(network) is ScaledTime
    assert network.scale == 0.25
    with pytest.raises(InputError, match="time_scale is a number above 0"):
        build("iddpm-cifar10:time_scale=0", 3, 32, 6)


@pytest.mark.parametrize(("name", "size", "millions"), [("tiny", 8, 0.4), ("small", 28, 1.6), ("small", 32, 1.6)])
def test_small_networks_are_as_small_as_they_say(name: str, size: int, millions: float) -> None:
    assert count(on_meta(name, 1, size, 3)) == pytest.approx(millions * 1e6, rel=0.05)


def test_ddpm_is_the_original_architecture() -> None:
    # where attention is, how convolutions pad and how time is embedded decide whether published weights mean anything
    config = on_meta("ddpm-cifar10", 3, 32, 3).config
    published = {
        "act_fn": "silu",
        "block_out_channels": [128, 256, 256, 256],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }
    assert {key: config[key] for key in published} == published


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 8, 10, 12, 28, 30, 32, (8, 20), (6, 4)])
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_any_small_size_goes_in_and_comes_out(name: str, size: int | tuple[int, int]) -> None:
    network = build(name, 2, size, 5)
    shape = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        assert network(torch.randn(2, 2, *shape), torch.tensor([0, 999])).sample.shape == (2, 5, *shape)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [32, 64])
def test_every_backbone_has_the_channels_that_were_asked_for(name: str, size: int) -> None:
    config = innermost(on_meta(name, 4, size, 9)).config
    assert (config.in_channels, config.out_channels, config.sample_size) == (4, 9, size)


def test_numbers_of_numpy_build_what_pythons_do() -> None:
    eight = np.int64(8)
    for size in (eight, (eight, eight)):
        network = build("tiny:width=8", np.int64(1), size, np.int64(3), np.int64(4))  # type: ignore[arg-type]
        assert json.dumps(dict(network.config)) == json.dumps(dict(build("tiny:width=8", 1, 8, 3, 4).config))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(LEARNED)))
def test_attention_has_one_head(name: str) -> None:
    attention = [m for m in on_meta(name, 3, 32, 3).modules() if type(m).__name__ == "Attention"]
    assert attention
    assert all(m.heads == 1 for m in attention)


def test_classes_and_none_of_them_are_told_apart() -> None:
    network = build("tiny", 1, 8, 1, classes=10).eval()
    assert network.class_embedding.weight.shape[0] == 11
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 5])
    with torch.no_grad():
        a, none = (network(x, t, class_labels=torch.tensor([i, i])).sample for i in (0, 10))
    assert not torch.equal(a, none)


def test_options_in_every_written_form() -> None:
    spec = build("small:width=48:dropout=0.1", 1, 28, 3)
    fields = build({"name": "small", "width": 48, "dropout": 0.1}, 1, 28, 3)
    itself = build(Backbone.parse("small:width=48:dropout=0.1"), 1, 28, 3)
    assert spec.config == fields.config == itself.config
    assert spec.config.block_out_channels == [48, 72, 144]
    assert spec.config.dropout == 0.1
    deeper = Backbone.parse("tiny:multipliers=[1+2+2]")
    assert build(deeper, 1, 32, 3).config.block_out_channels == [24, 48, 48]
    assert Backbone.parse(deeper.spec) == deeper


@pytest.mark.parametrize(("channels", "out", "groups"), [(3, 7, [3, 4]), (1, 3, [1, 2]), (3, 3, [3]), (3, 10, [3, 7])])
def test_branches_belong_to_one_output_each(channels: int, out: int, groups: list[int]) -> None:
    torch.manual_seed(0)
    network = build("tiny:width=8:branches=true", channels, 8, out)
    last = network.conv_out
    assert isinstance(last, BranchedConv2d)
    assert last.groups == groups
    x, t = torch.randn(2, channels, 8, 8), torch.tensor([3, 700])
    before = network(x, t).sample
    # without its block an output is the plain convolution of the shared features
    features: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    with torch.no_grad():
        last.blocks[0].weight.zero_()
        last.blocks[0].bias.zero_()
        after = network(x, t).sample
        torch.testing.assert_close(after[:, :channels], last.outputs[0](features[0]))
    assert not torch.allclose(before[:, :channels], after[:, :channels])
    assert torch.equal(before[:, channels:], after[:, channels:])
    # and a checkpoint's description makes it again
    again = checkpoint.construct(checkpoint.describe(network))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x, t).sample, after)


@pytest.mark.parametrize(("network", "channels", "size"), [("small", 3, 32), ("small:width=16", 1, 16)])
def test_branches_cost_less_than_a_hundredth(network: str, channels: int, size: int) -> None:
    operations = []
    for branches in ("false", "true"):
        built = on_meta(f"{network}:branches={branches}", channels, size, 2 * channels + 1)
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            built(torch.zeros(1, channels, size, size), torch.zeros(1, dtype=torch.long))
        operations.append(counter.get_total_flops())
    assert operations[0] < operations[1] < 1.01 * operations[0]


@pytest.mark.parametrize(
    ("channels", "groups"), [([24, 48], 6), ([32, 48, 96], 8), ([128, 256], 32), ([6, 6], 1), ([10, 20], 2), ([4], 1)]
)
def test_norm_groups_divide_every_level(channels: list[int], groups: int) -> None:
    assert norm_groups(channels) == groups
    # the way up normalizes neighbouring levels side by side
    assert all((a + b) % groups == 0 for a, b in itertools.product(channels, repeat=2))


def test_a_described_class_is_filled_in() -> None:
    arguments = {
        "block_out_channels": [16, 16],
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "norm_num_groups": 4,
    }
    inner = {"class": "diffusers.UNet2DModel", "arguments": arguments}
    config = build(inner, 3, (8, 16), 7, classes=4).config
    filled = (config.in_channels, config.out_channels, list(config.sample_size), config.num_class_embeds)
    assert filled == (3, 7, [8, 16], 5)
    assert "in_channels" not in arguments
    adapted = build({"class": "dualout.networks.ScaledTime", "arguments": {"network": inner, "scale": 0.001}}, 3, 8, 7)
    assert adapted.network.config.out_channels == 7
    with pytest.raises(InputError, match="in_channels is 1, but 3 is needed"):
        build(inner | {"arguments": arguments | {"in_channels": 1}}, 3, 8, 7)


@pytest.mark.parametrize(
    ("network", "size", "message"),
    [
        ("tyny", 8, "did you mean 'tiny'"),
        ("unet", 8, "unknown network 'unet'"),
        ("small:widht=48", 8, "did you mean 'width'"),
        ("small:width=33", 8, "even number of channels"),
        ("small:width=wide", 8, "whole number"),
        ("small:multipliers=[1+1.3]", 32, "whole numbers"),
        ("small:dropout=1.5", 32, "from 0 to below 1"),
        ("small:layers=0", 32, "layers is 1 or more"),
        ("tiny", 225, "resize to, say, 64×64"),
        ("small", 0, "height is a whole number"),
        ("ddpm-cifar10", 28, "multiples of 8, got 28×28; resize to, say, 32×32"),
        ("ddpm-celeba64", (64, 40), "multiples of 16"),
        ("adm-imagenet128", (128, 120), "halves images 4 times: sides are multiples of 16"),
        ("adm-imagenet64:dropout=1", 64, "from 0 to below 1"),
        ({"class": "os.system"}, 8, "'os.system' is not on the allow-list"),
        ({"class": "diffusers.DDPMPipeline"}, 8, "not on the allow-list"),
        ({"class": 3}, 8, "not on the allow-list"),
        ({"width": 48}, 8, "'name'"),
        (48, 8, "a network is a name"),
    ],
)
def test_what_cannot_be_built_says_why(network: Any, size: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(network, 3, size, 7)


def test_each_branch_is_a_residual_block_and_a_convolution_of_its_own():
    last, h = BranchedConv2d(3, [2, 1], kernel_size=1).double(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    outputs = []
    for block, output in zip(last.blocks, last.outputs, strict=True):
        (w, b), (v, c) = ([p[..., 0, 0] if p.ndim == 4 else p for p in m.parameters()] for m in (block, output))
        inner = torch.einsum("oi,bihw->bohw", w, h) + b[:, None, None]
        outputs.append(torch.einsum("oi,bihw->bohw", v, h + inner / (1 + (-inner).exp())) + c[:, None, None])
    torch.testing.assert_close(last(h), torch.cat(outputs, 1))
    assert BranchedConv2d(3, [2, 1], kernel_size=5)(h.float()).shape == (4, 3, 5, 5)


@pytest.mark.parametrize(("groups", "kernel_size"), [([], 3), ([0, 3], 3), ([1.5], 3), ([3], 2)])
def test_branches_that_cannot_be_are_refused(groups, kernel_size):
    with pytest.raises(InputError, match="groups are channels, 1 or more each, and kernel_size is odd"):
        BranchedConv2d(4, groups, kernel_size)
