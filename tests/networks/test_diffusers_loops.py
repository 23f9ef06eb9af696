"""diffusers' networks of flow and video, compared with diffusers' own loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import dualout
from by_name import CASES, FLOW, denoiser, made, schedule_of
from dualout.training.upgrade import upgrade

Step = Callable[[Any, Tensor, Tensor, dict[str, Any]], Tensor]


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
