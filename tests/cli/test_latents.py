"""Models of latents on the command line: latents as they are, and pictures that an autoencoder of diffusers decodes."""

import json
import shutil
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from PIL import Image

import dualout
from dualout.cli.main import main
from dualout.data import load, to_uint8
from dualout.errors import InputError
from dualout.evaluation import Autoencoder, output
from dualout.evaluation.stores import Npz, stored
from dualout.networks import foreign
from dualout.networks.build import build

SHAPE = (2, 4, 4)
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
SMALL = {"in_channels": 1, "out_channels": 1, "block_out_channels": (4, 4), "norm_num_groups": 2, **BLOCKS}


def kl(**options):
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(**{**SMALL, "latent_channels": 2, "scaling_factor": 0.5, **options}).eval()


def tiny():
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        in_channels=3, out_channels=3, latent_channels=2, encoder_block_out_channels=(4, 4), scaling_factor=0.25,
        decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip


def vq():
    from diffusers import VQModel

    return VQModel(**{**SMALL, "latent_channels": 2, "num_vq_embeddings": 8, "scaling_factor": 0.3}).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "latent"
    denoiser = dualout.Denoiser(build("tiny:width=8", 2, 4, 5), dualout.Dual(), dualout.schedules.Linear(steps=100))
    denoiser.save_pretrained(path, image={"channels": 2, "size": [4, 4], "latents": True})
    return path


@pytest.fixture(scope="module")
def made(run):
    """The latents of images 0 to 6, by the library."""
    denoiser = dualout.Denoiser.from_pretrained(run)
    with torch.no_grad():
        return dualout.samplers.DDIM(steps=3, clip=None).sample(denoiser, dualout.noise(range(7), SHAPE))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae"
    kl(shift_factor=0.2).save_pretrained(path)
    return path


def sample(run, out, *flags):
    told = [str(run), "--images", "7", "--steps", "3", "--batch_size", "4", "--device", "cpu", "--out", str(out)]
    return main(["sample", *told, *map(str, flags)])


def pictures(out):
    return torch.from_numpy(np.stack([np.asarray(Image.open(p)) for p in sorted(out.glob("0*.png"))])).int()


def near(pictures, expected):
    """Of equal pixels, but for what rounds to either side."""
    return pictures.shape == expected.shape and int((pictures - expected.int()).abs().max()) <= 1


def protocol(out):
    return json.loads((out / "protocol.json").read_text())


def test_latents_are_written_as_they_are_and_read_as_data(run, made, tmp_path, monkeypatch):
    monkeypatch.setattr(Npz, "most", 3)
    assert sample(run, tmp_path / "out", "--format", "npz") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["images.npz", "protocol.json"]
    found = np.load(tmp_path / "out" / "images.npz")["images"]
    assert (found.dtype, found.shape) == (np.float32, (7, *SHAPE))
    torch.testing.assert_close(torch.from_numpy(found), made)
    assert float(made.abs().max()) > 1
    assert torch.equal(stored(tmp_path / "out", 2), torch.from_numpy(found[:2]))
    told = protocol(tmp_path / "out")
    assert "float32" in told["latents"]
    assert "pixels" not in told
    assert told["sampler"]["clip"] is None
    data = load(f"arrays:{tmp_path / 'out' / 'images.npz'}:latents=true")
    assert np.array_equal(data.batch(range(7)), found)
    # of two processes each makes its share
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert sample(run, tmp_path / "shared", "--format", "npz") == 0
    monkeypatch.undo()
    assert np.array_equal(np.load(tmp_path / "shared" / "images.npz")["images"], found)
    # only who asks for it has them clipped
    assert sample(run, tmp_path / "clipped", "--format", "npz", "--clip") == 0
    assert protocol(tmp_path / "clipped")["sampler"]["clip"] == [-1.0, 1.0]


