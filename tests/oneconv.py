"""A network of one convolution that is told the time, and noisy images of two channels for it."""

import torch
from torch import Tensor, nn

T = 50


class Net(nn.Module):
    """(B, 2, H, W), (B,) -> (B, channels, H, W), larger for later times."""

    def __init__(self, channels: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * (1 + t.to(x.dtype).view(-1, 1, 1, 1) / T)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 2, 4, 4)
