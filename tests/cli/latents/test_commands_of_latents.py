"""The other commands with models of latents: what decodes is told once, and remembered."""

import json
import shutil

import numpy as np
import pytest
import torch

import dualout
from dualout.cli.main import main
from dualout.data import to_uint8
from dualout.errors import InputError
from dualout.networks import foreign
from latents import SHAPE, near, pictures, sample


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Latents that are far from the range of images, as a source of data."""
    path = tmp_path_factory.mktemp("real") / "latents.npy"
    spread = torch.tensor([3.0, 0.5]).reshape(1, 2, 1, 1)
    np.save(path, (4 + spread * dualout.noise(range(100), SHAPE)).numpy())
    return f"arrays:{path}:layout=nchw:latents=true:holdout=0.2"


def test_latents_are_calibrated(run, real, tmp_path, capsys):
    own = shutil.copytree(run, tmp_path / "run")
    command = ["calibrate", str(own), "--steps", "2", "--iterations", "2", "--batch_size", "16", "--device", "cpu"]
    assert main([*command, "--data", "digits:size=4"]) == 2
    assert main([*command, "--data", real.replace("latents=true", "values=[0+255]")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "makes images of 2 channels and 4×4 pixels" in told
    assert "the model makes latents, and arrays:" in told
    assert main([*command, "--data", real]) == 0
    assert "(RMS of a number)" in " ".join(capsys.readouterr().err.split())
    sampler = dualout.samplers.DDIM(steps=2, clip=None)
    calibration = dualout.Calibration.load(own, sampler.config())
    assert any(x != 1 for x in calibration.values["x0_scale"])
    assert sample(own, tmp_path / "out", "--steps", "2", "--calibrated", "true", "--format", "npz") == 0
    found = torch.from_numpy(np.load(tmp_path / "out" / "images.npz")["images"])
    calibrated = dualout.Calibrated.of(dualout.Denoiser.from_pretrained(own), calibration)
    with torch.no_grad():
        expected = sampler.at(calibration.times).sample(calibrated, dualout.noise(range(7), SHAPE))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_latents_are_analyzed_and_their_films_decoded(run, vae, real, tmp_path):
    from diffusers import AutoencoderKL

    command = ["analyze", str(run), "--data", real, "--steps", "3", "--samples", "4", "--film", "2", "--points", "3"]
    assert main([*command, "--out", str(tmp_path / "plain")]) == 0
    assert main([*command, "--out", str(tmp_path / "decoded"), "--decode", str(vae)]) == 0
    plain, decoded = (json.loads((tmp_path / name / "analysis.json").read_text()) for name in ("plain", "decoded"))
    assert plain["routes"] == decoded["routes"]
    assert plain["trajectory"] == decoded["trajectory"]
    assert decoded["protocol"]["film"]["decoder"]["class"] == "AutoencoderKL"
    # latents have no range that they could be clipped to
    assert not any("clipped" in row for row in plain["trajectory"])
    assert not (tmp_path / "plain" / "figures" / "clipped.png").exists()
    denoiser = dualout.Denoiser.from_pretrained(run)
    with torch.no_grad():
        made = dualout.samplers.DDIM(steps=3, clip=None).sample(denoiser, dualout.noise(range(2), SHAPE))
        pictures = AutoencoderKL.from_pretrained(vae).decode(made / 0.5 + 0.2).sample
    last = {name: torch.from_numpy(np.load(tmp_path / name / "arrays.npz")["film_x_next"][-1]) for name in
            ("plain", "decoded")}  # fmt: skip
    torch.testing.assert_close(last["decoded"], pictures, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last["plain"], made / 3, rtol=1e-4, atol=1e-4)


def test_a_comparison_of_latents_scores_decoded_samples(vae, real, tmp_path, capsys, monkeypatch):
    train = {"data": real, "network": "tiny:width=8", "steps": 2, "batch_size": 8}
    grid = {"methods": {"eps": "eps", "dual": "dual"}, "train": train, "features": ["pixels"], "images": 16}
    grid |= {"samplers": ["ddim"], "spacings": ["trailing"], "steps": [2], "calibrated": [False, True]}
    grid |= {"calibration": {"iterations": 1, "batch": 8, "held_out": 16, "move_times": 0}, "choose_seeds": []}

    def compare(**more):
        (tmp_path / "grid.yaml").write_text(json.dumps(grid | more))
        return main(["compare", "--config", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")])

    decoded = {"train": train | {"decode": str(vae)}}
    for more, says in (
        ({}, "holds latents, which are no pictures"),
        (decoded, "a comparison of latents needs train: {decode: AUTOENCODER} and pictures"),
        ({"pictures": "digits"}, "a comparison of latents needs train: {decode: AUTOENCODER} and pictures"),
        (decoded | {"pictures": "digits", "features": ["lite0:layer=nowhere"]}, "lite0"),
        (decoded | {"pictures": real}, "latents are no pictures"),
        (decoded | {"pictures": "photos:grey=true:size=7"}, "are of (1, 7, 7)"),
        ({"train": train | {"data": "digits", "decode": str(vae)}, "pictures": "digits"}, "leave out decode"),
        ({"train": train | {"decode": str(tmp_path / "none")}, "pictures": "digits"}, "no autoencoder at"),
    ):
        assert compare(**more) == 2, more
        assert says in " ".join(capsys.readouterr().err.split())
        assert not list((tmp_path / "out").rglob("model.safetensors"))
    read, load = [], foreign.diffusers_model
    monkeypatch.setattr(foreign, "diffusers_model", lambda *a, **o: read.append(a) or load(*a, **o))
    assert compare(**decoded, pictures="digits") == 0
    assert len(read) == 1
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(r["method"], r["calibrated"]) for r in rows] == [
        ("eps", False), ("eps", True), ("dual", False), ("dual", True),
    ]  # fmt: skip
    for row in rows:
        assert np.isfinite(row["fd"])
        assert row["protocol"]["decoder"]["class"] == "AutoencoderKL"
        assert row["protocol"]["sampler"]["clip"] is None
        assert row["protocol"]["reference"]["data"] == "digits"


def test_what_decodes_is_told_in_training_and_remembered(real, vae, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = ["train", "--data", real, "--network", "tiny:width=8", "--steps", "2", "--batch_size", "8"]
    train += [
        "--sample_every",
        "1",
        "--samples",
        "3",
        "--sampler",
        "ddim:steps=2",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    for flags, says in (
        (["--decode", "nowhere"], "no autoencoder at 'nowhere'"),
        (["--decode", str(vae), "--data", "digits"], "are pictures, not latents: leave out --decode"),
    ):
        assert main([*train, *flags, "--out", "runs/refused"]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "runs" / "refused").exists()
    assert main([*train, "--decode", str(vae), "--out", "run"]) == 0
    grids = sorted((tmp_path / "run" / "samples").iterdir())
    assert [grid.name for grid in grids] == ["step-000001.png", "step-000002.png"]

    capsys.readouterr()
    assert main(["info", "run"]) == 0
    told = capsys.readouterr().out
    assert "2×4×4 latents" in told
    assert "decoded by" in told
    assert sample("run", "remembered") == 0
    assert sample("run", "told", "--decode", vae) == 0
    assert torch.equal(pictures(tmp_path / "remembered"), pictures(tmp_path / "told"))
    # the grid shows the images of seeds 0, 1 and 2, each pixel enlarged
    assert main(["sample", "run", "--images", "3", "--steps", "2", "--device", "cpu", "--out", "grid"]) == 0
    assert grids[-1].read_bytes() == (tmp_path / "grid" / "grid.png").read_bytes()
    assert sample("run", "latents", "--decode", "none", "--format", "npz") == 0
    assert np.load("latents/images.npz")["images"].shape == (7, *SHAPE)
    assert sample("run", "refused", "--decode", "none") == 2
    assert main(["evaluate", "run", "--images", "16", "--steps", "2", "--data", "digits", "--device", "cpu"]) == 0
    assert main(["export", "run", "--format", "diffusers", "--out", "p"]) == 0
    # one that has gone is missed by what decodes alone
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["card"]["decoded by"] = "gone"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert sample("run", "refused") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "no autoencoder at 'gone'" in told
    assert "run names it as what decodes its latents: say by --decode where it is, or --decode none" in told
    assert sample("run", "as-they-are", "--decode", "none", "--format", "npz") == 0


def test_a_run_from_the_weights_of_another_is_decoded_as_that_is(real, vae, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = ["train", "--data", real, "--steps", "1", "--batch_size", "8", "--sample_every", "1", "--samples", "3"]
    train += ["--sampler", "ddim:steps=2", "--device", "cpu", "--precision", "fp32"]
    assert main([*train, "--network", "tiny:width=8", "--decode", str(vae), "--out", "run"]) == 0

    def decoder(path):
        return json.loads((tmp_path / path / "config.json").read_text())["card"].get("decoded by")

    def grids(path):
        return sorted(grid.name for grid in (tmp_path / path / "samples").glob("*"))

    init = [*train, "--init", "run"]
    capsys.readouterr()
    assert main([*init, "--out", "on", "--dry_run"]) == 0
    assert f"decode: {vae}" in capsys.readouterr().out
    assert main([*init, "--out", "on"]) == 0
    assert decoder("on") == str(vae)
    assert grids("on") == ["step-000001.png"]
    # where the first run is gone, it goes on as it began
    (tmp_path / "run").rename("elsewhere")
    (tmp_path / "on" / "config.json").unlink()
    assert main([*init, "--out", "on", "--steps", "2"]) == 0
    assert decoder("on") == str(vae)
    assert grids("on") == ["step-000001.png", "step-000002.png"]
    # another is said, or none
    init = [*train, "--init", "elsewhere"]
    other = shutil.copytree(vae, tmp_path / "other")
    assert main([*init, "--decode", str(other), "--out", "another"]) == 0
    assert decoder("another") == str(other)
    assert main([*init, "--decode", "none", "--out", "none"]) == 0
    assert main([*init, "--steps", "2", "--out", "none"]) == 0
    assert decoder("none") is None
    assert grids("none") == []
    # and one that is gone is told
    config = json.loads((tmp_path / "elsewhere" / "config.json").read_text())
    config["card"]["decoded by"] = "gone"
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main([*init, "--out", "refused"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "no autoencoder at 'gone'" in told
    assert "elsewhere names it as what decodes its latents: say by --decode where it is, or --decode none" in told
    assert not (tmp_path / "refused").exists()


def test_the_page_shows_decoded_pictures(run, vae, tmp_path):
    from dualout.app.studio import Request, Setting, Studio

    with pytest.raises(InputError, match="makes latents, which are no pictures"):
        Studio([str(run)])
    studio = Studio([str(run)], decode=str(vae))
    *progress, made = studio.make(Request([Setting(str(run), steps=3)], images=7, filmed=2))
    assert sample(run, tmp_path / "out", "--decode", vae) == 0
    assert near(torch.from_numpy(made.images[..., 0]).int(), pictures(tmp_path / "out"))
    assert len(progress) == 3
    # the last step ends at the image that it predicts, and the film is of it
    film = to_uint8(made.frames[-1].x_next)[0, 0]
    assert near(film.int()[None], pictures(tmp_path / "out")[2:3])
    assert made.command.endswith(f"--decode {vae} --out out")


def test_a_dry_run_names_what_it_does_not_count(run, vae, tmp_path, capsys):
    told = ["--steps", "2", "--decode", str(vae), "--dry_run", "--device", "cpu", "--out", str(tmp_path / "out")]
    for command in (["sample", str(run)], ["evaluate", str(run), "--data", "digits"]):
        assert main([*command, *told]) == 0
        assert f"to 1×8×8 by {vae}, which is not counted" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()


def test_an_exported_pipeline_neither_clips_nor_calls_latents_pictures(run, tmp_path, made):
    from dualout.export import DualOutputPipeline

    assert main(["export", str(run), "--format", "diffusers", "--out", str(tmp_path / "p")]) == 0
    assert 'output_type="latent"' in (tmp_path / "p" / "README.md").read_text()
    pipeline = DualOutputPipeline.from_pretrained(tmp_path / "p")
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(latents=dualout.noise(range(7), SHAPE), num_inference_steps=3, output_type="latent").images
    torch.testing.assert_close(found, made, rtol=1e-4, atol=1e-4)
    # and so does a checkpoint that is made of it again
    assert main(["export", str(tmp_path / "p"), "--format", "dualout", "--out", str(tmp_path / "again")]) == 0
    assert sample(tmp_path / "again", tmp_path / "out", "--format", "npz") == 0
    again = np.load(tmp_path / "out" / "images.npz")["images"]
    torch.testing.assert_close(torch.from_numpy(again), made, rtol=1e-4, atol=1e-4)
