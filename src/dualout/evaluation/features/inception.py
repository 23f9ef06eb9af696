"""The Inception-v3 whose 2048 pooled features FID is defined by.

The 2015 TensorFlow graph (Szegedy et al., arXiv 1512.00567; FID: Heusel et al. 2017, arXiv 1706.08500), with its own
ways: pooling that leaves out the padding, a maximum in the last block, images resized as TensorFlow 1 did. It is
written out here so that nothing but torch is needed; the names fit the weights that pytorch-fid and torch-fidelity use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualout import checkpoint
from dualout.errors import InputError, first_line
from dualout.evaluation.features.base import NetworkFeatures, check_colour, in_colour
from dualout.files import cache_directory, file_hash

SOURCE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"
"""The first digits of the weights' sha256."""
FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")


class _Layer(NamedTuple):
    """A convolution, or two side by side whose outputs are joined."""

    width: int
    kernel: int | tuple[int, int]
    stride: int = 1
    padded: bool = True
    beside: tuple[int, int] | None = None


class _Convolution(nn.Module):
    def __init__(self, before: int, layer: _Layer, kernel: int | tuple[int, int]) -> None:
        super().__init__()
        k = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (k[0] // 2, k[1] // 2) if layer.padded else 0
        self.conv = nn.Conv2d(before, layer.width, k, layer.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(layer.width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    """Branches side by side; `pool` names what the last branch begins with."""

    def __init__(self, before: int, branches: Mapping[str, Sequence[_Layer]], pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.paths: list[tuple[str, list[list[str]]]] = []
        for branch, layers in branches.items():
            width, path = before, []
            for number, layer in enumerate(layers, 1):
                stem = branch if len(layers) == 1 else f"{branch}_{number}"
                pair = layer.beside is not None
                kernels = {f"{stem}a": layer.kernel, f"{stem}b": layer.beside} if pair else {stem: layer.kernel}
                for name, kernel in kernels.items():
                    self.add_module(name, _Convolution(width, layer, kernel))
                width = layer.width * len(kernels)
                path.append(list(kernels))
            self.paths.append((branch, path))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, path in self.paths:
            y = self._pooled(x) if branch == "branch_pool" else x
            for names in path:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        if self.pool == "halve":
            outputs.append(F.max_pool2d(x, 3, 2))
        return torch.cat(outputs, 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "max":
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _a(before: int, pooled: int) -> _Block:
    branches = {
        "branch1x1": [_Layer(64, 1)],
        "branch5x5": [_Layer(48, 1), _Layer(64, 5)],
        "branch3x3dbl": [_Layer(64, 1), _Layer(96, 3), _Layer(96, 3)],
        "branch_pool": [_Layer(pooled, 1)],
    }
    return _Block(before, branches, "mean")


def _b(before: int) -> _Block:
    branches = {
        "branch3x3": [_Layer(384, 3, 2, padded=False)],
        "branch3x3dbl": [_Layer(64, 1), _Layer(96, 3), _Layer(96, 3, 2, padded=False)],
    }
    return _Block(before, branches, "halve")


def _c(before: int, inner: int) -> _Block:
    wide, tall = (1, 7), (7, 1)
    branches = {
        "branch1x1": [_Layer(192, 1)],
        "branch7x7": [_Layer(inner, 1), _Layer(inner, wide), _Layer(192, tall)],
        "branch7x7dbl": [_Layer(inner, k) for k in (1, tall, wide, tall)] + [_Layer(192, wide)],
        "branch_pool": [_Layer(192, 1)],
    }
    return _Block(before, branches, "mean")


def _d(before: int) -> _Block:
    branches = {
        "branch3x3": [_Layer(192, 1), _Layer(320, 3, 2, padded=False)],
        "branch7x7x3": [_Layer(192, k) for k in (1, (1, 7), (7, 1))] + [_Layer(192, 3, 2, padded=False)],
    }
    return _Block(before, branches, "halve")


def _e(before: int, pool: str) -> _Block:
    split = _Layer(384, (1, 3), beside=(3, 1))
    branches = {
        "branch1x1": [_Layer(320, 1)],
        "branch3x3": [_Layer(384, 1), split],
        "branch3x3dbl": [_Layer(448, 1), _Layer(384, 3), split],
        "branch_pool": [_Layer(192, 1)],
    }
    return _Block(before, branches, pool)


class InceptionV3(nn.Module):
    """uint8 (B, 3, H, W) -> (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, _Layer(32, 3, 2, padded=False), 3)
        self.Conv2d_2a_3x3 = _Convolution(32, _Layer(32, 3, padded=False), 3)
        self.Conv2d_2b_3x3 = _Convolution(32, _Layer(64, 3), 3)
        self.Conv2d_3b_1x1 = _Convolution(64, _Layer(80, 1), 1)
        self.Conv2d_4a_3x3 = _Convolution(80, _Layer(192, 3, padded=False), 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_c(768, inner) for inner in (128, 160, 160, 192))
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, "mean"), _e(2048, "max")
        # the 1008 classes play no part in the features, but are in the weights' file
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> Tensor:
        """The features."""
        x = (resized(images.float(), 299) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def resized(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size), bilinear as in TensorFlow 1: pixel k is at k·H/size, nothing is averaged."""
    rows, columns = (_interpolation(n, size).to(images) for n in images.shape[2:])
    return rows @ images @ columns.T


def _interpolation(before: int, after: int) -> Tensor:
    """The matrix (after, before) that interpolates linearly."""
    position = torch.arange(after, dtype=torch.float64) * (before / after)
    low = position.long()
    high = (low + 1).clamp(max=before - 1)
    matrix = torch.zeros(after, before, dtype=torch.float64)
    row = torch.arange(after)
    matrix[row, low] += 1 - (position - low)
    matrix[row, high] += position - low
    return matrix


@dataclass(frozen=True)
class Inception(NetworkFeatures):
    """The features of FID proper; grey images are repeated to three channels.

    Attributes:
        weights: the file pt_inception-2015-12-05-6726825d.pth; None looks in dualout's cache and in torch.hub's, where
            pytorch-fid and torch-fidelity put it.
    """

    weights: str | None = None

    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Grey or colour; and the weights are there."""
        check_colour(self.name, channels)
        self.file()

    def file(self) -> Path:
        """The weights' file.

        Raises:
            InputError: when it is not there; the message says where to get it and where to put it.
        """
        if self.weights is not None:
            path = Path(self.weights).expanduser()
            if not path.is_file():
                raise InputError(f"features 'inception': there is no file {path}. {_how_to_get(path)}")
            return path
        places = [cache_directory(), Path(torch.hub.get_dir()) / "checkpoints"]
        for path in (place / name for place in places for name in FILES):
            if path.is_file():
                return path
        raise InputError(
            "features 'inception' need the Inception-v3 weights of FID, which cannot come with the package (91 MB) and "
            f"are in neither {places[0]} nor {places[1]}. {_how_to_get(places[0] / FILES[0])}"
        )

    def build(self) -> nn.Module:
        """The network with the file's weights."""
        path = self.file()
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{path} is no file of weights: {first_line(error)}") from error
        network = InceptionV3()
        # older files lack the counters of batches, which only training needs
        tensors = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")} | dict(tensors)
        checkpoint.load_strictly(network, tensors, str(path))
        return _InColour(network)

    def config(self) -> dict[str, Any]:
        """The name; where the weights lie says nothing to others."""
        return {"name": self.name}

    def details(self) -> dict[str, Any]:
        """The weights' hash, whether they are FID's, and what is done to images."""
        digest = file_hash(self.file())
        return {
            "weights": self.file().name,
            "sha256": digest,
            "reference": digest.startswith(SHA256),
            "input": "bilinear to 299×299 as in TensorFlow 1; (x − 128) / 128; grey repeated to 3 channels",
        }


class _InColour(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(in_colour(images))


def _how_to_get(path: Path) -> str:
    return f"Get them with: mkdir -p {path.parent} && curl -L -o {path} {SOURCE}"
