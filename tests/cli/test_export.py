"""dualout export, as a user would run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import dualout
from dualout import Denoiser, Dual, samplers
from dualout.calibrated import Calibrated, Calibration
from dualout.cli.main import main
from dualout.export import DualOutputPipeline, OnnxDenoiser
from dualout.schedules import Linear

CLOSE = {"rtol": 5e-5, "atol": 5e-5}
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a calibration, as train and calibrate leave them."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=3, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), attention_head_dim=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("runs") / "digits"
    denoiser = Denoiser(network, Dual(), Linear()).eval()
    data = "folder:path=/disk/ann/digits"
    denoiser.card = {"title": "Digits", "training": {"data": data, "images": 1797}}
    denoiser.save_pretrained(path, image={"channels": 1, "size": [8, 8]}, data={"name": data})
    values = {"x0_scale": [1.2, 1.1, 0.9, 1.0, 1.05], "eps_scale": [1.0, 1.1, 1.2, 0.9, 1.0]}
    Calibration(samplers.DDIM(5).config(), [999, 799, 599, 399, 199], values, {"data": {"name": data}}).save(path)
    return path


def start() -> torch.Tensor:
    return dualout.noise(range(3), SHAPE)


def sampled(directory: Path, **options: Any) -> torch.Tensor:
    pipeline = DualOutputPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**{"latents": start(), "num_inference_steps": 5, "output_type": "latent", **options}).images


@pytest.mark.parametrize("spec", ["ddim", "dpmsolver", "unipc:order=3"])
def test_a_pipeline(run: Path, tmp_path: Path, spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "it"), "--sampler", spec]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'it'}" in printed
    sampler = samplers.Sampler.parse(spec, steps=5)
    expected = sampler.sample(Denoiser.from_pretrained(run), start())
    torch.testing.assert_close(sampled(tmp_path / "it"), expected, **CLOSE)
    results = json.loads((tmp_path / "it" / "results.json").read_text())
    assert results["format"] == "diffusers"
    assert results["difference"]["x0"] <= results["tolerance"]
    assert results["model"]["name"] == "digits"
    card = (tmp_path / "it" / "README.md").read_text()
    assert "# Digits" in card
    assert "| images | 1797 |" in card


def test_a_calibrated_pipeline_and_one_route_after_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(run), "--out", str(tmp_path), "--steps", "5"]
    assert main([*arguments, "--calibrated"]) == 0
    denoiser = Denoiser.from_pretrained(run)
    calibration = Calibration.load(run, samplers.DDIM(5).config())
    expected = samplers.DDIM(5).sample(Calibrated.of(denoiser, calibration), start())
    torch.testing.assert_close(sampled(tmp_path, calibrated=True, num_inference_steps=None), expected, **CLOSE)
    # into the same directory again
    assert main([*arguments, "--route", "x0"]) == 0
    expected = samplers.DDIM(5).sample(denoiser.route("x0"), start())
    torch.testing.assert_close(sampled(tmp_path), expected, **CLOSE)
    assert json.loads((tmp_path / "results.json").read_text())["route"] == "x0"
    # but not in another format
    assert main([*arguments, "--format", "onnx"]) == 2
    assert "holds an export to diffusers" in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()
    assert main(["sample", str(tmp_path)]) == 2
    assert "dualout export --format dualout makes a checkpoint of it again" in capsys.readouterr().err


def test_onnx(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "--format", "onnx", "--steps", "5", "--calibrated"]) == 0
    out = tmp_path / "digits-onnx"
    printed = capsys.readouterr().out
    assert "wrote digits-onnx/model.onnx  (ONNX Runtime agrees with torch: x0 " in printed
    assert {p.name for p in out.iterdir()} == {"model.onnx", "README.md", "results.json"}
    denoiser, graph = Denoiser.from_pretrained(run), OnnxDenoiser(out)
    for sampler in (samplers.DDIM(5), samplers.DPMSolver(5), samplers.UniPC(5)):
        torch.testing.assert_close(sampler.sample(graph, start()), sampler.sample(denoiser, start()), **CLOSE)
    calibration = Calibration.load(run, samplers.DDIM(5).config())
    expected = samplers.DDIM(5).sample(Calibrated.of(denoiser, calibration), start())
    torch.testing.assert_close(samplers.DDIM(5).sample(graph.calibrated(), start()), expected, **CLOSE)
    results = json.loads((out / "results.json").read_text())
    assert results["difference"].keys() == {"x0", "eps", "ratio"}
    assert max(results["difference"].values()) <= results["tolerance"] == 1e-4
    assert 'OnnxDenoiser("digits-onnx")' in (out / "README.md").read_text()


@pytest.mark.parametrize("form", ["diffusers", "dualout"])
def test_it_can_be_uploaded_at_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    sent: dict[str, Any] = {}

    def upload(directory: Path, repo_id: str, **options: Any) -> str:
        sent.update(repo_id=repo_id, files={p.name for p in directory.iterdir()}, **options)
        return "https://hub/commit/1"

    monkeypatch.setattr("dualout.hub.upload", upload)
    arguments = ["export", str(run), "--out", str(tmp_path), "--push_to_hub", "ann/digits", "--private", "true"]
    more = ["--calibrated", "--steps", "5"] if form == "diffusers" else ["--format", "dualout"]
    assert main([*arguments, *more]) == 0
    assert sent["repo_id"] == "ann/digits"
    assert sent["private"] is True
    own = {"model_index.json", "unet", "scheduler"} if form == "diffusers" else {"config.json", "model.safetensors"}
    assert own | {"README.md"} <= sent["files"]
    # where the images lie is nobody's business
    words = [p.read_text(encoding="utf-8") for p in tmp_path.rglob("*") if p.suffix in (".json", ".md", ".py")]
    assert not any("home" in text for text in words)
    assert "folder:path=digits" in (tmp_path / "README.md").read_text()
    if form == "diffusers":
        assert 'from_pretrained("ann/digits")' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("form", ["diffusers", "dualout"])
def test_a_dry_run_tells_and_neither_writes_nor_uploads(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    monkeypatch.setattr("dualout.hub.upload", lambda *_, **__: pytest.fail("it was uploaded"))
    command = ["export", str(run), "--format", form, "--out", str(tmp_path / "it"), "--push_to_hub", "ann/digits"]
    for token, told in ((None, "there is none: hf auth login"), ("secret", "there is one\n")):
        monkeypatch.setattr("huggingface_hub.get_token", lambda token=token: token)
        assert main([*command, "--private", "true", "--dry_run"]) == 0
        said = capsys.readouterr().out
        assert f"# writes     {form} to {tmp_path / 'it'}\n" in said
        assert "# uploads    all of that to ann/digits (private, if it is new), in one commit\n" in said
        assert f"# login      {told}" in said
        assert "secret" not in said
    assert main(["export", str(run), "--sampler", "heun", "--dry_run"]) == 2
    assert "has no counterpart among diffusers' schedulers" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "tensorrt"], "unknown format 'tensorrt'. Known: diffusers, dualout, onnx"),
        (["--format", "onx"], "did you mean 'onnx'"),
        (["--sampler", "heun"], "has no counterpart among diffusers' schedulers"),
        (["--spacing", "quadratic"], "have the spacings leading, trailing, linspace"),
        (["--route", "esp"], "unknown route 'esp'; did you mean 'eps'"),
        (["--calibrated"], "has no calibration for ddim-20-trailing (it has: ddim-5-trailing)"),
        (["--push_to_hub", "a/b/c"], "is named NAME/REPOSITORY"),
        (["--formt", "onnx"], "did you mean '--format'"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    run: Path, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "it"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "it").exists()


def test_a_directory_of_something_else_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert main(["export", str(run), "--out", str(tmp_path)]) == 2
    assert "holds something else (thesis.tex)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert "no checkpoint directory" in capsys.readouterr().err


def test_a_pipeline_that_is_not_the_model_is_not_left_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run), "--out", str(tmp_path / "it")]
    assert main([*command, "--tolerance", "-1"]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert list((tmp_path / "it").iterdir()) == []
    assert main(command) == 0


def test_a_pipeline_becomes_a_checkpoint_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "it")]) == 0
    assert main(["upgrade", str(tmp_path / "it"), "--data", "digits", "--out", str(tmp_path / "up")]) == 2
    assert "was exported by dualout: dualout export --format dualout" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "it"), "--format", "dualout", "--out", str(tmp_path / "back")]) == 0
    sampler = samplers.DDIM(3)
    before, after = (sampler.sample(Denoiser.from_pretrained(p), start()) for p in (run, tmp_path / "back"))
    torch.testing.assert_close(after, before, **CLOSE)
