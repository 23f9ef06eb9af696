"""What computes a network when images are made: torch itself, CUDA graphs, torch.compile, OpenVINO, ONNX Runtime."""

from dualout.networks.backends.base import Backend, Call
from dualout.networks.backends.choose import AUTO, TOLERANCE, Chosen, check, choose, fuse
from dualout.registry import discover

__all__ = ["AUTO", "TOLERANCE", "Backend", "Call", "Chosen", "check", "choose", "fuse"]

discover(__name__, __path__)
