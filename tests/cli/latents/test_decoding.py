"""Latents sampled on the command line: as they are, and as the pictures that an autoencoder of diffusers decodes."""

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
from dualout.networks.build import build
from latents import SHAPE, SMALL, kl, near, pictures, protocol, sample


def tiny():
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        in_channels=3, out_channels=3, latent_channels=2, encoder_block_out_channels=(4, 4), scaling_factor=0.25,
        decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip


def vq():
    from diffusers import VQModel

    return VQModel(**{**SMALL, "latent_channels": 2, "num_vq_embeddings": 8, "scaling_factor": 0.3}).eval()


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
