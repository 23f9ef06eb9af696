"""Trains a small autoencoder of diffusers and encodes the images with it: latents to learn from.

    python benchmarks/train_autoencoder.py --data idx:FOLDER:size=32 --out runs/autoencoder

writes the autoencoder's directory runs/autoencoder/vae, whose scaling_factor brings its latents to a deviation of 1,
and runs/autoencoder/latents.npz with the latents of the training split, for --data arrays:FILE:latents=true. Absolute
errors, and a small pull of the latents towards a normal distribution (Rombach et al., CVPR 2022, arXiv 2112.10752,
without its adversarial and perceptual losses). Sides are halved twice. A run is determined by its arguments, to the
rounding of its device.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models import AutoencoderKL
from torch import Tensor

from dualout.data import load
from dualout.data.pixels import to_model
from dualout.networks.device import device

KL_WEIGHT = 1e-4


def encoded(network: Any, images: Tensor) -> Tensor:
    """The means of images' latents, (N, C, H/4, W/4), not scaled."""
    with torch.no_grad():
        return torch.cat([network.encode(some).latent_dist.mode() for some in images.split(500)])


def error(network: Any, images: Tensor) -> float:
    """Root mean square of what is lost on the way there and back, in units of the range of images."""
    with torch.no_grad():
        back = torch.cat([network.decode(z).sample for z in encoded(network, images).split(500)])
    return float((back - images).square().mean().sqrt()) / 2


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", default="digits")
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--batch_size", type=int, default=64)
    options.add_argument("--width", type=int, default=16)
    options.add_argument("--channels", type=int, default=4, help="of the latents")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="auto", help="cpu, cuda, …; by default the accelerator, if there is one")
    options.add_argument("--out", type=Path, default=Path("runs/autoencoder"))
    chosen = options.parse_args()

    train, test = (load(chosen.data, split=split) for split in ("train", "test"))
    place = device(chosen.device)
    images, held_out = (to_model(d.batch(range(len(d)))) for d in (train, test))
    held_out = held_out[:1000].to(place)

    torch.manual_seed(chosen.seed)
    generator = torch.Generator().manual_seed(chosen.seed)
    network: Any = AutoencoderKL(
        in_channels=train.channels, out_channels=train.channels, latent_channels=chosen.channels,
        block_out_channels=(chosen.width, 2 * chosen.width, 2 * chosen.width), norm_num_groups=8, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, sample_size=train.size[0],
    ).to(place)  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, chosen.steps)
    for step in range(1, chosen.steps + 1):
        batch = images[torch.randint(0, len(images), (chosen.batch_size,), generator=generator)].to(place)
        posterior = network.encode(batch).latent_dist
        back = network.decode(posterior.sample()).sample
        loss = (back - batch).abs().mean() + KL_WEIGHT * posterior.kl().mean() / batch[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step % 250 == 0:
            print(f"step {step:5d}  loss {loss:.4f}  test error {error(network, held_out):.4f}", flush=True)

    latents = encoded(network.eval(), images.to(place))
    network.register_to_config(scaling_factor=float(1 / latents.std()))
    network.save_pretrained(chosen.out / "vae")
    scaled = (latents * network.config["scaling_factor"]).cpu().numpy()
    labels = {} if train.labels is None else {"labels": train.labels.numpy()}
    np.savez(chosen.out / "latents.npz", images=scaled, **labels)
    count = sum(p.numel() for p in network.parameters())
    print(f"wrote {chosen.out}: {count:,} parameters, {len(scaled):,} latents {'×'.join(map(str, scaled.shape[1:]))}")


if __name__ == "__main__":
    main()
