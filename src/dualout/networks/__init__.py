"""Networks: how to call them, how to build them, how to give them a second output."""

from dualout.networks.adapter import Adapter
from dualout.networks.backbones import Backbone
from dualout.networks.build import build
from dualout.networks.diffusers import adapted
from dualout.networks.flowtime import FlowTime
from dualout.networks.heads import Heads
from dualout.networks.keyword import Keyword
from dualout.networks.listed import Listed
from dualout.networks.output import Output
from dualout.networks.positional import Positional
from dualout.networks.scaled import ScaledTime
from dualout.networks.shaped import Unshaped
from dualout.networks.sides import ChannelsAt, Concatenated
from dualout.networks.sigma import SigmaConditioned
from dualout.networks.tokens import Tokens
from dualout.networks.widen import widen
from dualout.networks.x0first import X0First
from dualout.registry import discover

__all__ = [
    "Adapter",
    "Backbone",
    "ChannelsAt",
    "Concatenated",
    "FlowTime",
    "Heads",
    "Keyword",
    "Listed",
    "Output",
    "Positional",
    "ScaledTime",
    "SigmaConditioned",
    "Tokens",
    "Unshaped",
    "X0First",
    "adapted",
    "build",
    "widen",
]

discover(__name__, __path__)
