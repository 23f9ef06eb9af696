"""diffusers' networks, each called by its own convention, widened and saved; and those that are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import dualout
from by_name import BOTH, CASES, FLOW, HEADS, TEXT, denoiser, like_normal, made, rotary
from dualout.denoiser import tensor_of
from dualout.errors import InputError
from dualout.evaluation.model import Model
from dualout.networks import ChannelsAt, FlowTime, Keyword, Positional, adapted
from dualout.networks.diffusers import CONVENTIONS
from dualout.networks.wide import Wide
from dualout.schedules import RectifiedFlow
from dualout.training.upgrade import upgrade


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


"""What diffusers' pipeline of a network does in one step: (network, x, its timestep, conditions) -> the flow."""


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
