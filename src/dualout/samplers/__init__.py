"""Samplers: from noise to images in K steps."""

from dualout.registry import discover
from dualout.samplers.base import Moment, Sampler
from dualout.samplers.ddim import DDIM
from dualout.samplers.ddpm import DDPM
from dualout.samplers.diffusers import FromDiffusers
from dualout.samplers.dpmsolver import DPMSolver
from dualout.samplers.heun import Heun
from dualout.samplers.ipndm import IPNDM
from dualout.samplers.spacing import SPACINGS
from dualout.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "IPNDM",
    "SPACINGS",
    "DPMSolver",
    "FromDiffusers",
    "Heun",
    "Moment",
    "Sampler",
    "UniPC",
]

discover(__name__, __path__)
