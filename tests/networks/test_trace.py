"""The layer deepest inside a network."""

import torch
from torch import nn

from dualout.networks.trace import deepest


class Tokens(nn.Module):
    """A transformer's shape: patches, blocks that keep them, and pixels again."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, t):
        tokens = self.patches(x).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (4, 4)), 2)


def test_the_deepest_module_of_a_transformer_is_its_middle_block():
    network, images = Tokens(), torch.zeros(2, 1, 8, 8)
    assert deepest(network, images, lambda: network(images, 0)) == "blocks.1"
