"""Pipelines and models of diffusers as sources of dualout upgrade."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dualout
from dualout.cli.main import main
from dualout.errors import InputError
from dualout.networks import build, foreign
from dualout.parameterizations import Epsilon, LearnedVariance, Velocity
from upgrade_calls import NETWORK, digest, first_of, upgraded


def scheduler(**options):
    from diffusers import DDPMScheduler

    return DDPMScheduler(**options)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_pipeline_of_diffusers(unet, tmp_path, prediction, capsys) -> None:
    from diffusers import DDPMPipeline

    path, out = tmp_path / "pipeline", tmp_path / "out"
    DDPMPipeline(unet, scheduler(prediction_type=prediction, beta_schedule="squaredcos_cap_v2")).save_pretrained(path)
    before = digest(path)
    read = foreign.load(path)
    assert read.schedule.spec == "cosine"
    assert upgraded(path, out=out) == 0
    assert digest(path) == before
    new = dualout.Denoiser.from_pretrained(out)
    closed = {"epsilon": "eps", "sample": "x0", "v_prediction": "eps"}[prediction]
    assert torch.equal(first_of(new.route(closed)), first_of(read))


def test_a_part_that_a_pipeline_leaves_out_is_none(unet, tmp_path) -> None:
    from diffusers import DDPMPipeline

    DDPMPipeline(unet, scheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vae": [None, None], "transformer": [None, None]}))
    assert foreign.load(tmp_path).card == {}


def test_a_network_of_latents_is_not_taught_pictures(unet, tmp_path, capsys) -> None:
    from diffusers import LDMPipeline, VQModel

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    coder = VQModel(latent_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    LDMPipeline(coder, unet, scheduler()).save_pretrained(tmp_path / "p")
    assert upgraded(tmp_path / "p", out=tmp_path / "out") == 2
    assert "latents of its pipeline's vqvae, and the data 'digits" in capsys.readouterr().err
    np.save(tmp_path / "latents.npy", np.random.default_rng(0).normal(size=(160, 1, 8, 8)).astype("float32"))
    latents = f"arrays:{tmp_path / 'latents.npy'}:latents=true"
    assert upgraded(tmp_path / "p", "--data", latents, "--held_out", 32, out=tmp_path / "out") == 0


def downloads(there: Path, here: Path):
    """The Hub, which has one pipeline."""

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "some/pipeline"
        for file in (f for f in there.rglob("*") if f.is_file()):
            where = file.relative_to(there)
            if any(fnmatch(str(where), pattern) for pattern in allow_patterns):
                (here / where).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, here / where)
        return str(here)

    return download


def test_of_a_pipeline_on_the_hub_the_network_alone_is_downloaded(unet, tmp_path, monkeypatch) -> None:
    from diffusers import LDMPipeline, VQModel

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    coder = VQModel(latent_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    LDMPipeline(coder, unet, scheduler()).save_pretrained(tmp_path / "there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", downloads(tmp_path / "there", tmp_path / "here"))
    read = foreign.load("some/pipeline")
    assert torch.equal(read.network.conv_out.weight, unet.conv_out.weight)
    assert read.card == {"latents of": "vqvae", "decoded by": "some/pipeline"}
    assert [file.parent.name for file in (tmp_path / "here").rglob("*.safetensors")] == ["unet"]


@pytest.mark.parametrize(
    ("part", "says", "told"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "LCMScheduler samples networks that were"),
        ("scheduler/scheduler_config.json", {"prediction_type": "odd"}, "unknown prediction_type"),
        ("scheduler/scheduler_config.json", {"variance_type": "learned"}, "variance_type 'learned'"),
        ("unet/config.json", {"_class_name": "Popen"}, "'diffusers.Popen' is not on the allow-list"),
        ("unet/config.json", {}, "does not say what it was trained on: give --data"),
    ],
)
def test_configurations_are_judged_before_weights_are_downloaded(
    part, says, told, tmp_path, monkeypatch, capsys
) -> None:
    from diffusers import DDPMPipeline

    there, here = tmp_path / "there", tmp_path / "here"
    DDPMPipeline(build("tiny:width=8", 1, 8, 2), scheduler()).save_pretrained(there)
    (there / part).write_text(json.dumps(json.loads((there / part).read_text()) | says))
    monkeypatch.setattr("huggingface_hub.snapshot_download", downloads(there, here))
    assert main(["upgrade", "some/pipeline", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert (here / part).is_file()
    assert not list(here.rglob("*.safetensors"))


def test_a_pipeline_with_all_of_it_in_one_directory(unet, tmp_path, monkeypatch) -> None:
    # as google/ddpm-cifar10-32 has it, at first with a scheduler of the class that came before DDPMScheduler
    there = tmp_path / "there"
    there.mkdir()
    unet.save_pretrained(there)
    (there / "model_index.json").write_text(
        '{"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", '
        '"UNet2DModel"]}'
    )
    (there / "scheduler_config.json").write_text(
        '{"_class_name": "GaussianDDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", '
        '"timesteps": 1000, "variance_type": "fixed_large"}'
    )
    read = foreign.load(there)
    assert torch.equal(read.network.conv_out.weight, unet.conv_out.weight)
    assert (read.parameterization.spec, read.schedule.spec) == ("eps", "linear")
    monkeypatch.setattr("huggingface_hub.snapshot_download", downloads(there, tmp_path / "here"))
    read = foreign.load("some/pipeline")
    assert torch.equal(read.network.conv_out.weight, unet.conv_out.weight)
    (there / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json is missing \(it holds diffusion"):
        foreign.load(there)


def test_a_pipeline_without_safetensors(unet, tmp_path, monkeypatch, caplog) -> None:
    from diffusers import DDPMPipeline
    from diffusers.utils import logging

    DDPMPipeline(unet, scheduler()).save_pretrained(tmp_path / "there", safe_serialization=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", downloads(tmp_path / "there", tmp_path / "here"))
    with pytest.raises(InputError, match=r"some/pipeline has no weights in safetensors.*hf download some/pipeline"):
        foreign.load("some/pipeline")
    monkeypatch.setattr(logging.get_logger("diffusers"), "propagate", True)
    assert torch.equal(foreign.load(tmp_path / "there").network.conv_out.weight, unet.conv_out.weight)
    assert not caplog.records


@pytest.mark.parametrize("place", ["", "unet"])
@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_of_several_variants_on_the_hub_one_is_downloaded(unet, tmp_path, monkeypatch, size, place) -> None:
    there, here = tmp_path / "there", tmp_path / "here"

    def put(name: str, **how: Any) -> None:
        # on its own first: diffusers removes what it takes for shards of before
        unet.save_pretrained(tmp_path / name, max_shard_size=size, **how)
        shutil.copytree(tmp_path / name, there / place, dirs_exist_ok=True)

    def got() -> str:
        assert torch.equal(foreign.load("some/pipeline").network.conv_out.weight, unet.conv_out.weight)
        return " ".join(file.name for file in here.rglob("*.*") if file.suffix != ".json")

    put("pickled", safe_serialization=False)
    for variant in ("fp16", "non_ema"):
        put(variant, variant=variant)
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (there / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"} | parts))
    scheduler().save_config(there / "scheduler" if place else there)
    monkeypatch.setattr("huggingface_hub.snapshot_download", downloads(there, here))
    # a variant where there is nothing else in safetensors
    variant = got()
    assert "fp16" in variant
    assert "non_ema" not in variant
    assert ".bin" not in variant
    shutil.rmtree(here)
    put("plain")
    plain = got()
    assert "diffusion_pytorch_model" in plain
    assert not any(other in plain for other in ("fp16", "non_ema", ".bin"))


@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_weights_that_are_there_as_one_variant_are_read(unet, tmp_path, size) -> None:
    unet.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size=size)
    read = foreign.load(tmp_path / "unet", parameterization="eps", schedule="linear")
    assert torch.equal(read.network.conv_out.weight, unet.conv_out.weight)
    shutil.copytree(tmp_path / "unet", tmp_path / "both")
    build(NETWORK, 1, 8, 1).save_pretrained(tmp_path / "both", variant="bf16")
    with pytest.raises(InputError, match=r"as one variant of that.*it holds diffusion_pytorch_model.bf16.safetensors"):
        foreign.load(tmp_path / "both", parameterization="eps", schedule="linear")
    unet.save_pretrained(tmp_path / "both")
    read = foreign.load(tmp_path / "both", parameterization="eps", schedule="linear")
    assert torch.equal(read.network.conv_out.weight, unet.conv_out.weight)


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"])
def test_weights_of_another_name_are_told(unet, tmp_path, name) -> None:
    unet.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / name)
    with pytest.raises(InputError, match=f"as diffusion_pytorch_model.safetensors, .* it holds {name}"):
        foreign.load(tmp_path, parameterization="eps", schedule="linear")


def dit():
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip


def told_text():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=8, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "says"), [(dit, "classes by its norms (num_embeds_ada_norm)"), (told_text, "text (cross_attention_dim)")]
)
def test_a_network_that_is_told_more_than_commands_tell(make, says, tmp_path, capsys) -> None:
    make().save_pretrained(tmp_path / "model")
    how = ("--parameterization", "eps", "--schedule", "linear")
    assert upgraded(tmp_path / "model", *how, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert says in " ".join(error.split())
    assert "In Python any condition is passed on" in " ".join(error.split())


def test_a_pipeline_with_a_learned_variance(tmp_path) -> None:
    from diffusers import DDPMPipeline

    network = build(NETWORK, 1, 8, 2)
    DDPMPipeline(network, scheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "p")
    assert foreign.load(tmp_path / "p").parameterization == LearnedVariance(Velocity())
    # and of the model alone, which is told what it predicts
    for told in ("velocity", "learned:base=velocity"):
        assert foreign.load(tmp_path / "p" / "unet", None, told, "linear").parameterization.spec == (
            "learned:base=velocity"
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prediction_type": "flow"}, "unknown prediction_type of the scheduler 'flow'"),
        ({"beta_schedule": "zigzag"}, "unknown beta_schedule of the scheduler 'zigzag'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_a_scheduler_that_is_not_known(unet, tmp_path, capsys, changes, says) -> None:
    from diffusers import DDPMPipeline

    path = tmp_path / "pipeline"
    DDPMPipeline(unet, scheduler()).save_pretrained(path)
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert upgraded(path, out=tmp_path / "out") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, "no beta_schedule.*Flow.*RectifiedFlow"),
        ("FlowMatchHeunDiscreteScheduler", {}, "no beta_schedule"),
        ("EDMEulerScheduler", {}, "no beta_schedule.*Karras.*EDM"),
        ("ScoreSdeVeScheduler", {}, "no beta_schedule"),
        ("CMStochasticIterativeScheduler", {}, "no beta_schedule"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "continuous"),
        ("CogVideoXDDIMScheduler", {}, "snr_shift_scale"),
    ],
)
def test_a_scheduler_that_counts_no_betas_is_not_taken_for_one_that_does(name, options, says) -> None:
    import diffusers

    config = dict(getattr(diffusers, name)(**options).config) | {"_class_name": name}
    with pytest.raises(InputError, match=f"{name}.*{says}"):
        foreign.trained_by(config)


def test_what_a_scheduler_does_not_say_is_as_in_its_class() -> None:
    _, schedule = foreign.trained_by({"_class_name": "HeunDiscreteScheduler", "beta_schedule": "linear"})
    assert schedule.spec == "linear:beta_start=0.00085:beta_end=0.012"
    parameterization, schedule = foreign.trained_by({"_class_name": "DDPMScheduler"})
    assert (parameterization.spec, schedule.spec) == ("eps", "linear")
    assert foreign.trained_by({"_class_name": "UnCLIPScheduler"})[1].spec == "cosine"


def test_a_model_without_its_scheduler_must_be_told_how_it_was_trained(unet, tmp_path, capsys) -> None:
    unet.save_pretrained(tmp_path / "unet")
    assert upgraded(tmp_path / "unet", out=tmp_path / "out") == 2
    assert "say --parameterization eps (or x0, velocity) and --schedule" in capsys.readouterr().err
    read = foreign.load(tmp_path / "unet", parameterization="v", schedule="cosine")
    assert (read.parameterization.spec, read.schedule.spec) == ("velocity", "cosine")


def test_a_table_of_times_that_is_shorter_than_the_schedule_is_refused(tmp_path, capsys) -> None:
    from diffusers import UNet2DModel

    network = build(NETWORK, 1, 8, 1)
    learned = UNet2DModel.from_config(network.config, time_embedding_type="learned", num_train_timesteps=50)
    learned.save_pretrained(tmp_path / "model")
    how = ("--parameterization", "eps", "--schedule")
    assert upgraded(tmp_path / "model", *how, "linear", out=tmp_path / "out") == 2
    assert "cannot be called as (x_t, t)" in capsys.readouterr().err
    assert upgraded(tmp_path / "model", *how, "cosine:steps=50", out=tmp_path / "out") == 0
    dualout.Denoiser(learned, Epsilon(), dualout.schedules.Cosine(60)).save_pretrained(tmp_path / "longer")
    assert main(["sample", str(tmp_path / "longer"), "--images", "1", "--out", str(tmp_path / "images")]) == 2
    assert "cannot look at images of (1, 8, 8)" in capsys.readouterr().err
