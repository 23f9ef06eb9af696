"""A checkpoint, and what has to be known of it to make images and to say which images they were."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dualout import checkpoint
from dualout.card import AS_THEY_ARE, LATENTS, class_count, decoder_of, image_said, makes_latents
from dualout.checkpoint import entry
from dualout.denoiser import Denoiser
from dualout.errors import InputError, first_line
from dualout.evaluation.autoencoder import Autoencoder, named_by
from dualout.evaluation.output import Decoded, Latents, Output, Pixels
from dualout.files import file_hash
from dualout.networks.backends import Chosen
from dualout.networks.tables import indices_checked

_LARGEST = 16384
"""Channels, and pixels a side."""
_CHECKED_PIXELS = 2**20
"""Of an image, at most, that a network is called with when it is loaded."""


@dataclass(frozen=True, eq=False)
class Model:
    """A denoiser that was read from a checkpoint.

    Attributes:
        run: where it came from, as it was named.
        denoiser: ready to use, on its device.
        shape: (C, H, W) of what it denoises.
        classes: how many classes it is conditioned on (``class_labels``); None when it takes none. The number `classes`
            itself stands for no class.
        details: which weights these are, as plain JSON values.
        class_names: what the classes are called, where that is known.
        directory: where its files are, or were, as an absolute path; None where it was not read from any.
        output: what becomes of that which it makes.
        unseen: the classes, by number, that training saw no image of; no class is among them where none was withheld.
        prepared: its network as backends have made it ready, for all samplings of the model.
    """

    run: str
    denoiser: Denoiser
    shape: tuple[int, int, int]
    classes: int | None
    details: dict[str, Any]
    class_names: tuple[str, ...] = ()
    directory: Path | None = None
    output: Output = field(default_factory=Pixels)
    unseen: tuple[int, ...] = ()
    prepared: dict[Any, Chosen] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        run: str | Path,
        device: torch.device | str = "cpu",
        *,
        decode: Autoencoder | str | None = None,
        latents: bool = False,
    ) -> Model:
        """Read a checkpoint directory, the directory of a run, or a repository of the Hugging Face Hub.

        Args:
            run: which.
            device: where it is computed.
            decode: for a model of latents, what makes pictures of them; None is what its training was told, and
                `AS_THEY_ARE` nothing.
            latents: whether latents are of use as they are.

        Raises:
            InputError: for anything missing, damaged, of another architecture or not allowed; for a model of latents
                where only pictures are of use; and for a decoder that does not fit.
        """
        directory = checkpoint.locate(run)
        config = checkpoint.read_config(directory)
        shape = image_shape(config, directory)
        if decode is None and makes_latents(config):
            decode = _remembered(run, config, device)
        elif isinstance(decode, str) and decode != AS_THEY_ARE:
            decode = Autoencoder(decode, device)
        decoder = decode if isinstance(decode, Autoencoder) else None
        output = _output(run, makes_latents(config), shape, decoder, latents)
        denoiser = Denoiser.from_pretrained(directory).to(device)
        if makes_latents(config):
            denoiser.card.setdefault(LATENTS, "autoencoder")
        trained_on = entry(config, "data")
        details = {
            "weights": checkpoint.WEIGHTS,
            "sha256": file_hash(directory / checkpoint.WEIGHTS),
            "ema": entry(config, "training").get("ema"),
            "trained_on": {k: trained_on.get(k) for k in ("name", "fingerprint", "images")} if trained_on else None,
            "parameterization": config["parameterization"],
            "schedule": config["schedule"],
            "network": config["network"].get("class"),
        }
        told = entry(entry(config, "conditions"), "class_labels")
        names = tuple(map(str, told.get("classes") or []))
        classes = len(names) or class_count(config["network"])
        unseen = _unseen(config, told.get("empty"), classes)
        model = cls(str(run), denoiser, shape, classes, details, names, directory.absolute(), output, unseen)
        model._check_network()
        return model

    @torch.no_grad()
    def _check_network(self) -> None:
        """Call the network with one image at the last time step: what a configuration describes may be built, and fail
        at that."""
        channels, height, width = self.shape
        if height * width > _CHECKED_PIXELS:
            return
        labels = {} if self.classes is None else {"class_labels": torch.zeros(1, dtype=torch.long, device=self.device)}
        try:
            last = self.denoiser.schedule.steps - 1
            with indices_checked(self.denoiser):
                self.denoiser(torch.zeros(1, channels, height, width, device=self.device), last, **labels)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # networks raise whatever damaged arguments lead them to
            raise InputError(
                f"{self.run}: its network ({self.details['network']}) cannot look at images of {self.shape} (C, H, W): "
                f"{type(error).__name__}: {first_line(error)[:200]}. Commands tell a network its time and class: one "
                f"that is told more, as text, samples in Python. Or {checkpoint.CONFIG} is damaged, or of another "
                "network"
            ) from error

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.buffers()).device

    @property
    def turn(self) -> tuple[int, ...]:
        """The classes that images take in turn where none is asked for."""
        return tuple(c for c in range(self.classes or 0) if c not in self.unseen)

    @property
    def latents(self) -> bool:
        """Whether it makes latents, decoded afterwards or not."""
        return not self.output.bounded

    @property
    def image(self) -> tuple[int, int, int]:
        """(C, H, W) of what comes out in the end."""
        return self.output.shape(self.shape)

    def release(self) -> None:
        """Let go of what backends have made of its network, which of a GPU's memory is more than the network."""
        self.prepared.clear()

    def clips(self, asked: bool | None = None) -> bool:
        """Whether predicted clean images are clipped: as it is asked for, or else where they have a range."""
        return not self.latents if asked is None else asked

    @property
    def trained_on(self) -> str | None:
        """The images that it was trained on, as --data names them; None where that is not written down."""
        name = (self.details.get("trained_on") or {}).get("name")
        return name if isinstance(name, str) else None

    def protocol(self) -> dict[str, Any]:
        """Which model made the images."""
        name = self.run.rstrip("/").rsplit("/", 1)[-1]
        return {"name": name, "image": list(self.shape), "classes": self.classes} | self.details


