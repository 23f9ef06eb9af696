"""Every recipe is read by dualout train as it is, says where it comes from, and builds the network that it names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dualout
from dualout.cli.main import main
from dualout.cli.options import parse
from dualout.cli.train import Options
from dualout.data.base import open_source
from dualout.errors import InputError
from dualout.networks import build
from dualout.networks.adapter import innermost
from dualout.parameterizations import LearnedVariance, Parameterization
from dualout.samplers import Sampler
from dualout.schedules import Schedule

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
EXPERIMENTS = sorted((Path(__file__).parents[2] / "recipes").glob("*/*.yaml"))
SHAPES = {"digits": (1, 8), "fashion-mnist": (1, 28)}
"""Channels and size, where the data decide; colour and the recipe's size elsewhere."""
PAPER = {"cifar10", "celeba64", "iddpm-cifar10", "imagenet64", "imagenet128"}


def options(recipe: Path, *more: str) -> Options:
    return parse(Options, "train", ["--config", str(recipe), *more])


def network_of(config: Options, recipe: Path) -> torch.nn.Module:
    channels, size = SHAPES.get(recipe.stem, (3, config.size))
    assert size is not None
    with torch.device("meta"):
        return build(
            config.network or "tiny", channels, size,
            Parameterization.parse(config.parameterization or "dual").channels(channels),
            classes=1000 if config.conditional else None,
        )  # fmt: skip


def test_there_is_one_for_each_of_the_papers_networks_and_small_ones() -> None:
    assert {r.stem for r in RECIPES} >= PAPER | {"digits", "fashion-mnist"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_train_takes_every_field(recipe: Path) -> None:
    written, read = yaml.safe_load(recipe.read_text()), options(recipe)
    for key, value in written.items():
        if key not in ("parameterization", "schedule"):
            assert getattr(read, key) == value
    assert read.parameterization is not None
    assert read.schedule is not None
    assert Parameterization.parse(read.parameterization) == Parameterization.parse(written["parameterization"])
    assert Schedule.parse(read.schedule) == Schedule.parse(written["schedule"])
    Sampler.parse(read.sampler)
    open_source(read.data, size=read.size, grey=read.grey)
    # a flag still has the last word
    assert options(recipe, "--parameterization", "eps", "--steps", "7").steps == 7


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_the_resolved_configuration_is_printed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["train", "--config", str(recipe), "--print_config"])
    except SystemExit as stop:
        code = stop.code
    assert not code
    printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    for key, value in yaml.safe_load(recipe.read_text()).items():
        assert printed[key] == value


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_it_says_where_it_comes_from_and_what_to_expect(recipe: Path) -> None:
    opening = re.match(r"(#[^\n]*\n)+", recipe.read_text())
    assert opening is not None
    for what in ("Source:", "Aims at:", "Cost:", "Data:"):
        assert f"# {what}" in opening[0]
    count = sum(p.numel() for p in network_of(options(recipe), recipe).parameters())
    told = re.search(r"([\d,]+|about [\d.]+ million) parameters", opening[0])
    assert told is not None
    if told[1].startswith("about"):
        assert count == pytest.approx(float(told[1].split()[1]) * 1e6, rel=0.06)
    else:
        assert f"{count:,}" == told[1]


@pytest.mark.parametrize("recipe", EXPERIMENTS, ids=lambda r: f"{r.parent.name}-{r.stem}")
def test_an_experiment_says_where_it_comes_from_and_what_was_found(recipe: Path) -> None:
    opening = "".join(line for line in recipe.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    for what in ("Source:", "Data:", "Expect:", "Cost:"):
        assert f"# {what}" in opening
    found = re.findall(r"docs/results/[\w-]+\.md", opening)
    assert found
    assert all((recipe.parents[2] / page).is_file() for page in found)
    name = "compare" if recipe.parent.name == "compare" else "train"
    parse(importlib.import_module(f"dualout.cli.{name}").Options, name, ["--config", str(recipe)])


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem in PAPER], ids=lambda r: r.stem)
def test_the_cost_is_that_of_the_network(recipe: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = options(recipe)
    network, x = network_of(config, recipe), torch.empty(1, 3, config.size, config.size, device="meta")  # type: ignore[call-overload]
    t = torch.zeros(1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(x, t, **({"class_labels": t} if config.conditional else {}))
    forward = counter.get_total_flops()
    told, each = re.search(r"# Cost: +(\S+) floating-point operations \((\S+) GFLOP", recipe.read_text()).groups()  # type: ignore[union-attr]
    assert float(each) * 1e9 == pytest.approx(forward, rel=0.01)
    assert float(told) == pytest.approx(3 * forward * config.batch_size * config.steps, rel=0.03)


def test_the_papers_settings() -> None:
    by = {r.stem: options(r) for r in RECIPES}
    cifar = by["cifar10"]
    assert (cifar.batch_size, cifar.lr, cifar.ema, cifar.weight_decay) == (128, 2e-4, 0.9999, 0.0)
    assert cifar.network == "ddpm-cifar10:dropout=0.1"
    assert Schedule.parse(cifar.schedule or "") == dualout.schedules.Linear(1000, 1e-4, 2e-2)
    assert Parameterization.parse(cifar.parameterization or "") == dualout.Dual()
    iddpm = by["iddpm-cifar10"]
    assert Schedule.parse(iddpm.schedule or "") == dualout.schedules.Cosine(4000)
    assert Parameterization.parse(iddpm.parameterization or "") == LearnedVariance(base=dualout.Dual(), weight=0.001)
    # the network sees time up to 1000, as the original's does
    assert network_of(iddpm, Path("iddpm-cifar10.yaml")).scale * 4000 == 1000
    for name in ("imagenet64", "imagenet128"):
        network = innermost(network_of(by[name], Path(f"{name}.yaml")))
        assert network.config.num_class_embeds == 1001
        assert network.config.out_channels == 10


def test_a_recipe_with_a_misspelt_field_is_refused(tmp_path: Path) -> None:
    changed = tmp_path / "changed.yaml"
    changed.write_text(RECIPES[0].read_text().replace("batch_size:", "batch_sice:"))
    with pytest.raises(InputError, match="batch_sice"):
        options(changed)


def test_the_small_recipe_trains(tmp_path: Path) -> None:
    recipe = next(str(r) for r in RECIPES if r.stem == "digits")
    out = tmp_path / "run"
    arguments = ["--steps", "2", "--batch_size", "8", "--sample_every", "0", "--device", "cpu", "--out", str(out)]
    assert not main(["train", "--config", recipe, *arguments])
    assert dualout.Denoiser.from_pretrained(out).parameterization == dualout.Dual()


def test_a_network_behind_an_adapter_is_told_classes(tmp_path: Path) -> None:
    recipe, config = next(r for r in RECIPES if r.stem == "digits"), tmp_path / "adapted.yaml"
    arguments = {"block_out_channels": [16, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}
    arguments |= {"up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 4, "attention_head_dim": None}
    inner = {"class": "diffusers.UNet2DModel", "arguments": arguments}
    network = {"class": "dualout.networks.Heads", "arguments": {"network": inner, "heads": 2}}
    config.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"network": network, "conditional": True}))
    out = str(tmp_path / "run")
    more = ["--steps", "2", "--batch_size", "8", "--sample_every", "0", "--device", "cpu", "--out", out]
    assert not main(["train", "--config", str(config), *more])
    loaded = dualout.Denoiser.from_pretrained(out).network
    assert innermost(loaded).config.num_class_embeds == 11
