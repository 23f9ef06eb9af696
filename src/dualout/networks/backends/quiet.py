"""Packages that compute networks, imported so that they tell nobody: both would send how they are used."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def onnxruntime() -> Any:
    """The package onnxruntime; by itself it keeps an identifier of this machine in the user's cache directory."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return importlib.import_module("onnxruntime")


def openvino() -> Any:
    """The package openvino; by itself it asks Google Analytics to count, and writes to ~/intel."""
    # it goes on without what cannot be imported
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")
