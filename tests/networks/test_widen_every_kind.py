"""Upgrading diffusers' networks of every kind: signals, images, text-conditional latents, video, transformers.

Small instances; each keeps its output bit for bit, so its samples, and comes back from disk the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout.denoiser import tensor_of
from dualout.errors import InputError
from dualout.networks import Heads, Keyword, build, widen
from dualout.networks.adapter import innermost

SAMPLERS = [dualout.samplers.DDIM(steps=3), dualout.samplers.DDPM(steps=3), dualout.samplers.DPMSolver(steps=4)]


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of an image, a signal or a video."""
    conditions: dict[str, Tensor] = {}  # noqa: RUF012
    outputs: int = 0
    """Channels it gives; 0 is as many as go in."""
    layer: Callable[[Any], Any] = lambda n: n.conv_out


def unet() -> nn.Module:
    return build("tiny", 3, 8, 3)


def adm() -> nn.Module:
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=8, block_out_channels=(16, 24), norm_num_groups=4, attn_norm_num_groups=4, layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), attention_head_dim=None, num_class_embeds=5,
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), downsample_type="resnet", upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    return Heads(network, 4)


def conditional() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def video() -> nn.Module:
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip


def signal(**options: Any) -> nn.Module:
    from diffusers import UNet1DModel

    return UNet1DModel(
        sample_size=32, in_channels=2, out_channels=2, block_out_channels=(32, 32), time_embedding_type="positional",
        norm_num_groups=4, **({
            "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"), "extra_in_channels": 32,
            "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"),
        } | options),
    )  # fmt: skip


def planning() -> nn.Module:
    return signal(
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"), extra_in_channels=0, act_fn="mish",
        up_block_types=("UpResnetBlock1D", "UpResnetBlock1D"), mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock", use_timestep_embedding=True,
    )  # fmt: skip


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip


def pixart(out_channels: int = 4) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=out_channels, num_layers=1,
        cross_attention_dim=16, caption_channels=12, sample_size=8, patch_size=2,
    )  # fmt: skip
    return Keyword(network)


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6,
        pos_embed_max_size=8,
    )  # fmt: skip
    return Keyword(network)


TEXT, LABELS = torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8).sin(), torch.tensor([1, 3])
CAPTION = torch.linspace(-3, 3, 2 * 5 * 12).view(2, 5, 12).sin()
CASES = {
    "UNet2DModel": Case(unet, (3, 8, 8)),
    "UNet2DModel with heads": Case(adm, (3, 8, 8), {"class_labels": LABELS}),
    "UNet2DConditionModel": Case(conditional, (4, 8, 8), {"encoder_hidden_states": TEXT}),
    "UNet3DConditionModel": Case(video, (3, 4, 8, 8), {"encoder_hidden_states": TEXT}),
    "UNet1DModel": Case(signal, (2, 32), layer=lambda n: n.up_blocks[-1].resnets[-1].conv_2),
    "UNet1DModel with an output block": Case(planning, (2, 32), layer=lambda n: n.out_block.final_conv1d_2),
    "DiTTransformer2DModel": Case(dit, (3, 8, 8), {"class_labels": LABELS}, layer=lambda n: n.proj_out_2),
    "PixArtTransformer2DModel": Case(
        pixart, (4, 8, 8), {"encoder_hidden_states": CAPTION}, layer=lambda n: n.proj_out
    ),
    "SD3Transformer2DModel": Case(
        sd3, (4, 8, 8), {"encoder_hidden_states": CAPTION, "pooled_projections": CAPTION[:, 0, :6]},
        layer=lambda n: n.proj_out,
    ),
}  # fmt: skip


@functools.cache
@torch.no_grad()
def made(name: str) -> nn.Module:
    torch.manual_seed(3)
    network = CASES[name].make().eval()
    for parameter in network.parameters():
        # some begin as zero, and would hide what comes before them
        if not parameter.any():
            parameter.normal_(0, 0.1)
    return network


