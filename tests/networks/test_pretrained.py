"""Checkpoints: what is saved comes back the same, and what is damaged or foreign is refused as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dualout
from dualout import checkpoint
from dualout.errors import InputError
from dualout.networks import ScaledTime, build, widen

DDIM = dualout.samplers.DDIM(steps=5)


def denoiser(network: nn.Module | None = None, **options: Any) -> dualout.Denoiser:
    network = build("tiny", 1, 8, 3, **options) if network is None else network
    return dualout.Denoiser(network, dualout.Dual(), dualout.schedules.Cosine(steps=100)).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint")
    denoiser().save_pretrained(path)
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.fixture
def saved(written: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def images(of: dualout.Denoiser) -> torch.Tensor:
    return DDIM.sample(of, dualout.noise(range(3), (1, 8, 8)))


MODELS: dict[str, Callable[[], dualout.Denoiser]] = {
    "plain": denoiser,
    "widened": lambda: denoiser(widen(build("tiny", 1, 8, 1), 3, init=nn.init.xavier_uniform_)),
    "bfloat16": lambda: denoiser(build("tiny", 1, 8, 3).bfloat16()),
    "float64": lambda: denoiser(build("tiny", 1, 8, 3).double()),
    "adapted": lambda: denoiser(ScaledTime(build("tiny", 1, 8, 3), 10.0)),
    "compiled": lambda: denoiser(torch.compile(build("tiny", 1, 8, 3))),
    "adapted and compiled": lambda: denoiser(ScaledTime(torch.compile(build("tiny", 1, 8, 3)), 10.0)),
    "table of ratios": lambda: dualout.Denoiser(
        build("tiny", 1, 8, 2), dualout.Dual(ratio="step"), dualout.schedules.FromBetas([0.01] * 99)
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_saved_and_loaded_samples_are_the_same(model: str, tmp_path: Path) -> None:
    before = MODELS[model]().eval()
    before.card = {"training": {"steps": 3}}
    before.save_pretrained(tmp_path / "new" / "directory", image={"channels": 1, "size": 8})
    after = dualout.Denoiser.from_pretrained(tmp_path / "new" / "directory")
    assert (after.parameterization, after.schedule, after.card) == (
        before.parameterization,
        before.schedule,
        before.card,
    )
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(images(before), images(after))
    state, again = checkpoint.tensors_of(before), after.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[k], again[k]) and state[k].dtype == again[k].dtype for k in state)
    assert not after.training


def test_what_a_denoiser_is_cannot_be_said_otherwise(tmp_path):
    with pytest.raises(InputError, match=r"config.json has the schedule of the denoiser itself"):
        denoiser().save_pretrained(tmp_path / "out", schedule="cosine")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [False, True])
def test_what_cannot_be_written_down_leaves_what_was_there(there: bool, written: dict[str, bytes], tmp_path: Path):
    path = tmp_path / "out"
    if there:
        path.mkdir()
        for name, content in written.items():
            (path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json takes JSON values alone.*set is not JSON"):
        denoiser().save_pretrained(path, seen={1, 2})
    with pytest.raises(InputError, match="meta device have no values"):
        denoiser(build("tiny", 1, 8, 3).to("meta")).save_pretrained(path)
    network = build("tiny", 1, 8, 3)
    for value, dtype in ((float("nan"), torch.float32), (float("-inf"), torch.bfloat16)):
        network.to(dtype).conv_out.bias.data[1] = value
        with pytest.raises(InputError, match=r"NaN or infinite are not written: .*; in network\.conv_out\.bias$"):
            denoiser(network).save_pretrained(path)
    assert path.exists() is there
    assert {p.name: p.read_bytes() for p in path.glob("*")} == (written if there else {})


def test_a_widened_network_comes_back_bit_for_bit(tmp_path: Path) -> None:
    network = build("tiny", 3, 8, 3).eval()
    schedule, noise = dualout.schedules.Linear(), dualout.noise(range(2), (3, 8, 8))
    dualout.Denoiser(widen(network, 7), dualout.Dual(), schedule).save_pretrained(tmp_path)
    original = dualout.Denoiser(network, dualout.Epsilon(), schedule)
    upgraded = dualout.Denoiser.from_pretrained(tmp_path).route("eps")
    assert torch.equal(DDIM.sample(upgraded, noise), DDIM.sample(original, noise))
    config = json.loads((tmp_path / "config.json").read_text())["network"]
    assert config["class"] == "diffusers.UNet2DModel"
    assert config["arguments"]["out_channels"] == 7


def test_a_network_of_ones_own_loads_the_weights(saved: Path) -> None:
    network = build("tiny", 1, 8, 3).bfloat16()
    loaded = dualout.Denoiser.from_pretrained(saved, network=network)
    assert loaded.network is network
    assert next(network.parameters()).dtype == torch.bfloat16


def change(path: Path, **entries: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | entries))


def arguments(path: Path, **entries: Any) -> None:
    network = json.loads((path / "config.json").read_text())["network"]
    change(path, network=network | {"arguments": network["arguments"] | entries})


def cut(path: Path, at: int) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:at])


def weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = checkpoint.read_tensors(path / "model.safetensors")
    edit(tensors)
    checkpoint.write_tensors(path / "model.safetensors", tensors)


def wide_layer(**entries: Any) -> dict[str, Any]:
    of = {"in_channels": 24, "out_channels": 3, "kernel_size": 3, "padding": 1, "rows": [[0], [1, 2]]}
    return {"conv_out": {"class": "dualout.networks.wide.WideConv2d", "arguments": of | entries}}


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "no checkpoint: config.json is missing .*model.safetensors"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "is missing model.safetensors"),
    "half a config": (lambda p: (p / "config.json").write_text('{"schedule": '), "config.json cannot be read"),
    "deep config": (lambda p: (p / "config.json").write_text("[" * 99_999), "config.json cannot be read"),
    "no text": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json cannot be read"),
    "another config": (lambda p: (p / "config.json").write_text("[]"), "lacks schedule, parameterization, network"),
    "later format": (lambda p: change(p, format=99), "has format 99, .* update dualout"),
    "odd format": (lambda p: change(p, format="x"), "has format x"),
    "foreign class": (lambda p: change(p, network={"class": "os.system"}), "'os.system' is not on the allow-list"),
    "a pipeline": (lambda p: change(p, network={"class": "diffusers.DDPMPipeline"}), "not on the allow-list"),
    "a module's import": (
        lambda p: change(p, network={"class": "dualout.networks.widen.Denoiser"}),
        "not on the allow-list",
    ),
    "torch's own": (lambda p: change(p, network={"class": "torch.nn.Linear"}), "not on the allow-list"),
    "foreign layer": (
        lambda p: change(
            p,
            network=json.loads((p / "config.json").read_text())["network"]
            | {"layers": {"conv_out": {"class": "torch.nn.Identity"}}},
        ),
        "'torch.nn.Identity' is not on the allow-list",
    ),
    "layer nowhere": (
        lambda p: change(
            p,
            network=json.loads((p / "config.json").read_text())["network"]
            | {"layers": {"conv_oot": wide_layer()["conv_out"]}},
        ),
        "has no attribute `conv_oot`",
    ),
    "rows that are not rows": (
        lambda p: change(
            p, network=json.loads((p / "config.json").read_text())["network"] | {"layers": wide_layer(rows=[[0, 1]])}
        ),
        "rows are 0 to 2 in groups, each once",
    ),
    "no class": (lambda p: change(p, network="UNet2DModel"), "a network is written"),
    "arguments in a list": (
        lambda p: change(p, network={"class": "diffusers.UNet2DModel", "arguments": [1]}),
        "a network is written",
    ),
    "arguments by another name": (
        lambda p: change(p, network={"class": "diffusers.UNet2DModel", "args": {"in_channels": 1}}),
        "a network is written .*'args'",
    ),
    "unknown argument": (lambda p: arguments(p, depth=3), "cannot be built: .*'depth'"),
    "wrong argument": (lambda p: arguments(p, block_out_channels="wide"), "cannot be built"),
    "another width": (
        lambda p: arguments(p, block_out_channels=[12, 24]),
        r"nothing was loaded; of another shape: .*\(24, 1, 3, 3\) for \(12, 1, 3, 3\).* and \d+ more",
    ),
    "another output": (lambda p: arguments(p, out_channels=7), r"conv_out.weight \(3, 24, 3, 3\) for \(7, 24, 3, 3\)"),
    "another schedule": (lambda p: change(p, schedule={"name": "cosin"}), "did you mean 'cosine'"),
    "another gate": (lambda p: change(p, parameterization={"name": "dual", "gate": "open"}), "unknown gate 'open'"),
    "another head": (lambda p: change(p, parameterization={"name": "dual", "ratio": "step"}), "missing: head.logit"),
    "header only": (lambda p: cut(p, 100), "damaged or is no safetensors file"),
    "last byte missing": (lambda p: cut(p, -1), "damaged or is no safetensors file"),
    "empty weights": (lambda p: cut(p, 0), "damaged or is no safetensors file"),
    "a pickle": (lambda p: torch.save({"a": torch.zeros(1)}, p / "model.safetensors"), "damaged or is no safetensors"),
    "a tensor less": (lambda p: weights(p, lambda t: t.pop("network.conv_out.bias")), "missing: network.conv_out.bias"),
    "a tensor more": (lambda p: weights(p, lambda t: t.update(odd=torch.zeros(1))), "unexpected: odd"),
    "not a number": (
        lambda p: weights(p, lambda t: t["network.conv_out.bias"].fill_(float("nan"))),
        "NaN or infinite weights, nothing was loaded; in network.conv_out.bias",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, saved: Path) -> None:
    damage, message = DAMAGE[case]
    damage(saved)
    with pytest.raises(InputError, match=message):
        dualout.Denoiser.from_pretrained(saved)


def test_nothing_is_loaded_when_something_does_not_fit(saved: Path) -> None:
    network = build("tiny", 1, 8, 3)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    weights(saved, lambda t: t.pop("network.conv_out.bias"))
    with pytest.raises(InputError, match="nothing was loaded"):
        dualout.Denoiser.from_pretrained(saved, network=network)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize("path", ["nowhere", "/nowhere", "./a/b", "a/b/c"])
def test_paths_that_lead_nowhere(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no checkpoint directory"):
        dualout.Denoiser.from_pretrained(path)


@pytest.mark.parametrize("where", ["", "unet"])
def test_a_model_of_diffusers_is_told_what_makes_a_checkpoint_of_it(where: str, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(build("tiny", 1, 8, 1), DDPMScheduler()).save_pretrained(tmp_path)
    name = "UNet2DModel" if where else "DDPMPipeline"
    with pytest.raises(InputError, match=f"it is diffusers' {name}: dualout export --format dualout makes"):
        dualout.Denoiser.from_pretrained(tmp_path / where)


def test_networks_that_could_not_be_read_back_are_not_written(tmp_path: Path) -> None:
    class Own(nn.Module):
        pass

    changed = build("tiny", 1, 8, 1)
    changed.conv_out = nn.Conv2d(24, 3, 3, padding=1)
    for network, message in [
        (Own(), "class .*Own cannot be saved"),
        (nn.DataParallel(build("tiny", 1, 8, 1)), r"in DataParallel cannot be saved.*network\.module"),
        (ScaledTime(Own(), 1.0), "class .*Own cannot be saved"),
        (lambda x, t: x, "cannot be saved"),
        (changed, r"changed after it was made.*conv_out.weight \(3, 24, 3, 3\) for \(1, 24, 3, 3\)"),
    ]:
        with pytest.raises(InputError, match=message):
            denoiser(network).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot write"):
        denoiser().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
