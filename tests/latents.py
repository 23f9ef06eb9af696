"""A small model of latents, autoencoders for them, and what they make."""

import json

import numpy as np
import torch
from PIL import Image

from dualout.cli.main import main

SHAPE = (2, 4, 4)
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
SMALL = {"in_channels": 1, "out_channels": 1, "block_out_channels": (4, 4), "norm_num_groups": 2, **BLOCKS}


def kl(**options):
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(**{**SMALL, "latent_channels": 2, "scaling_factor": 0.5, **options}).eval()


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