def _unseen(config: dict[str, Any], told: Any, classes: int | None) -> tuple[int, ...]:
    """The classes, by number, that a model was trained on no image of; `classes` is the number of no class."""
    training = entry(config, "training")
    withheld = training.get("label_dropout") != 0 or training.get("init") is not None
    return (*(told if isinstance(told, list) else ()), *(() if withheld or classes is None else (classes,)))


def _remembered(run: str | Path, config: dict[str, Any], device: torch.device | str) -> Autoencoder | None:
    """The autoencoder that the training was told, if it was."""
    named = decoder_of(config)
    with named_by(run):
        return None if named is None else Autoencoder(named, device)


def _output(
    run: str | Path, latent: bool, shape: tuple[int, int, int], decoder: Autoencoder | None, as_they_are: bool
) -> Output:
    if decoder is not None:
        if not latent:
            raise InputError(f"{run} makes pictures, not latents: leave out --decode {decoder.source}")
        return Decoded(decoder, shape)
    if latent and not as_they_are:
        raise InputError(
            f"{run} makes latents, which are no pictures before an autoencoder decodes them: dualout sample and "
            "evaluate do it with --decode, the directory of the one that encoded them; dualout sample --format npz "
            "writes them as they are"
        )
    return Latents() if latent else Pixels()


def image_shape(config: dict[str, Any], directory: Path) -> tuple[int, int, int]:
    """(C, H, W) of a checkpoint's images: its `image`, or else what its network was built for.

    Raises:
        InputError: when it says neither.
    """
    channels, size = image_said(entry(config, "image"), config["network"])
    shape: tuple[Any, ...] = (channels, *size) if isinstance(size, list | tuple) else (channels, size, size)
    if len(shape) != 3 or not all(type(v) is int and 0 < v <= _LARGEST for v in shape):
        raise InputError(
            f"{directory / checkpoint.CONFIG} does not say what shape its images have, in numbers up to {_LARGEST}; "
            'write it in as "image": {"channels": C, "size": [H, W]}, as save_pretrained(path, image=…) does'
        )
    return shape[0], shape[1], shape[2]
