"""diffusers' networks, each called by its own convention, widened, saved, and compared with diffusers' own loops.

Small instances with random weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor

import dualout
from dualout.denoiser import tensor_of
from dualout.errors import InputError
from dualout.evaluation.model import Model
from dualout.networks import ChannelsAt, FlowTime, Keyword, Positional, adapted
from dualout.networks.diffusers import CONVENTIONS
from dualout.networks.wide import Wide
from dualout.schedules import RectifiedFlow, ScaledLinear, Schedule
from dualout.training.upgrade import upgrade

FLOW = RectifiedFlow(shift=3.0)


def like_normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rotary(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    angles = like_normal(tokens, size)
    return angles.cos(), angles.sin()


class Case(NamedTuple):
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    """Of an image or video, channels first."""
    conditions: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012


HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
BOTH: dict[str, Any] = {"in_channels": 4, "out_channels": 4}
UNET: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
    "cross_attention_dim": 8, "attention_head_dim": 4,
}  # fmt: skip
ADA: dict[str, Any] = {
    "attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
}  # fmt: skip
FLUX: dict[str, Any] = {
    "in_channels": 16, "num_single_layers": 1, "joint_attention_dim": 12, "axes_dims_rope": [2, 2, 4], **HEADS,
}  # fmt: skip
COG: dict[str, Any] = {
    **HEADS, **BOTH, "time_embed_dim": 2, "text_embed_dim": 12, "sample_width": 8, "sample_height": 8,
    "sample_frames": 9, "max_text_seq_length": 5,
}  # fmt: skip
WAN: dict[str, Any] = {
    **BOTH, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "text_dim": 12, "freq_dim": 8,
    "ffn_dim": 16, "rope_max_seq_len": 32,
}  # fmt: skip
SANA: dict[str, Any] = {
    **HEADS, **BOTH, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
    "caption_channels": 12, "sample_size": 8,
}  # fmt: skip
TEXT, POOLED = {"encoder_hidden_states": like_normal(2, 5, 12)}, {"pooled_projections": like_normal(2, 6)}
SEEN = {"encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool)}
IMAGE, VIDEO = (4, 8, 8), (4, 2, 8, 8)
CASES = {
    "AllegroTransformer3DModel": Case(
        {**HEADS, **BOTH, "cross_attention_dim": 16, "caption_channels": 12}, VIDEO,
        {**TEXT, **SEEN, "attention_mask": torch.ones(2, 2, 8, 8)},
    ),
    "AuraFlowTransformer2DModel": Case(
        {
            **BOTH, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "num_mmdit_layers": 1,
            "num_single_dit_layers": 1, "joint_attention_dim": 12, "caption_projection_dim": 16,
        },
        IMAGE, TEXT,
    ),
    "BriaTransformer2DModel": Case({**FLUX, "axes_dims_rope": [0, 4, 4]}, IMAGE, TEXT),
    "ChromaTransformer2DModel": Case(
        {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}, IMAGE, TEXT
    ),
    "CogVideoXTransformer3DModel": Case(COG, (4, 3, 8, 8), TEXT),
    "CogView3PlusTransformer2DModel": Case(
        {**HEADS, **BOTH, "text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 2, "pos_embed_max_size": 8},
        IMAGE, {**TEXT, **{key: torch.full((2, 2), 8) for key in ("original_size", "target_size", "crop_coords")}},
    ),
    "ConsisIDTransformer3DModel": Case(
        {**COG, "in_channels": 8}, (4, 3, 8, 8), {**TEXT, "image_latents": like_normal(2, 4, 3, 8, 8)}
    ),
    "DiTTransformer2DModel": Case(
        {**HEADS, **BOTH, "sample_size": 8, "num_embeds_ada_norm": 10, "norm_num_groups": 4}, IMAGE,
        {"class_labels": torch.tensor([1, 3])},
    ),
    "EasyAnimateTransformer3DModel": Case(
        {**HEADS, **BOTH, "attention_head_dim": 16, "patch_size": 2, "text_embed_dim": 12, "time_embed_dim": 8},
        (4, 3, 8, 6), TEXT,
    ),
    "Flux2Transformer2DModel": Case(
        {**FLUX, "axes_dims_rope": [2, 2, 2, 2], "timestep_guidance_channels": 8}, (16, 4, 6),
        {**TEXT, "guidance": torch.tensor([3.5, 2.5])},
    ),
    "FluxTransformer2DModel": Case(
        {**FLUX, "pooled_projection_dim": 6, "guidance_embeds": True}, (4, 8, 6),
        {**TEXT, **POOLED, "guidance": torch.tensor([3.5, 2.5])},
    ),
    "HunyuanDiT2DModel": Case(
        {
            **HEADS, "num_layers": 2, "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 16,
            "cross_attention_dim": 12, "cross_attention_dim_t5": 16, "pooled_projection_dim": 6, "text_len": 5,
            "text_len_t5": 5, "learn_sigma": False, "use_style_cond_and_image_meta_size": False,
        },
        IMAGE,
        {
            **TEXT, "text_embedding_mask": torch.ones(2, 5), "encoder_hidden_states_t5": like_normal(2, 5, 16),
            "text_embedding_mask_t5": torch.ones(2, 5), "image_rotary_emb": rotary(16, 8),
        },
    ),
    "HunyuanVideoTransformer3DModel": Case(
        {
            **HEADS, **BOTH, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 12,
            "pooled_projection_dim": 6, "rope_axes_dim": (2, 2, 4),
        },
        VIDEO, {**TEXT, **POOLED, **SEEN, "guidance": torch.tensor([6000.0, 5000.0])},
    ),
    "Kandinsky5Transformer3DModel": Case(
        {
            "in_text_dim": 12, "in_text_dim2": 6, "time_dim": 8, "model_dim": 16, "ff_dim": 16, "num_text_blocks": 1,
            "num_visual_blocks": 1, "axes_dims": (2, 2, 4), "in_visual_dim": 4,
        },
        VIDEO,
        {
            **TEXT, **POOLED, "visual_rope_pos": [torch.arange(n) for n in (2, 4, 4)],
            "text_rope_pos": torch.arange(5),
        },
    ),
    "LTXVideoTransformer3DModel": Case(
        {**HEADS, **BOTH, "cross_attention_dim": 16, "caption_channels": 12}, (4, 2, 4, 6), {**TEXT, **SEEN}
    ),
    "LatteTransformer3DModel": Case(
        {**HEADS, **BOTH, **ADA, "sample_size": 8, "patch_size": 2, "caption_channels": 12, "cross_attention_dim": 16,
         "video_length": 3},
        (4, 3, 8, 8), TEXT,
    ),
    "Lumina2Transformer2DModel": Case(
        {
            "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1,
            "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 16, 16), "cap_feat_dim": 12,
        },
        IMAGE, {**TEXT, **SEEN},
    ),
    "MochiTransformer3DModel": Case(
        {**HEADS, "num_layers": 2, "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4,
         "pooled_projection_dim": 16},
        VIDEO, {**SEEN, "encoder_hidden_states": like_normal(2, 5, 16)},
    ),
    "PRXTransformer2DModel": Case(
        {"in_channels": 4, "context_in_dim": 12, "hidden_size": 8, "num_heads": 2, "depth": 1, "axes_dim": [2, 2]},
        IMAGE, TEXT,
    ),
    "PixArtTransformer2DModel": Case(
        {**HEADS, **BOTH, "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8}, IMAGE, TEXT
    ),
    "QwenImageTransformer2DModel": Case(
        {**HEADS, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4)},
        (4, 8, 12), {**TEXT, "encoder_hidden_states_mask": torch.ones(2, 5)},
    ),
    "SD3Transformer2DModel": Case(
        {
            **HEADS, **BOTH, "sample_size": 8, "joint_attention_dim": 12, "caption_projection_dim": 16,
            "pooled_projection_dim": 6, "pos_embed_max_size": 8,
        },
        IMAGE, {**TEXT, **POOLED},
    ),
    "SanaTransformer2DModel": Case({**SANA, "timestep_scale": 0.5}, IMAGE, TEXT),
    "SanaVideoTransformer3DModel": Case({**SANA, "rope_max_seq_len": 32}, VIDEO, TEXT),
    "SkyReelsV2Transformer3DModel": Case(WAN, VIDEO, TEXT),
    "UNet2DConditionModel": Case(
        {
            **UNET, **BOTH, "cross_attention_dim": 12, "in_channels": 9,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        IMAGE, {**TEXT, "mask": torch.ones(2, 1, 8, 8), "masked_image_latents": like_normal(2, 4, 8, 8)},
        {"concatenated": ["mask", "masked_image_latents"]},
    ),
    "UNet3DConditionModel": Case(
        {
            **UNET, **BOTH, "cross_attention_dim": 12, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        VIDEO, TEXT,
    ),
    "UNetSpatioTemporalConditionModel": Case(
        {
            "sample_size": 8, "in_channels": 8, "block_out_channels": (32, 32), "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "cross_attention_dim": 12,
            "num_attention_heads": (2, 2), "num_frames": 3,
        },
        (4, 3, 8, 8),
        {
            "encoder_hidden_states": like_normal(2, 1, 12), "image_latents": like_normal(2, 4, 3, 8, 8),
            "added_time_ids": torch.tensor([[6.0, 127, 0.02], [7.0, 100, 0.02]]),
        },
    ),
    "WanTransformer3DModel": Case(WAN, VIDEO, TEXT),
    "ZImageTransformer2DModel": Case(
        {
            "in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": 12, "axes_dims": [4, 2, 2], "axes_lens": [64, 16, 16],
        },
        IMAGE, {"cap_feats": like_normal(2, 5, 12)},
    ),
}  # fmt: skip


@functools.cache
@torch.no_grad()
def made(name: str, **changed: Any) -> Any:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    torch.manual_seed(3)
    network = getattr(diffusers, name)(**CASES[name].arguments, **changed).eval()
    for parameter in network.parameters():
        # some begin as zero, and would hide what comes before them
        if not parameter.any():
            parameter.normal_(0, 0.1)
    return network


def schedule_of(name: str) -> Schedule:
    return FLOW if CONVENTIONS[name].predicts == "flow" else ScaledLinear()


def denoiser(name: str) -> dualout.Denoiser:
    schedule = schedule_of(name)
    network = adapted(made(name), schedule, **CASES[name].options)
    return dualout.Denoiser(network, dualout.Parameterization.parse(CONVENTIONS[name].predicts), schedule).eval()


def test_every_network_known_by_name_is_here() -> None:
    assert set(CASES) == set(CONVENTIONS)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_widened_it_samples_as_before_also_from_disk(name: str, tmp_path: Path) -> None:
    _, shape, conditions, _ = CASES[name]
    original, channels = denoiser(name), shape[0]
    # its layer is known: it need not be called
    upgraded = upgrade(original)
    x, t = dualout.noise(range(2), shape), torch.tensor([3, 700])
    before, after = (tensor_of(d.network(x, t, **conditions)) for d in (original, upgraded))
    assert before.shape == x.shape
    assert before.std() > 0.01
    assert after.shape == (2, 2 * channels + 1, *shape[1:])
    assert torch.equal(after[:, :channels], before)
    assert not after[:, channels:].any()
    upgraded.save_pretrained(tmp_path)
    loaded = dualout.Denoiser.from_pretrained(tmp_path)
    for sampler in (dualout.samplers.DDIM(steps=3, clip=None), dualout.samplers.DPMSolver(steps=3, clip=None)):
        expected = sampler.sample(original, x, **conditions)
        assert torch.equal(sampler.sample(upgraded, x, **conditions), expected)
        assert torch.equal(sampler.sample(loaded, x, **conditions), expected)


@pytest.mark.parametrize("name", CASES)
def test_conditions_reach_the_network_and_new_rows_learn(name: str) -> None:
    _, shape, conditions, _ = CASES[name]
    model = upgrade(denoiser(name))
    x, t = dualout.noise(range(2), shape), torch.tensor([3, 700])
    loss = model.loss(x, t, dualout.noise(range(2, 4), shape), **conditions)
    loss.total.backward()
    (weight,) = (m.weight for m in model.modules() if isinstance(m, Wide))
    assert weight.grad is not None
    assert (weight.grad.flatten(1) != 0).any(1).sum() >= len(weight) * (shape[0] + 1) // (2 * shape[0] + 1)
    with torch.no_grad():
        seen = model(x, t, **conditions).x0
        for key, value in conditions.items():
            if isinstance(value, Tensor) and value.unique().numel() > 1 and "rope" not in key:
                assert not torch.equal(model(x, t, **(conditions | {key: value.flip(0)})).x0, seen), key


Step = Callable[[Any, Tensor, Tensor, dict[str, Any]], Tensor]
"""What diffusers' pipeline of a network does in one step: (network, x, its timestep, conditions) -> the flow."""


