"""Parameterizations: how a network's output is turned into a `Prediction`, and what training minimizes."""

from dualout.parameterizations.base import Parameterization, SingleOutput, check_channels
from dualout.parameterizations.clean import CleanImage
from dualout.parameterizations.dual import Dual
from dualout.parameterizations.epsilon import Epsilon
from dualout.parameterizations.flow import Flow
from dualout.parameterizations.karras import Karras
from dualout.parameterizations.learned_variance import LearnedVariance
from dualout.parameterizations.upgraded import Upgraded
from dualout.parameterizations.velocity import Velocity
from dualout.registry import discover

__all__ = [
    "CleanImage",
    "Dual",
    "Epsilon",
    "Flow",
    "Karras",
    "LearnedVariance",
    "Parameterization",
    "SingleOutput",
    "Upgraded",
    "Velocity",
    "check_channels",
]

discover(__name__, __path__)
