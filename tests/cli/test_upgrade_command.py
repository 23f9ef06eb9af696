"""dualout upgrade, as a user runs it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch

import dualout
from dualout.cli.main import main
from dualout.errors import InputError
from dualout.networks import build, foreign
from dualout.parameterizations import Epsilon, LearnedVariance, Velocity
from dualout.samplers import DDIM
from dualout.training import opening, readout
from dualout.training.upgrade_config import UpgradeConfig
from dualout.training.upgrade_run import Upgrade

NETWORK = "tiny:width=8"
FEW = [
    "--data", "digits", "--bins", "4", "--held_out", "32", "--images", "128", "--batch_size", "8",
    "--precision", "fp32", "--device", "cpu",
]  # fmt: skip


def upgraded(source, *arguments, out) -> int:
    return main(["upgrade", str(source), *FEW, "--out", str(out), *map(str, arguments)])


def digest(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "lock"]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An eps model of a few steps, which errs enough at high noise to be helped."""
    path = tmp_path_factory.mktemp("source") / "run"
    small = [
        "--network", NETWORK, "--batch_size", "16", "--precision", "fp32", "--sample_every", "0", "--device", "cpu",
    ]  # fmt: skip
    assert main(["train", *small, "--parameterization", "eps", "--steps", "20", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def closed(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("closed") / "run"
    assert upgraded(source, out=path) == 0
    return path


def first(path: Path, **options) -> torch.Tensor:
    return DDIM(steps=5, **options).sample(dualout.Denoiser.from_pretrained(path), dualout.noise(range(4), (1, 8, 8)))


def test_the_closed_form_leaves_a_better_checkpoint_and_the_source_alone(source, closed, tmp_path, capsys) -> None:
    before = digest(source)
    out = tmp_path / "again"
    assert upgraded(source, out=out) == 0
    said = capsys.readouterr()
    assert digest(source) == before
    assert "closed form" in said.err
    assert f"wrote {out}" in said.out
    assert "ratio" in said.out
    record = json.loads((out / "upgrade.json").read_text())
    assert [c["stage"] for c in record["checks"]] == ["original", "closed form"]
    assert record["checks"][1]["kept"]
    assert record["checks"][1]["score"] < 0
    for row in record["table"]:
        assert row["after"] <= row["before"]
        assert row["open"] == (row["ratio"] > 0)
    # the same command makes the same weights
    assert (out / "model.safetensors").read_bytes() == (closed / "model.safetensors").read_bytes()
    old, new = (dualout.Denoiser.from_pretrained(p) for p in (source, out))
    assert new.parameterization.spec == "upgraded:ratio=pixel"
    x, t = dualout.noise(range(4), (1, 8, 8)), torch.tensor([1, 300, 600, 999])
    assert torch.equal(new(x, t).parts["eps"], old(x, t).parts["eps"])
    assert torch.equal(first_of(new.route("eps")), first(source))


def first_of(denoiser) -> torch.Tensor:
    return DDIM(steps=5).sample(denoiser, dualout.noise(range(4), (1, 8, 8)))


def test_other_commands_take_it(closed, tmp_path, capsys) -> None:
    assert main(["sample", str(closed), "--images", "4", "--steps", "3", "--out", str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images").glob("0*.png"))) == 4
    assert main(["info", str(closed)]) == 0
    init = ["--init", str(closed), "--steps", "1", "--batch_size", "4", "--sample_every", "0", "--precision", "fp32"]
    assert main(["train", *init, "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert {"loss/eps", "loss/x0", "loss/mu"} <= metrics.keys()


def test_an_upgrade_that_is_finished_is_not_made_again(source, closed, capsys) -> None:
    before = digest(closed)
    assert upgraded(source, out=closed) == 0
    assert "has all of it" in capsys.readouterr().err
    assert digest(closed) == before
    assert upgraded(source, "--seed", 1, out=closed) == 2
    assert "other settings: seed 0 → 1" in capsys.readouterr().err


def test_only_the_new_rows_are_trained_and_a_longer_one_goes_on(source, tmp_path, capsys) -> None:
    out = tmp_path / "rows"
    rows = ["--scope", "rows", "--check_every", 2]
    assert upgraded(source, *rows, "--steps", 2, out=out) == 0
    assert upgraded(source, *rows, "--steps", 4, out=out) == 0
    checks = json.loads((out / "upgrade.json").read_text())["checks"]
    assert [(c["stage"], c["step"]) for c in checks] == [
        ("original", 0), ("closed form", 0), ("fine-tuned", 2), ("fine-tuned", 4)
    ]  # fmt: skip
    straight = tmp_path / "straight"
    assert upgraded(source, *rows, "--steps", 4, out=straight) == 0
    old = dualout.Denoiser.from_pretrained(source)
    one, other = (dualout.Denoiser.from_pretrained(p / "training") for p in (out, straight))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
        before = old.state_dict()[name]
        if not name.startswith("network.conv_out"):
            assert torch.equal(value, before), name
        else:
            assert torch.equal(value[:1], before)
    fitted = dualout.Denoiser.from_pretrained(out)
    assert fitted.parameterization.spec.startswith("upgraded")
    # what is in the directory is never worse than the original
    table = json.loads((out / "upgrade.json").read_text())["table"]
    assert all(row["after"] <= row["before"] for row in table)


def test_images_that_have_moved_are_known_again(source, tmp_path, capsys) -> None:
    images, out = np.random.default_rng(0).integers(0, 255, (80, 8, 8), dtype=np.uint8), tmp_path / "out"
    for name, content in (("here", images), ("there", images), ("other", images[::-1])):
        np.save(tmp_path / f"{name}.npy", content)

    def rows(name: str, steps: int) -> int:
        data = f"arrays:{tmp_path / name}.npy"
        return upgraded(source, "--scope", "rows", "--check_every", 2, "--steps", steps, "--data", data, out=out)

    assert rows("here", 2) == 0
    assert rows("other", 4) == 2
    assert "other.npy, fingerprint" in capsys.readouterr().err
    assert rows("there", 4) == 0
    record = json.loads((out / "upgrade.json").read_text())
    assert [c["step"] for c in record["checks"]] == [0, 0, 2, 4]
    assert record["config"]["data"].endswith("there.npy")
    # an earlier version did not say which images they were
    del record["data"]
    (out / "upgrade.json").write_text(json.dumps(record))
    assert rows("here", 4) == 2
    assert "other settings: data arrays:" in capsys.readouterr().err


def test_what_a_killed_upgrade_was_writing_is_removed_and_two_at_once_are_refused(source, tmp_path) -> None:
    torn = tmp_path / "out" / ".model.safetensors.a1b2c3_4.tmp"
    torn.parent.mkdir()
    torn.write_bytes(b"half")
    config = UpgradeConfig(
        source=str(source), data="digits", out=str(torn.parent), bins=2, held_out=16, images=64, device="cpu"
    )
    with Upgrade(config) as first, Upgrade(config) as second:
        checks = iter(first)
        assert next(checks).stage == "original"
        assert not torn.exists()
        with pytest.raises(InputError, match="another process is upgrading in --out"):
            next(iter(second))
        assert [check.stage for check in checks] == ["closed form"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_least_squares_and_the_same_command_makes_them(
    source, tmp_path, capsys, monkeypatch, number, code
) -> None:
    def sending(*arguments, **options):
        os.kill(os.getpid(), number)
        return collect(*arguments, **options)

    collect = readout.collect
    with monkeypatch.context() as patched:
        patched.setattr(readout, "collect", sending)
        assert upgraded(source, out=tmp_path / "out") == code
    assert "stopped: the same command begins this stage again" in capsys.readouterr().err
    assert upgraded(source, out=tmp_path / "out") == 0
    stages = [check["stage"] for check in json.loads((tmp_path / "out" / "upgrade.json").read_text())["checks"]]
    assert stages == ["original", "closed form"]


@pytest.mark.parametrize("scope", ["last", "all"])
def test_what_is_worse_is_not_kept(source, tmp_path, scope) -> None:
    out = tmp_path / "run"
    # a learning rate that ruins everything
    assert upgraded(source, "--scope", scope, "--steps", 3, "--lr", 9, "--warmup", 0, "--start", "zero", out=out) == 0
    checks = json.loads((out / "upgrade.json").read_text())["checks"]
    assert [c["kept"] for c in checks] == [True, False]
    assert checks[1]["worse"]
    assert torch.equal(first(out), first(source))
    assert dualout.Denoiser.from_pretrained(out).parameterization.spec == "upgraded"


def measured(*errors):
    """Errors of one look after the other, in the first part of t and in the others; the new route is no help."""
    looks = iter(errors)

    def measure(denoiser, batches, bins):
        first, others = next(looks)
        eps = torch.tensor([first] + [others] * (bins - 1), dtype=torch.float64)[:, None].repeat(1, 16)
        return opening.Errors(eps, torch.zeros_like(eps), torch.ones_like(eps))

    return measure


@pytest.mark.parametrize(("tolerance", "kept"), [(0, [True, False]), (0.02, [True, True])])
def test_a_little_more_error_at_one_noise_level_is_tolerated_for_less_on_the_whole(
    source, tmp_path, monkeypatch, tolerance, kept
) -> None:
    # after the original, a hundredth more in the first part of t, half in the others
    monkeypatch.setattr(opening, "measure", measured((1, 1), (1.01, 0.5)))
    out = tmp_path / "run"
    told = ["--scope", "all", "--steps", 2, "--start", "zero", "--tolerance", tolerance]
    assert upgraded(source, *told, out=out) == 0
    checks = json.loads((out / "upgrade.json").read_text())["checks"]
    assert [c["kept"] for c in checks] == kept
    assert checks[-1]["worse"] == ([] if tolerance else [0])


def test_refused_weights_leave_what_was_best_before_and_are_told_of(source, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(opening, "measure", measured((1, 1), (1, 0.9), (1, 0.8), (1.1, 0.5)))
    out = tmp_path / "run"
    assert upgraded(source, "--scope", "all", "--steps", 4, "--check_every", 2, out=out) == 0
    checks = json.loads((out / "upgrade.json").read_text())["checks"]
    assert [c["kept"] for c in checks] == [True, True, True, False]
    assert "err more at some t than --tolerance allows: the best before them were written" in capsys.readouterr().err
    card = json.loads((out / "config.json").read_text())["card"]["training"]
    assert (card["stage"], card["step"]) == ("fine-tuned", 2)


# sources


def scheduler(**options):
    from diffusers import DDPMScheduler

    return DDPMScheduler(**options)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return build(NETWORK, 1, 8, 1).eval()


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


def test_weights_that_do_not_fit_are_listed(unet, tmp_path, capsys) -> None:
    from safetensors.torch import load_file, save_file

    unet.save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_extra.weight"] = tensors.pop("conv_in.weight")
    save_file(tensors, file)
    told = ["--parameterization", "eps", "--schedule", "linear"]
    assert upgraded(tmp_path / "unet", *told, out=tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "missing keys: conv_in.weight" in said
    assert "unexpected keys: conv_extra.weight" in said


@pytest.mark.parametrize("before", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_that_were_saved_out_of_a_wrapping(unet, tmp_path, before) -> None:
    torch.save({f"{before}{k}": v for k, v in unet.state_dict().items()}, tmp_path / "weights.pt")
    read = foreign.load(tmp_path / "weights.pt", f"plain:network=({NETWORK}):size=8")
    assert torch.equal(read.network.conv_out.weight, unet.conv_out.weight)


@pytest.mark.parametrize("wrapped", [None, "state_dict", "ema"])
def test_a_file_of_weights(unet, tmp_path, wrapped) -> None:
    state = {f"module.{k}": v for k, v in unet.state_dict().items()}
    file = tmp_path / "weights.pt"
    torch.save(state if wrapped is None else {wrapped: state, "step": 7}, file)
    before = digest(file)
    out = tmp_path / "out"
    assert upgraded(file, "--adapter", f"plain:network=({NETWORK}):size=8", out=out) == 0
    assert digest(file) == before
    read = dualout.Denoiser(unet, Epsilon(), dualout.schedules.Linear())
    assert torch.equal(first_of(dualout.Denoiser.from_pretrained(out).route("eps")), first_of(read))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_files_that_cannot_be_used(unet, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(unet.state_dict(), "good.pt")
    torch.save({"net": unet.state_dict(), "trap": Trap()}, "trap.pt")
    Path("torn.pt").write_bytes(Path("good.pt").read_bytes()[:3000])
    Path("notes.txt").write_text("x")
    torch.save([1, 2], "list.pt")
    torch.save({"step": 3}, "empty.pt")
    plain = ["--adapter", f"plain:network=({NETWORK}):size=8"]
    cases = [
        ("good.pt", [], "say which with --adapter; there are plain, starter-cnn, mnist-ddpm"),
        ("good.pt", ["--adapter", "plane:size=8"], "did you mean 'plain'?"),
        ("good.pt", ["--adapter", "plain:network=(tiny:width=16):size=8"], "of another shape: "),
        ("good.pt", ["--adapter", "starter-cnn"], "has no table 'alpha_t'"),
        ("good.pt", ["--adapter", "mnist-ddpm"], "has no table 'time_embed.weight'"),
        ("good.pt", [*plain, "--schedule", "cosine"], "leave out --schedule cosine"),
        ("good.pt", [*plain, "--data", "photos"], "images of 1 channels"),
        ("trap.pt", plain, "needs code to be run"),
        ("torn.pt", plain, "is damaged"),
        ("notes.txt", plain, "is no file of weights"),
        ("list.pt", plain, "holds a list, not weights by name"),
        ("empty.pt", plain, "it holds step; say which by entry=NAME"),
        ("nowhere/at/all", [], "there is no file or directory"),
    ]
    for file, arguments, says in cases:
        assert upgraded(file, *arguments, out="out") == 2, (file, arguments)
        assert says in capsys.readouterr().err
        assert not Path("out").exists()
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scope", "rwos"], "did you mean 'rows'?"),
        (["--start", "zero"], "leaves nothing to do"),
        (["--adapter", "plain"], "--adapter is for files of weights"),
        (["--schedule", "cosine"], "leave out --schedule cosine"),
        (["--held_out", "2"], "--held_out is 16 or more"),
        (["--tolerance", "1"], "--tolerance is a share from 0 to below 1, such as 0.01; got 1"),
        (["--bins", "2000"], "more than the 1000 noise levels"),
        (["--layer", "conv_uot"], "no convolution and no linear layer|has no convolution or linear layer"),
        (["--data", "digits:size=12"], "makes images of 8×8, the data are 12×12; --size 8 makes them fit"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(source, tmp_path, capsys, arguments, says) -> None:
    import re

    assert upgraded(source, *arguments, out=tmp_path / "out") == 2
    assert re.search(re.escape(says).replace(r"\|", "|"), capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_directory_of_something_else_and_a_dual_model_are_refused(source, closed, tmp_path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert upgraded(source, out=tmp_path) == 2
    assert "holds something else (thesis.tex)" in capsys.readouterr().err
    assert upgraded(closed, out=tmp_path / "out") == 2
    assert "two outputs already" in capsys.readouterr().err


def test_few_images_are_refused(source, tmp_path, capsys) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((40, 8, 8), np.uint8))
    assert upgraded(source, "--data", f"arrays:{tmp_path / 'x.npz'}", out=tmp_path / "out") == 2
    assert "needs 64 images or more" in capsys.readouterr().err


# weights of third parties


def test_the_layouts_of_third_parties_are_found_from_their_weights(tmp_path) -> None:
    from dualout.networks.outside import StarterCNN, TimeUNet

    betas = torch.linspace(1e-4, 0.02, 11)
    starter = StarterCNN(1, (8, 8), (4, 6), kernel=5, frequencies=3)
    state = {f"gt.{k}": v for k, v in starter.state_dict().items()}
    torch.save(state | {"beta_t": betas, "alpha_t": (1 - betas).cumprod(0)}, tmp_path / "a.pth")
    read = foreign.load(tmp_path / "a.pth", "starter-cnn")
    # their own words: z = sqrt(ᾱ)·x + sqrt(1 − ᾱ)·eps for x in [−0.5, 0.5], and time t / T, t counted from 1
    x0, eps = torch.rand(2, 1, 8, 8) * 2 - 1, torch.randn(2, 1, 8, 8)
    signal = (1 - betas).cumprod(0)[4]
    z = signal.sqrt() * x0 / 2 + (1 - signal).sqrt() * eps
    level = read.schedule.scalars(3)
    p = read(level.alpha * x0 + level.sigma * eps, 3)
    torch.testing.assert_close(p.parts["eps"], starter(z, torch.full((2,), 0.4)), rtol=1e-4, atol=1e-5)
    torch.save({f"network.{k}": v for k, v in TimeUNet(50).state_dict().items()}, tmp_path / "b.pt")
    other = foreign.load(tmp_path / "b.pt", "mnist-ddpm")
    assert other.schedule.steps == 50
    assert other(torch.zeros(2, 1, 28, 28), 3).x0.shape == (2, 1, 28, 28)
    other.save_pretrained(tmp_path / "saved")
    again = dualout.Denoiser.from_pretrained(tmp_path / "saved")
    x = torch.randn(1, 1, 28, 28)
    assert torch.equal(again(x, 3).x0, other(x, 3).x0)


def test_a_file_of_somebody_elses_becomes_a_checkpoint_that_commands_read(tmp_path, capsys) -> None:
    from dualout.networks.outside import StarterCNN

    betas = torch.linspace(1e-4, 0.02, 11)
    starter = StarterCNN(1, (8, 6), (4, 6), kernel=5, frequencies=3)
    state = {f"gt.{k}": v for k, v in starter.state_dict().items()}
    torch.save(state | {"beta_t": betas, "alpha_t": (1 - betas).cumprod(0)}, tmp_path / "a.pth")
    out = tmp_path / "original"
    command = ["export", str(tmp_path / "a.pth"), "--format", "dualout", "--out", str(out)]
    assert main([*command, "--adapter", "starter-cnn"]) == 0
    assert json.loads((out / "results.json").read_text())["model"]["image"] == [1, 8, 6]
    x, t = dualout.noise(range(2), (1, 8, 6)), 4
    read = foreign.load(tmp_path / "a.pth", "starter-cnn")
    assert torch.equal(dualout.Denoiser.from_pretrained(out)(x, t).x0, read(x, t).x0)
    assert main(["sample", str(out), "--images", "2", "--steps", "2", "--out", str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images").glob("0*.png"))) == 2
    capsys.readouterr()
    assert main(command) == 2
    assert "say which with --adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--adapter", "plain"], "--adapter is for --format dualout"),
        (["--format", "onnx", "--schedule", "linear"], "--schedule is for --format dualout"),
        (["--format", "dualout", "--route", "eps"], "leave out --route and --calibrated"),
        (["--format", "dualout", "--adapter", "plain"], "is no file"),
    ],
)
def test_what_is_told_of_a_source_is_told_where_it_is_read(source, tmp_path, arguments, says, capsys) -> None:
    assert main(["export", str(source), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_learns_from_what_the_source_was_trained_on(source, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    config["data"]["name"] = f"arrays:path={tmp_path / 'mine.npy'}"
    (other / "config.json").write_text(json.dumps(config))
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8))
    with Upgrade(UpgradeConfig(source=str(other), out=str(tmp_path / "out"), device="cpu")) as work:
        assert (work.config.data, len(work.dataset)) == (config["data"]["name"], 80)
    with Upgrade(UpgradeConfig(source=str(other), data="digits", out=str(tmp_path / "out"), device="cpu")) as work:
        assert work.dataset.name == "digits"
    del config["data"]
    (other / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(InputError, match="does not say what it was trained on: give --data"),
        Upgrade(UpgradeConfig(source=str(other), out=str(tmp_path / "out"), device="cpu")),
    ):
        pass


def test_a_dry_run_tells_and_writes_nothing(source, tmp_path, capsys) -> None:
    assert upgraded(source, "--scope", "last", "--steps", 30, "--dry_run", out=tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "scope: last" in told
    assert "# work       128 images in the least squares, 30 steps of 8, 32 images held out" in told
    assert not (tmp_path / "out").exists()


def test_one_that_is_killed_while_its_first_checkpoint_is_written_goes_on(source, tmp_path, monkeypatch) -> None:
    from dualout.training.upgrade_run import Upgrade

    def killed(*_: object) -> None:
        (tmp_path / "out" / ".model.safetensors.a1b2c3_4.tmp").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Upgrade, "_write", killed)
        assert upgraded(source, out=tmp_path / "out") == 130
    assert upgraded(source, out=tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
