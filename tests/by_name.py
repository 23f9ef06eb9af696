"""A small one of each of diffusers' networks that are known by name, and how each is called."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor

import dualout
from dualout.networks import adapted
from dualout.networks.diffusers import CONVENTIONS
from dualout.schedules import RectifiedFlow, ScaledLinear, Schedule

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
