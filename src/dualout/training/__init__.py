"""Training: a generator of steps, and runs in directories, which can be resumed."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualout.training.config import TrainConfig
    from dualout.training.learner import Learner
    from dualout.training.loop import Step, train
    from dualout.training.run import Run

_HOME = {"TrainConfig": "config", "Learner": "learner", "Step": "loop", "train": "loop", "Run": "run"}

__all__ = ["Learner", "Run", "Step", "TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"dualout.training.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dualout.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