def denoiser(network: nn.Module, parameterization: dualout.Parameterization) -> dualout.Denoiser:
    return dualout.Denoiser(network, parameterization, dualout.schedules.Linear()).eval()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_old_channels_are_as_before_and_new_ones_zero(name: str) -> None:
    network, (_, shape, conditions, _, _) = made(name), CASES[name]
    channels = shape[0]
    wide = widen(network, 2 * channels + 1)
    x, t = dualout.noise(range(2), shape), torch.tensor([3, 700])
    before, after = (tensor_of(n(x, t, **conditions)) for n in (network, wide))
    assert before.std() > 0.01
    assert after.shape == (2, 2 * channels + 1, *shape[1:])
    assert torch.equal(after[:, :channels], before)
    assert not after[:, channels:].any()
    inner = innermost(wide)
    assert inner.config.out_channels == vars(inner).get("out_channels", inner.config.out_channels) == 2 * channels + 1
    old, new = (CASES[name].layer(innermost(n)).weight for n in (network, wide))
    assert new.numel() * channels == old.numel() * (2 * channels + 1)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_new_channel_is_moved_by_its_own_rows_only(name: str) -> None:
    _, shape, conditions, *_ = CASES[name]
    channels, x, t = shape[0], dualout.noise(range(2), shape), torch.tensor([3, 700])
    wide = widen(made(name), 2 * channels + 1, init=nn.init.ones_)
    outputs = tensor_of(wide(x, t, **conditions))
    # all new rows are the same, so all new channels are
    for channel in range(channels + 1, 2 * channels + 1):
        torch.testing.assert_close(outputs[:, channel], outputs[:, channels], rtol=1e-4, atol=1e-4)
    assert outputs[:, channels].std() > 0.01
    # and a widened layer is that of the class with as many channels
    layer = CASES[name].layer(innermost(wide))
    each = len(layer.weight) // (2 * channels + 1)
    layer.bias.copy_(torch.arange(2 * channels + 1.0).repeat(each) if each > 1 else torch.arange(2 * channels + 1.0))
    layer.weight.zero_()
    for module in innermost(wide).modules():
        if hasattr(module, "conv_skip") and len(module.conv_skip.weight) == 2 * channels + 1:
            module.conv_skip.weight.zero_()
    constant = tensor_of(wide(x, t, **conditions))
    expected = torch.arange(2 * channels + 1.0).view(1, -1, *[1] * (len(shape) - 1)).expand_as(constant)
    assert torch.equal(constant, expected)


@pytest.mark.parametrize("name", CASES)
def test_samples_are_the_same_also_from_disk(name: str, tmp_path: Path) -> None:
    network, (_, shape, conditions, _, _) = made(name), CASES[name]
    original = denoiser(network, dualout.Epsilon())
    upgraded = denoiser(widen(network, 2 * shape[0] + 1), dualout.Dual())
    noise, draw = dualout.noise(range(2), shape), dualout.SeededDraw(range(2), shape)
    upgraded.save_pretrained(tmp_path)
    loaded = dualout.Denoiser.from_pretrained(tmp_path)
    for sampler in SAMPLERS:
        expected = sampler.sample(original, noise, draw, **conditions)
        assert expected.std() > 0.1
        assert torch.equal(sampler.sample(upgraded.route("eps"), noise, draw, **conditions), expected)
        assert torch.equal(sampler.sample(loaded.route("eps"), noise, draw, **conditions), expected)
        mixed = sampler.sample(upgraded, noise, draw, **conditions)
        assert not torch.equal(mixed, expected)
        assert torch.equal(sampler.sample(loaded, noise, draw, **conditions), mixed)


@pytest.mark.parametrize("name", CASES)
def test_conditions_reach_the_network_and_it_learns(name: str) -> None:
    network, (_, shape, conditions, _, _) = made(name), CASES[name]
    model = denoiser(widen(network, 2 * shape[0] + 1, init=nn.init.xavier_uniform_), dualout.Dual())
    x, t = dualout.noise(range(2), shape), torch.tensor([3, 700])
    model.loss(x, t, dualout.noise(range(2, 4), shape), **conditions).total.backward()
    layer = CASES[name].layer(innermost(model.network))
    assert layer.weight.grad.flatten(1).any(1).all()
    for key, value in conditions.items():
        other = conditions | {key: value.flip(0)}
        with torch.no_grad():
            assert not torch.equal(model(x, t, **conditions).x0, model(x, t, **other).x0)


def test_pixart_keeps_the_variance_it_has_too() -> None:
    torch.manual_seed(5)
    network = pixart(out_channels=8).eval()
    nn.init.normal_(network.network.proj_out.weight)
    x, t = dualout.noise(range(2), (4, 8, 8)), torch.tensor([3, 700])
    # [eps, v] becomes [eps, x0, logit, v]
    places = [0, 1, 2, 3, 9, 10, 11, 12]
    wide = widen(network, 13, places=places)
    with torch.no_grad():
        before, after = (tensor_of(n(x, t, encoder_hidden_states=CAPTION)) for n in (network, wide))
    assert torch.equal(after[:, places], before)
    model = denoiser(wide, dualout.Parameterization.parse("learned:base=dual"))
    torch.testing.assert_close(model(x, t, encoder_hidden_states=CAPTION).parts["variance"], (before[:, 4:] + 1) / 2)


def test_signals_whose_end_cannot_be_widened() -> None:
    from diffusers import UNet1DModel

    for options, message in [
        ({"up_block_types": ("AttnUpBlock1D", "UpBlock1D")}, "ends with a UpBlock1D, which does more"),
        ({"up_block_types": ("UpBlock1DNoSkip", "AttnUpBlock1D")}, "ends with a AttnUpBlock1D, which does more"),
        ({"out_channels": 16}, "adds its last block's input to its output"),
        ({"out_block_type": "ValueFunction", "act_fn": "mish"}, "ends with a ValueFunction"),
    ]:
        arguments: dict[str, Any] = {
            "block_out_channels": (16, 16), "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
            "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip"), "extra_in_channels": 32,
        }  # fmt: skip
        network = UNet1DModel(**(arguments | options))
        with pytest.raises(InputError, match=message):
            widen(network, 40)
