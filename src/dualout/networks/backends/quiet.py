"""Packages that compute networks, without what they would tell: two send how they are used, one talks of itself."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def exporter() -> Iterator[None]:
    """Within, torch's exporter to ONNX, and what it converts by, log errors only."""
    levels = {log: log.level for log in map(logging.getLogger, ("torch.onnx", "onnxscript"))}
    for log in levels:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)