def test_pictures_are_decoded_and_go_on_where_they_stopped(run, made, vae, tmp_path, monkeypatch, capsys):
    # a few at a time
    monkeypatch.setattr(output, "_AT_ONCE", 3 * 64)
    out = tmp_path / "out"
    assert sample(run, out, "--decode", vae) == 0
    with torch.no_grad():
        expected = to_uint8(kl(shift_factor=0.2).decode(made / 0.5 + 0.2).sample)[:, 0]
    assert near(pictures(out), expected)
    assert Image.open(out / "grid.png").size == (8 * (3 * 9 - 1), 8 * (3 * 9 - 1))
    told = protocol(out)
    assert told["pixels"].startswith("clipped")
    assert told["sampler"]["clip"] is None
    assert told["model"]["image"] == [2, 4, 4]
    decoded = told["decoder"]
    assert (decoded["name"], decoded["class"], decoded["scaling_factor"]) == ("vae", "AutoencoderKL", 0.5)
    assert (decoded["shift_factor"], len(decoded["sha256"])) == (0.2, 64)
    assert sample(run, tmp_path / "npz", "--decode", vae, "--format", "npz") == 0
    found = np.load(tmp_path / "npz" / "images.npz")["images"]
    assert found.dtype == np.uint8
    assert near(torch.from_numpy(found).int(), expected)
    # interrupted: what is missing is made again, with this autoencoder and no other
    whole = (out / "000005.png").read_bytes()
    (out / "000005.png").unlink()
    capsys.readouterr()
    assert sample(run, out, "--decode", vae) == 0
    assert "6 images are there already" in capsys.readouterr().err
    assert (out / "000005.png").read_bytes() == whole
    kl(scaling_factor=0.7).save_pretrained(tmp_path / "vae")
    assert sample(run, out, "--decode", tmp_path / "vae") == 2
    assert "decoder.scaling_factor was 0.5, now 0.7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "scaled"),
    [
        (tiny, lambda z: z / 0.25),
        (vq, lambda z: z / 0.3),
        (
            lambda: kl(latents_mean=[0.1, -0.2], latents_std=[2.0, 3.0]),
            lambda z: z * torch.tensor([2.0, 3.0]).view(1, 2, 1, 1) / 0.5 + torch.tensor([0.1, -0.2]).view(1, 2, 1, 1),
        ),
    ],
    ids=["tiny", "vq", "mean-and-std"],
)
def test_autoencoders_of_other_kinds(run, made, make, scaled, tmp_path):
    network = make()
    network.save_pretrained(tmp_path / "vae")
    assert sample(run, tmp_path / "out", "--decode", tmp_path / "vae") == 0
    with torch.no_grad():
        expected = to_uint8(network.decode(scaled(made)).sample)
    expected = expected[:, 0] if expected.shape[1] == 1 else expected.permute(0, 2, 3, 1)
    assert near(pictures(tmp_path / "out"), expected)


def test_an_autoencoder_by_itself(vae, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(vae.parent))
    decoder, z = Autoencoder("~/vae/"), torch.randn(2, *SHAPE)
    found = decoder.decode(z)
    assert not found.requires_grad
    torch.testing.assert_close(decoder.decode(z.double()), found)
    torch.testing.assert_close(found, kl(shift_factor=0.2).decode(z / 0.5 + 0.2).sample.detach())
    assert decoder.protocol()["name"] == "vae"
    assert decoder.check((2, 4, 6)) == (1, 8, 12)
    # of a video, say
    monkeypatch.setattr(Autoencoder, "decode", lambda *_: torch.zeros(1, 1, 3, 8, 8))
    with pytest.raises(
        InputError, match=r"makes no pictures of latents of \(2, 4, 4\) \(C, H, W\), but \(1, 3, 8, 8\)"
    ):
        decoder.check(SHAPE)


@pytest.mark.parametrize(("pixels", "at_once"), [(3 * 8 * 16, [3, 3, 1]), (1, [1] * 7), (10**6, [7])])
def test_so_many_pictures_are_decoded_at_once_as_have_so_many_pixels(pixels, at_once, monkeypatch):
    asked = []

    class Grey:
        def check(self, made):
            return 3, 8, 16

        def decode(self, latents):
            asked.append(len(latents))
            return latents.mean((1, 2, 3), keepdim=True).expand(-1, 3, 8, 16)

    monkeypatch.setattr(output, "_AT_ONCE", pixels)
    decoded, z = output.Decoded(Grey(), SHAPE), torch.linspace(-1, 1, 7).view(-1, 1, 1, 1).expand(-1, *SHAPE)
    assert decoded.shape(SHAPE) == (3, 8, 16)
    # in order
    assert decoded(z)[:, 2, 7, 15].tolist() == pytest.approx([k * 255 / 6 for k in range(7)], abs=0.5)
    assert asked == at_once


def test_latents_are_written_in_float32_whatever_they_were_sampled_in():
    z = torch.randn(2, *SHAPE, dtype=torch.float64)
    found = output.Latents()(z)
    assert found.dtype == torch.float32
    assert found.numpy().dtype == output.Latents.dtype
    torch.testing.assert_close(found.double(), z, rtol=1e-6, atol=0)


