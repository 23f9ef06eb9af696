"""Small classifiers, trained on the data that are to be judged, whose last hidden layer is the features.

`benchmarks/train_classifier.py` trains them and writes their files: safetensors whose metadata hold the network's
arguments and how it was trained, test accuracy included.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from dualout import checkpoint
from dualout.data.pixels import to_model
from dualout.errors import InputError
from dualout.evaluation.features.base import NetworkFeatures
from dualout.files import atomically, file_hash


class SmallClassifier(nn.Module):
    """Two 3×3 convolutions and a halving, `stages` times, then a hidden layer and the classes.

    Args:
        channels: C of the images.
        size: (H, W) of the images.
        classes: how many.
        width: filters of the first stage; the second and later ones have twice as many.
        features: D, the width of the hidden layer.
        stages: how often the image is halved.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], classes: int, width: int, features: int, stages: int
    ) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            "channels": channels, "size": list(size), "classes": classes,
            "width": width, "features": features, "stages": stages,
        }  # fmt: skip
        layers: list[nn.Module] = []
        before, height, across = channels, *size
        for stage in range(stages):
            after = width if stage == 0 else 2 * width
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1)]
            layers += [nn.SiLU(), nn.AvgPool2d(2)]
            before, height, across = after, height // 2, across // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * height * across, features), nn.SiLU())
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """The features: uint8, or float in [−1, 1], (B, C, H, W) -> (B, D)."""
        return self.body(to_model(images))

    def logits(self, images: Tensor) -> Tensor:
        """The classes' logits: uint8, or float in [−1, 1], (B, C, H, W) -> (B, classes)."""
        return self.head(self(images))

    def save(self, path: Path, trained: dict[str, Any]) -> None:
        """Write the weights, with the arguments and how they were trained."""
        import safetensors.torch

        metadata = {"arguments": json.dumps(self.arguments), "trained": json.dumps(trained)}
        with atomically(path) as aside:
            safetensors.torch.save_file(self.state_dict(), aside, metadata)


@dataclass(frozen=True)
class _OfFile(NetworkFeatures):
    @property
    @abstractmethod
    def file(self) -> Path:
        """The classifier's file."""

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The network's arguments and how it was trained.

        Raises:
            InputError: when there is no such file, or it holds no classifier.
        """
        import safetensors

        try:
            with safetensors.safe_open(self.file, "pt") as file:
                found = {k: json.loads(v) for k, v in (file.metadata() or {}).items() if k in ("arguments", "trained")}
        except FileNotFoundError as error:
            raise InputError(f"features {self.name!r}: there is no file {self.file}") from error
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"features {self.name!r}: {self.file} is damaged or no safetensors file: {error}"
            ) from error
        if found.keys() != {"arguments", "trained"}:
            raise InputError(
                f"features {self.name!r}: {self.file} holds no classifier that benchmarks/train_classifier.py wrote"
            )
        return found

    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Only images of the shape that the classifier was trained on."""
        arguments = self.metadata["arguments"]
        wanted = (arguments["channels"], *arguments["size"])
        if (channels, *size) != wanted:
            raise InputError(
                f"features {self.name!r} are of {_shape(wanted)} images, these are {_shape((channels, *size))}; "
                "for any shape there are pixels, random and, with three channels or one, lite0 and inception"
            )

    def build(self) -> nn.Module:
        """The classifier with the file's weights."""
        arguments = self.metadata["arguments"]
        network = SmallClassifier(**arguments | {"size": tuple(arguments["size"])})
        checkpoint.load_strictly(network, checkpoint.read_tensors(self.file), str(self.file))
        return network

    def details(self) -> dict[str, Any]:
        """The weights' hash, and how they were trained."""
        return {"weights": self.file.name, "sha256": file_hash(self.file), "trained": self.metadata["trained"]}


@dataclass(frozen=True)
class Digits(_OfFile):
    """A classifier of scikit-learn's 8×8 digits, which ships with the package."""

    shipped: ClassVar[Path] = Path(__file__).parents[1] / "weights" / "digits.safetensors"

    @property
    def file(self) -> Path:
        """The classifier's file."""
        return self.shipped


@dataclass(frozen=True)
class Classifier(_OfFile):
    """A classifier that you train: ``classifier:path=FILE.safetensors``, trained by benchmarks/train_classifier.py."""

    path: str

    @property
    def file(self) -> Path:
        """The classifier's file."""
        return Path(self.path).expanduser()

    def config(self) -> dict[str, Any]:
        """The name and the fields; the file's name without where it lies, which says nothing to others."""
        return {"name": self.name, "path": self.file.name}


def _shape(shape: tuple[int, int, int]) -> str:
    kind = {1: "grey ", 3: "colour "}.get(shape[0], f"{shape[0]}-channel ")
    return f"{kind}{shape[1]}×{shape[2]}"
