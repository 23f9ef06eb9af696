"""Weights that are divided among processes (FSDP2, torch's `fully_shard`).

Each process holds a part of every weight, of its gradient, of its average and of the optimizer's memory. What a block
of the network computes with is brought together when its turn comes, and let go after it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dualout.denoiser import Denoiser
from dualout.networks.adapter import innermost


def shard(denoiser: Denoiser, mesh: DeviceMesh) -> None:
    """Divide a denoiser's weights, in place; its parameters are others then."""
    # a Prediction's parts are views of the network's output, and no loss writes to them
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPDenoiser\) returned a view tensor")
    for block in blocks(denoiser):
        fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)


def blocks(denoiser: Denoiser) -> Iterator[nn.Module]:
    """What is brought together at a time: the members of the network's lists, such as a UNet's blocks up and down."""
    for child in innermost(denoiser.network).children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if not isinstance(block, nn.ModuleList | nn.ModuleDict))


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """This process's part of a tensor that all have, divided as a parameter is."""
    assert isinstance(parameter, DTensor)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors brought together, one after the other, and kept on the host where `keep` says; every process calls it."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        together = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = together.cpu()
    return found


def one(tensor: Tensor) -> Tensor:
    """A number that processes have their parts of; every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parts(tensors: list[Tensor]) -> list[Tensor]:
    """What this process holds of each."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def all_say(yes: Tensor) -> bool:
    """Whether it is true in every process."""
    votes = yes.to(torch.float32)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
    return bool(votes)