def packed(x: Tensor) -> Tensor:
    """FluxPipeline's."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpacked(y: Tensor, h: int, w: int) -> Tensor:
    """FluxPipeline's."""
    y = y.view(len(y), h // 2, w // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(len(y), -1, h, w)


def flux(network: Any, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> Tensor:
    b, _, h, w = x.shape
    ids = torch.zeros(h // 2, w // 2, 3)
    ids[..., 1] += torch.arange(h // 2)[:, None]
    ids[..., 2] += torch.arange(w // 2)[None]
    where = {"img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(5, 3)}
    return unpacked(network(packed(x), timestep=t.expand(b) / 1000, **where, **conditions).sample, h, w)


def flux2(network: Any, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> Tensor:
    b, c, h, w = x.shape
    one = torch.arange(1)
    where = {
        "img_ids": torch.cartesian_prod(one, torch.arange(h), torch.arange(w), one),
        "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(5)),
    }
    tokens = x.reshape(b, c, h * w).permute(0, 2, 1)
    y = network(tokens, timestep=t.expand(b) / 1000, **where, **conditions).sample
    return y.permute(0, 2, 1).reshape(b, c, h, w)


def qwen(network: Any, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> Tensor:
    b, _, h, w = x.shape
    shapes = [[(1, h // 2, w // 2)]] * b
    return unpacked(network(packed(x), timestep=t.expand(b) / 1000, img_shapes=shapes, **conditions).sample, h, w)


def ltx(network: Any, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> Tensor:
    b, c, frames, h, w = x.shape
    tokens = x.reshape(b, c, -1).permute(0, 2, 1)
    y = network(tokens, timestep=t.expand(b), num_frames=frames, height=h, width=w, **conditions).sample
    return y.permute(0, 2, 1).reshape(x.shape)


def plain(network: Any, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> Tensor:
    return network(hidden_states=x, timestep=t.expand(len(x)), **conditions).sample


def lumina(network: Any, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> Tensor:
    return -network(hidden_states=x, timestep=1 - t.expand(len(x)) / 1000, **conditions).sample


def z_image(network: Any, x: Tensor, t: Tensor, conditions: dict[str, Any]) -> Tensor:
    images = list(x.unsqueeze(2).unbind(0))
    y = network(images, (1000 - t.expand(len(x))) / 1000, list(conditions["cap_feats"]), return_dict=False)[0]
    return -torch.stack(y).squeeze(2)


LOOPS: dict[str, Step] = {
    "ChromaTransformer2DModel": flux,
    "EasyAnimateTransformer3DModel": plain,
    "Flux2Transformer2DModel": flux2,
    "FluxTransformer2DModel": flux,
    "LTXVideoTransformer3DModel": ltx,
    "Lumina2Transformer2DModel": lumina,
    "MochiTransformer3DModel": plain,
    "QwenImageTransformer2DModel": qwen,
    "SD3Transformer2DModel": plain,
    "WanTransformer3DModel": plain,
    "ZImageTransformer2DModel": z_image,
}


def sampled(name: str) -> tuple[list[int], Tensor, Tensor]:
    """Of the upgraded network: the times of four steps, where they begin and where they end."""
    _, shape, conditions, _ = CASES[name]
    sampler = dualout.samplers.DDIM(steps=4, clip=None)
    model, noise = upgrade(denoiser(name)), dualout.noise(range(2), shape)
    moments = list(sampler.trajectory(model, noise, **conditions))
    return [int(m.t) for m in moments[:4]], moments[0].x_t, sampler.sample(model, noise, **conditions)


@pytest.mark.parametrize("name", LOOPS)
@torch.no_grad()
def test_flows_agree_with_diffusers_own_loop(name: str) -> None:
    network, (times, x, end) = made(name), sampled(name)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=name.startswith("Mochi"))
    scheduler.set_timesteps(sigmas=FLOW.tables()[1][times].tolist())
    for t in scheduler.timesteps:
        y = LOOPS[name](network, x, t, CASES[name].conditions)
        x = scheduler.step(y, t, x, return_dict=False)[0]
    torch.testing.assert_close(end, x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_stable_video_diffusion_agrees_with_diffusers_own_loop() -> None:
    name = "UNetSpatioTemporalConditionModel"
    network, (times, x, end) = made(name), sampled(name)
    alpha, sigma = (table[times] for table in schedule_of(name).tables())
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous")
    scheduler.set_timesteps(4)
    scheduler.sigmas = torch.cat([sigma / alpha, sigma.new_zeros(1)]).float()
    scheduler.timesteps = 0.25 * scheduler.sigmas[:-1].log()
    others = dict(CASES[name].conditions)
    frames_first = others.pop("image_latents").transpose(1, 2)
    x = x.transpose(1, 2) / alpha[0].float()
    for t in scheduler.timesteps:
        x_in = torch.cat([scheduler.scale_model_input(x, t), frames_first], 2)
        x = scheduler.step(network(x_in, t, **others).sample, t, x).prev_sample
    torch.testing.assert_close(end.transpose(1, 2), x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cogvideox_agrees_with_diffusers_own_loop() -> None:
    name = "CogVideoXTransformer3DModel"
    network, (times, x, end) = made(name), sampled(name)
    scheduler = diffusers.CogVideoXDDIMScheduler(
        snr_shift_scale=1.0, rescale_betas_zero_snr=False, prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    )  # fmt: skip
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == times
    x = x.transpose(1, 2)
    for t in scheduler.timesteps:
        y = network(x, timestep=t.expand(2), **CASES[name].conditions).sample
        x = scheduler.step(y, int(t), x).prev_sample
    torch.testing.assert_close(end.transpose(1, 2), x, rtol=1e-4, atol=1e-4)


def test_the_guide_names_them_all_with_what_they_predict() -> None:
    guide = (Path(__file__).parents[2] / "docs/guide/upgrade.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(flow|velocity|eps)`.*?\| (.*) \|$", guide, re.MULTILINE)
    named = {name: predicts for predicts, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert named == {name: convention.predicts for name, convention in CONVENTIONS.items()}


def test_a_network_of_packed_tokens_counts_its_rows() -> None:
    for name, count in [("FluxTransformer2DModel", 4 * 9), ("QwenImageTransformer2DModel", 9)]:
        inner = upgrade(denoiser(name)).network.network.network.network  # type: ignore[union-attr]
        assert inner.config.out_channels == inner.out_channels == count  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("FluxTransformer2DModel", (2, 12, 16)), ("UNetSpatioTemporalConditionModel", (2, 3, 8, 8, 8))],
)
def test_one_that_is_not_adapted_is_refused_with_what_to_do(name: str, shape: tuple[int, ...]) -> None:
    conditions = {k: v for k, v in CASES[name].conditions.items() if k != "image_latents"}
    where = {"img_ids": torch.zeros(12, 3), "txt_ids": torch.zeros(5, 3)} if name.startswith("Flux") else {}
    example = like_normal(*shape), torch.tensor([3, 700]), conditions | where
    with pytest.raises(InputError, match=rf"{name} is widened behind dualout.networks.adapted\(network, schedule\)"):
        dualout.widen(Keyword(made(name)), 9, example=example)


def test_one_that_shapes_by_its_input_is_refused_where_it_is_not_adapted() -> None:
    network = made("EasyAnimateTransformer3DModel")
    for given in (network, Keyword(network), FlowTime(Keyword(network), FLOW)):
        with pytest.raises(InputError, match=r"as many channels as it sees. .*behind dualout.networks.adapted\("):
            dualout.widen(given, 9)


def test_others_are_refused_with_the_adapters_there_are() -> None:
    class Frames(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.out(x.movedim(2, -1)).movedim(-1, 2)

    with pytest.raises(InputError, match=r"ChannelsAt\(network, side\), one of packed tokens behind .*Tokens"):
        dualout.widen(Frames(), 9, example=(torch.randn(1, 3, 4, 8, 8), torch.zeros(1)))


def test_adapted_says_what_it_lacks() -> None:
    with pytest.raises(InputError, match=r"told the noise level: say adapted.network, schedule.*RectifiedFlow"):
        adapted(made("FluxTransformer2DModel"))
    with pytest.raises(InputError, match=r"straight line .* say RectifiedFlow\(shift=…\); got linear"):
        adapted(made("FluxTransformer2DModel"), dualout.schedules.Linear())
    with pytest.raises(InputError, match="how a Linear is called is not known here"):
        adapted(torch.nn.Linear(2, 2), FLOW)
    network: Any = denoiser("UNetSpatioTemporalConditionModel").network
    with pytest.raises(InputError, match=r"sees image_latents beside x_t, images of its shape \(2, 4, 3, 8, 8\)"):
        network(like_normal(2, 4, 3, 8, 8), torch.tensor([3, 700]))


def test_a_denoiser_of_another_schedule_than_its_network_is_told_is_refused() -> None:
    network = adapted(made("WanTransformer3DModel"), FLOW)
    for outside in (network, Positional(network)):
        with pytest.raises(InputError, match=r"is told the noise levels of .*shift=3.* by its FlowTime"):
            dualout.Denoiser(outside, dualout.Flow(), RectifiedFlow())


def test_commands_say_that_they_tell_no_text(tmp_path: Path) -> None:
    upgrade(denoiser("WanTransformer3DModel")).save_pretrained(tmp_path, image={"channels": 4, "size": [8, 8]})
    with pytest.raises(InputError, match="one that is told more, as text, samples in Python"):
        Model.load(tmp_path)


def test_one_derived_from_a_known_network_is_adapted_as_it() -> None:
    class Mine(diffusers.WanTransformer3DModel):
        pass

    Mine.__module__ = "mine"
    _, shape, conditions, _ = CASES["WanTransformer3DModel"]
    network = adapted(Mine(**CASES["WanTransformer3DModel"].arguments), FLOW)
    assert isinstance(network, FlowTime)
    x, t = dualout.noise(range(2), shape), torch.tensor([3, 700])
    with torch.no_grad():
        assert dualout.widen(network, 9, example=(x, t, conditions))(x, t, **conditions).sample.shape[1] == 9


def test_one_of_diffusers_that_derives_from_a_known_one_is_not_called_as_that() -> None:
    class Dream(diffusers.UNet2DConditionModel):
        """DreamLite's, of rectified flow, derives from Stable Diffusion's."""

    Dream.__module__ = "diffusers.models.unets.unet_dream"
    with pytest.raises(InputError, match="how a Dream is called is not known here"):
        adapted(Dream(**CASES["UNet2DConditionModel"].arguments), FLOW)


SOUND = {
    "MiniMaxMusic3Transformer1DModel": (
        {
            "in_channels": 4, "condition_dim": 12, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8,
            "ff_inner_dim": 16, "rotary_dim": 4, "fourier_embedding_dim": 8,
        },
        {"encoder_hidden_states": like_normal(2, 16, 12)},
    ),
    "StableAudioDiTModel": (
        {
            **HEADS, **BOTH, "sample_size": 16, "num_key_value_attention_heads": 2, "cross_attention_dim": 8,
            "time_proj_dim": 8, "global_states_input_dim": 6, "cross_attention_input_dim": 12,
        },
        {"global_hidden_states": like_normal(2, 1, 6), "rotary_embedding": rotary(17, 4)},
    ),
    "StableAudio3DiTModel": (
        {
            "io_channels": 4, "patch_size": 2, "embed_dim": 128, "depth": 1, "num_heads": 2, "cond_token_dim": 12,
            "global_cond_dim": 6, "local_add_cond_dim": 0, "timestep_features_dim": 8, "num_memory_tokens": 2,
        },
        {"global_hidden_states": like_normal(2, 6)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
@torch.no_grad()
def test_new_channels_of_sound_go_past_what_mixes_the_old(name: str, tmp_path: Path) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    torch.manual_seed(3)
    arguments, conditions = SOUND[name]
    network = Keyword(getattr(diffusers, name)(**arguments).eval())
    for parameter in network.parameters():
        parameter.normal_(0, 0.1)
    x, t = like_normal(2, 4, 16), torch.tensor([0.3, 0.7])
    conditions = TEXT | conditions
    before = network(x, t, **conditions).sample
    # an x0-network's places, and once more as many
    wide = dualout.widen(dualout.widen(network, 9, places=[4, 5, 6, 7]), 12)
    after = wide(x, t, **conditions).sample
    assert after.shape == (2, 12, 16)
    assert torch.equal(after[:, 4:8], before)
    assert not after[:, [0, 1, 2, 3, 8, 9, 10, 11]].any()
    assert wide.state_dict().keys() == network.state_dict().keys()
    model = dualout.Denoiser(wide, dualout.Dual(), dualout.schedules.Cosine())
    model.save_pretrained(tmp_path)
    loaded = dualout.Denoiser.from_pretrained(tmp_path).network
    assert torch.equal(loaded(x, t, **conditions).sample, after)  # type: ignore[operator]


@torch.no_grad()
def test_a_transposed_convolution_at_the_end_comes_back_from_disk(tmp_path: Path) -> None:
    if not hasattr(diffusers, "AceStepTransformer1DModel"):
        pytest.skip("this diffusers has no AceStepTransformer1DModel")
    torch.manual_seed(3)
    inner = diffusers.AceStepTransformer1DModel(
        **{"in_channels": 12, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        **{"intermediate_size": 16, "num_hidden_layers": 1, "encoder_hidden_size": 8, "audio_acoustic_hidden_dim": 4},
    ).eval()
    network, x, t = ChannelsAt(Keyword(inner), -1), like_normal(2, 4, 8), torch.tensor([0.3, 0.7])
    told = {"timestep_r": t, "encoder_hidden_states": like_normal(2, 3, 8), "context_latents": like_normal(2, 8, 8)}
    before = network(x, t, **told)
    wide = dualout.widen(network, 9, places=[4, 5, 6, 7], example=(x, t, told))
    after = wide(x, t, **told)
    assert after.shape == (2, 9, 8)
    assert torch.equal(after[:, 4:8], before)
    assert not after[:, [0, 1, 2, 3, 8]].any()
    dualout.Denoiser(wide, dualout.Dual(), dualout.schedules.Cosine()).save_pretrained(tmp_path)
    loaded = dualout.Denoiser.from_pretrained(tmp_path).network
    assert torch.equal(loaded(x, t, **told), after)  # type: ignore[operator]
