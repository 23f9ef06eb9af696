"""Models for other programs: diffusers' pipelines, and ONNX.

Imported when first used: diffusers and ONNX's packages take their time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualout.export.diffusers import DualOutputPipeline
    from dualout.export.onnx import write_onnx
    from dualout.export.onnx_runtime import OnnxDenoiser

_HOME = {"DualOutputPipeline": "diffusers", "write_onnx": "onnx", "OnnxDenoiser": "onnx_runtime"}

__all__ = ["DualOutputPipeline", "OnnxDenoiser", "write_onnx"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dualout.export' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"dualout.export.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
