"""The processes that torchrun or accelerate launch started side by side, as the environment tells of them."""

from __future__ import annotations

import os
from datetime import timedelta

PATIENCE, PATIENCE_OF_GPUS = timedelta(days=1), timedelta(hours=2)
"""How long processes wait for one another: one alone looks at all real images, or draws a grid of samples, which may
take longer than gloo's half hour and NCCL's ten minutes. That another has ended is told by its connection; but that a
GPU or the network between them hangs, NCCL notices by this alone."""


def count() -> int:
    """How many there are; 1 where this one is alone."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """The number of this one, from 0."""
    return int(os.environ.get("RANK") or 0)


def local_rank() -> int | None:
    """Its number among those of this machine; None where nothing launched them."""
    number = os.environ.get("LOCAL_RANK")
    return int(number) if number else None


def engine() -> str | None:
    """What accelerate is configured to share a training out by, of what takes hold of the model; None for nothing."""
    engines = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    return next((e for e in engines if os.environ.get(f"ACCELERATE_USE_{e}", "").lower() in ("true", "1")), None)
