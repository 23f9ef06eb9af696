"""A model of latents, what it makes, and an autoencoder that decodes it."""

import pytest
import torch

import dualout
from dualout.networks.build import build
from latents import SHAPE, kl


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
