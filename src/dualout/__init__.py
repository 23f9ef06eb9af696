"""Dynamic dual-output diffusion models.

Public names are imported when they are first used, so that ``dualout --help`` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dualout.version import __version__

if TYPE_CHECKING:
    from dualout import analysis, data, evaluation, export, networks, parameterizations, samplers, schedules, training
    from dualout.calibrated import Calibrated, Calibration
    from dualout.denoiser import Denoiser, Loss
    from dualout.errors import InputError
    from dualout.guidance import ClassifierFree
    from dualout.levels import Level
    from dualout.networks.widen import widen
    from dualout.parameterizations import (
        CleanImage,
        Dual,
        Epsilon,
        Flow,
        Karras,
        LearnedVariance,
        Parameterization,
        Velocity,
    )
    from dualout.prediction import Prediction
    from dualout.randomness import SeededDraw, noise
    from dualout.samplers import Sampler
    from dualout.schedules import Schedule

_HOME = {
    "dualout.calibrated": ("Calibrated", "Calibration"),
    "dualout.denoiser": ("Denoiser", "Loss"),
    "dualout.errors": ("InputError",),
    "dualout.guidance": ("ClassifierFree",),
    "dualout.levels": ("Level",),
    "dualout.networks.widen": ("widen",),
    "dualout.parameterizations": (
        "CleanImage", "Dual", "Epsilon", "Flow", "Karras", "LearnedVariance", "Parameterization", "Velocity",
    ),
    "dualout.prediction": ("Prediction",),
    "dualout.randomness": ("SeededDraw", "noise"),
    "dualout.samplers": ("Sampler",),
    "dualout.schedules": ("Schedule",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_PACKAGES = (
    "analysis", "data", "evaluation", "export", "networks", "parameterizations", "samplers", "schedules", "training",
)  # fmt: skip

__all__ = [
    "Calibrated",
    "Calibration",
    "ClassifierFree",
    "CleanImage",
    "Denoiser",
    "Dual",
    "Epsilon",
    "Flow",
    "InputError",
    "Karras",
    "LearnedVariance",
    "Level",
    "Loss",
    "Parameterization",
    "Prediction",
    "Sampler",
    "Schedule",
    "SeededDraw",
    "Velocity",
    "__version__",
    "analysis",
    "data",
    "evaluation",
    "export",
    "networks",
    "noise",
    "parameterizations",
    "samplers",
    "schedules",
    "training",
    "widen",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"dualout.{name}")
    if name in _MODULE_OF:
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value
    raise AttributeError(f"module 'dualout' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
