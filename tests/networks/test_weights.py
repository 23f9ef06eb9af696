"""Files of weights as trainings leave them: which of what they hold is taken, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dualout.errors import InputError
from dualout.networks import build, foreign

NETWORK, PLAIN = "tiny:width=8", "plain:network=(tiny:width=8):size=8"
Weights = dict[str, Tensor]


def weights(seed: int) -> Weights:
    torch.manual_seed(seed)
    return build(NETWORK, 1, 8, 1).state_dict()


RAW, AVERAGE = weights(0), weights(1)
LORA = {f"unet.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}


def under(prefix: str, tensors: Weights) -> Weights:
    return {f"{prefix}{k}": v for k, v in tensors.items()}


def dotless(tensors: Weights) -> Weights:
    return {k.replace(".", ""): v for k, v in tensors.items()}


def listed() -> dict[str, Any]:
    from diffusers.training_utils import EMAModel

    return EMAModel([torch.nn.Parameter(v) for v in AVERAGE.values()]).state_dict()


def averaged_by_torch() -> Weights:
    network = build(NETWORK, 1, 8, 1)
    network.load_state_dict(AVERAGE)
    return torch.optim.swa_utils.AveragedModel(network).state_dict()


STEP = torch.tensor(7)
COUNTS = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": STEP}
AVERAGES: dict[str, Any] = {
    "ema": {"model": RAW, "ema": AVERAGE, "ema_sched": {"power": 0.75}},
    "ema_model": {"model": RAW, "ema_model": AVERAGE},
    "model_ema": {"model": RAW, "model_ema": under("module.", AVERAGE)},
    "ema_model_state_dict": {"model_state_dict": RAW, "ema_model_state_dict": AVERAGE, "optimizer": {"state": {}}},
    "state_dict_ema": {"state_dict": RAW, "state_dict_ema": AVERAGE},
    "params_ema": {"params": RAW, "params_ema": AVERAGE},
    "ema_0.9999": {"unet": RAW, "ema_0.9999": {"state_dict": AVERAGE}},
    "a count beside": {"step": STEP, "model": RAW, "ema": AVERAGE},
    "torch's": averaged_by_torch(),
    "a part": {"state_dict": under("net.", RAW) | under("net_ema.", AVERAGE)},
    "ema-pytorch's": {"model": RAW, "ema": under("online_model.", RAW) | under("ema_model.", AVERAGE) | {"step": STEP}},
    "latent-diffusion's": {"state_dict": under("model.", RAW) | under("model_ema.", dotless(AVERAGE)) | COUNTS},
}


def loaded(content: Any, path: Path, adapter: str = PLAIN) -> Weights:
    torch.save(content, path / "weights.ckpt")
    return foreign.load(path / "weights.ckpt", adapter).network.state_dict()  # type: ignore[union-attr]


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_is_taken_before_what_it_is_of(name: str, tmp_path: Path) -> None:
    assert same(loaded(AVERAGES[name], tmp_path), AVERAGE)


def test_a_file_of_several_is_read_with_the_others(tmp_path: Path) -> None:
    names = list(RAW)
    for number in range(3):
        part = {name: RAW[name] for name in names[number::3]}
        save_file(part, tmp_path / f"model-0000{number + 1}-of-00003.safetensors")
    shard = tmp_path / "model-00002-of-00003.safetensors"
    assert same(foreign.load(shard, PLAIN).network.state_dict(), RAW)  # type: ignore[union-attr]
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"one of 3 files, of which model-00003-of-00003.safetensors is missing"):
        foreign.load(shard, PLAIN)


def test_the_entry_that_is_named_is_taken(tmp_path: Path) -> None:
    assert same(loaded(AVERAGES["ema_model"], tmp_path, f"{PLAIN}:entry=model"), RAW)
    assert same(loaded({"ema": RAW, "ema_0.9999": AVERAGE}, tmp_path, f"{PLAIN}:entry=ema_0.9999"), AVERAGE)
    assert same(loaded({"a": {"b": RAW, "ema": AVERAGE}}, tmp_path, f"{PLAIN}:entry=a.b"), RAW)


@pytest.mark.parametrize("before", ["model.", "net.", "model._orig_mod.", "a.b."])
def test_names_that_begin_alike_are_told_and_taken(before: str, tmp_path: Path) -> None:
    # a metric of the training lies beside
    content = {"state_dict": under(before, RAW) | {"fid.features": torch.ones(3)}, "pytorch-lightning_version": "2"}
    plain = before.replace("_orig_mod.", "")
    with pytest.raises(InputError, match=f"begin with '{plain}' in .*: say prefix={plain}"):
        loaded(content, tmp_path)
    assert same(loaded(content, tmp_path, f"{PLAIN}:prefix={plain}"), RAW)
    content["state_dict"] |= under("ema_model.", AVERAGE)
    assert same(loaded(content, tmp_path, f"{PLAIN}:prefix={plain}"), AVERAGE)


REFUSED: list[tuple[Any, str, str]] = [
    ({"model": RAW, "ema": listed()}, "", "an average without names, a list of shadow_params: save the network's"),
    ({"ema": AVERAGE, "ema_0.99": AVERAGE}, "", "more than one average: it holds ema, ema_0.99; say which by entry="),
    (under("ema.", AVERAGE) | under("net_ema.", AVERAGE), "", "more than one average: ema, net_ema"),
    (under("model.", RAW) | under("ema.", dotless({"a.b": STEP.view(1)})), "", "has other names than the network"),
    ({"generator": RAW}, "", "no weights at its top: it holds generator; say which by entry=NAME"),
    ({"model": RAW}, ":entry=model.conv_in.x", "has no entry 'model.conv_in.x'"),
    ({"step": 7}, ":entry=step.x", "has no entry 'step.x'; it has a value of type int there"),
    ({"model": RAW, "list": [1]}, ":entry=list", "holds a list there, not weights by name"),
    (LORA, "", "holds a LoRA, which changes weights that lie elsewhere: merge it in diffusers"),
    ({"lora_unet_mid.lora_down.weight": torch.ones(2, 2)}, "", "holds a LoRA"),
    ({"mid.attn.to_q.lora.up.weight": torch.ones(2, 2)}, "", "holds a LoRA"),
]


@pytest.mark.parametrize(("content", "options", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_what_cannot_be_chosen_is_said(content: Any, options: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        loaded(content, tmp_path, PLAIN + options)


def test_directories_of_something_else_are_told_what_to_do(tmp_path: Path) -> None:
    accelerate = tmp_path / "checkpoint-500"
    accelerate.mkdir()
    save_file(RAW, accelerate / "model.safetensors")
    (accelerate / "scheduler.bin").write_bytes(b"1")
    says = "of a file of weights, as model.safetensors, name the file itself, with --adapter"
    for adapter in (None, PLAIN):
        with pytest.raises(InputError, match=says):
            foreign.load(accelerate, adapter)
    assert same(foreign.load(accelerate / "model.safetensors", PLAIN).network.state_dict(), RAW)  # type: ignore[union-attr]
    for name in ("pytorch_lora_weights.safetensors", "adapter_config.json"):
        (tmp_path / name).mkdir()
        save_file(LORA, tmp_path / name / name)
        with pytest.raises(InputError, match="holds a LoRA"):
            foreign.load(tmp_path / name)