def test_a_pipeline_of_latents_its_checkpoint_and_its_decoder(tmp_path, monkeypatch):
    from diffusers import DDIMScheduler, LDMPipeline

    LDMPipeline(vq(), build("tiny:width=8", 2, 4, 2), DDIMScheduler()).save_pretrained(tmp_path / "p")
    assert main(["export", str(tmp_path / "p"), "--format", "dualout", "--out", str(tmp_path / "run")]) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "clip=None" in card
    assert "2 × 4 × 4, latents" in card
    # on the page that people read without the way there
    assert "| decoded by | p |" in card
    assert sample(tmp_path / "run", tmp_path / "here") == 0
    assert protocol(tmp_path / "here")["decoder"]["class"] == "VQModel"
    # an upgrade goes on to be decoded by what its source was, from the pipeline or from a checkpoint
    np.save(tmp_path / "x.npy", dualout.noise(range(80), SHAPE).numpy())
    told = ["--data", f"arrays:{tmp_path / 'x.npy'}:layout=nchw:latents=true", "--scope", "closed", "--held_out", "16"]
    for source in ("p", "run"):
        out = tmp_path / f"upgrade-{source}"
        assert main(["upgrade", str(tmp_path / source), *told, "--device", "cpu", "--out", str(out)]) == 0
        assert sample(out, tmp_path / f"of-{source}") == 0
        assert protocol(tmp_path / f"of-{source}")["decoder"]["class"] == "VQModel"

    asked = []

    def download(name, allow_patterns):
        assert name == "some/pipeline"
        for file in (f for f in (tmp_path / "p").rglob("*") if f.is_file()):
            where = file.relative_to(tmp_path / "p")
            if any(fnmatch(where.as_posix(), pattern) for pattern in allow_patterns):
                asked.append(where.as_posix())
                (tmp_path / "hub" / where).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "hub" / where)
        return str(tmp_path / "hub")

    # of a repository the decoder alone is downloaded
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert sample(tmp_path / "run", tmp_path / "there", "--decode", "some/pipeline") == 0
    weights = "vqvae/diffusion_pytorch_model.safetensors"
    assert sorted(asked) == ["model_index.json", "vqvae/config.json", weights]
    assert (tmp_path / "there" / "000006.png").read_bytes() == (tmp_path / "here" / "000006.png").read_bytes()


def test_what_cannot_decode_is_told_and_nothing_is_written(run, vae, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kl(latent_channels=3).save_pretrained("three")
    build("tiny:width=8", 1, 8, 3).save_pretrained("unet")
    for name, cls in (("noisy", "ConsistencyDecoderVAE"), ("foreign", "Popen")):
        shutil.copytree(vae, name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"_class_name": cls}))
    kl().save_pretrained("pickled", safe_serialization=False)
    shutil.copytree(vae, "torn")
    (tmp_path / "torn" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    cases = {
        "three": "three (diffusers' AutoencoderKL) decodes latents of 3 channels, and the model makes some of 2",
        "unet": "unet is a UNet2DModel of diffusers and decodes nothing",
        "noisy": "is a ConsistencyDecoderVAE, which decodes with noise of its own",
        "foreign": "'diffusers.Popen' is not on the allow-list",
        "pickled": "is missing diffusion_pytorch_model.safetensors",
        "torn": "torn cannot be loaded as a AutoencoderKL",
        "pipeline": "has no autoencoder (vae, vqvae",
        str(run): "is no autoencoder of diffusers",
        "nowhere": "there is no autoencoder at 'nowhere'",
    }
    for source, says in cases.items():
        assert sample(run, "out", "--decode", source) == 2, source
        error = capsys.readouterr().err
        assert says in " ".join(error.split())
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists()
    assert sample(run, "out") == 2
    assert "makes latents, which are no pictures: --format npz" in capsys.readouterr().err
    dualout.Denoiser(build("tiny:width=8", 1, 8, 3), dualout.Dual(), dualout.schedules.Linear()).save_pretrained(
        "pictures", image={"channels": 1, "size": [8, 8]}
    )
    assert sample("pictures", "out", "--decode", vae) == 2
    assert "pictures makes pictures, not latents: leave out --decode" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_latents_that_are_decoded_to_what_is_not_finite(run, tmp_path, capsys):
    network = kl()
    network.decoder.conv_out.bias.data.fill_(3e38)
    network.decoder.conv_out.weight.data.fill_(3e38)
    network.save_pretrained(tmp_path / "vae")
    assert sample(run, tmp_path / "out", "--decode", tmp_path / "vae") == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_decoded_pictures_are_scored(run, vae, tmp_path, capsys):
    command = ["evaluate", str(run), "--images", "16", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "s")]
    for flags, says in (
        ([], "dualout sample and evaluate do it with --decode"),
        (["--decode", str(vae)], "say by --data what the latents that the models learned from were encoded from"),
    ):
        assert main([*command, *flags]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "s").exists()
    assert main([*command, "--decode", str(vae), "--data", "digits", "--samplers", "ddim,dpmsolver"]) == 0
    rows = json.loads((tmp_path / "s" / "results.json").read_text())
    assert [row["features"] for row in rows] == ["digits", "digits"]
    for row in rows:
        assert np.isfinite(row["fd"])
        assert row["decode"] == str(vae)
        assert row["protocol"]["decoder"]["class"] == "AutoencoderKL"
        assert row["protocol"]["sampler"]["clip"] is None
    # by another autoencoder it is another row
    kl(scaling_factor=0.7).save_pretrained(tmp_path / "vae")
    assert main([*command, "--decode", str(tmp_path / "vae"), "--data", "digits"]) == 0
    rows = json.loads((tmp_path / "s" / "results.json").read_text())
    assert [row["decode"] for row in rows] == [str(vae), str(vae), str(tmp_path / "vae")]
    assert rows[2]["fd"] != rows[0]["fd"]


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
    from dualout.errors import InputError

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
