"""Autoencoders of diffusers, which make pictures of latents."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualout import checkpoint, hub
from dualout.errors import InputError, first_line
from dualout.files import file_hash, read_json
from dualout.networks import foreign

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Autoencoder:
    """The decoder that belongs to latents, in float32.

    Latents are taken back to the scale that it was trained at as diffusers' pipelines do it: ``z / scaling_factor +
    shift_factor``, or ``z * latents_std / scaling_factor + latents_mean`` where its configuration has those.

    Args:
        source: the directory of an autoencoder of diffusers, or of a pipeline that has one; or a repository of the
            Hugging Face Hub with either. Weights are safetensors, the class is one of diffusers'.
        device: where it decodes.

    Raises:
        InputError: when there is none, it is damaged, or it cannot be used.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        self.source = str(source)
        directory = _located(self.source)
        config = read_json(directory / checkpoint.CONFIG)
        cls = checkpoint.allowed(f"diffusers.{config.get('_class_name')}")
        decode = getattr(cls, "decode", None)
        if decode is None:
            raise InputError(f"{source} is a {cls.__name__} of diffusers and decodes nothing: name an autoencoder")
        if "num_inference_steps" in inspect.signature(decode).parameters:
            raise InputError(
                f"{source} is a {cls.__name__}, which decodes with noise of its own: name another autoencoder"
            )
        network = foreign.diffusers_model(directory, use_safetensors=True)
        self.network: Any = network.float().to(device)
        self.sha256 = file_hash(directory / WEIGHTS)

    def factors(self) -> dict[str, Any]:
        """What its configuration says of the scale of its latents."""
        names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        return {name: self.network.config[name] for name in names if self.network.config.get(name) is not None}

    def check(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape (C, H, W) of the pictures that it makes of latents of a shape.

        Raises:
            InputError: when it makes none of these.
        """
        told = f"{self.source} (diffusers' {type(self.network).__name__})"
        channels = self.network.config.get("latent_channels")
        if channels not in (None, shape[0]):
            raise InputError(f"{told} decodes latents of {channels} channels, and the model makes some of {shape[0]}")
        try:
            _, *made = self.decode(torch.zeros(1, *shape, device=self.network.device)).shape
        except Exception as error:  # networks raise whatever a shape leads them to
            reason = f"{type(error).__name__}: {first_line(error)[:200]}"
            raise InputError(f"{told} cannot decode latents of {shape} (C, H, W): {reason}") from error
        if len(made) != 3:
            raise InputError(f"{told} makes no pictures of latents of {shape} (C, H, W), but {tuple(made)}")
        return made[0], made[1], made[2]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as a model makes them, (B, C, H, W), to pictures in [−1, 1], (B, c, h, w), where the network is.

        Raises:
            InputError: when a picture is not finite.
        """
        latents = latents.to(self.network.device, torch.float32)
        known = {name: torch.as_tensor(v).to(latents).reshape(-1, 1, 1) for name, v in self.factors().items()}
        scale, shift = 1 / known.get("scaling_factor", 1), known.get("shift_factor", 0)
        if "latents_mean" in known and "latents_std" in known:
            scale, shift = scale * known["latents_std"], known["latents_mean"]
        pictures = self.network.decode(latents * scale + shift).sample
        if not torch.isfinite(pictures).all():
            raise InputError(f"{self.source} decodes the model's latents to pictures that are not finite")
        return pictures

    def protocol(self) -> dict[str, Any]:
        """Which it is, as plain JSON values."""
        name = self.source.rstrip("/").rsplit("/", 1)[-1]
        return {"name": name, "class": type(self.network).__name__, "sha256": self.sha256} | self.factors()


@contextmanager
def named_by(run: str | Path) -> Iterator[None]:
    """Of an autoencoder that a run names, and not the user, say so where it cannot be used."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"{error}. {run} names it as what decodes its latents: say by --decode where it is, or --decode none"
        ) from error


def _located(source: str) -> Path:
    """The directory of an autoencoder's files; those of the Hub are downloaded, and of a pipeline no others."""
    path = Path(source).expanduser()
    remote = not path.exists() and hub.is_name(source)
    if not path.is_dir() and not remote:
        raise InputError(f"there is no autoencoder at {source!r}: it is a directory, or a repository of the Hub")
    directory = hub.download(source, [checkpoint.CONFIG, checkpoint.INDEX]) if remote else path
    part = "."
    if (directory / checkpoint.INDEX).is_file():
        parts = read_json(directory / checkpoint.INDEX)
        part = next((name for name in foreign.CODERS if name in parts), None)
        if part is None:
            raise InputError(f"the pipeline {source} has no autoencoder ({', '.join(foreign.CODERS)})")
    files = [(Path(part) / name).as_posix() for name in (checkpoint.CONFIG, WEIGHTS)]
    directory = hub.download(source, files) if remote else directory
    config = directory / files[0]
    if not config.is_file() or "_class_name" not in read_json(config):
        raise InputError(f"{source} is no autoencoder of diffusers: no {checkpoint.CONFIG} there names its class")
    if not (directory / files[1]).is_file():
        raise InputError(f"{source} is missing {WEIGHTS}; weights of other formats are not read")
    return config.parent
