"""What processes that torchrun started side by side say of a mistake: all of them come to it, and one tells it."""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta

from dualout import processes

_GONE = ("connection closed by peer", "connection reset by peer", "remote process exiting")
"""How gloo and NCCL say that another process has ended."""


def first() -> bool:
    """Whether this is the first process, or the only one."""
    return processes.rank() == 0


def tells(message: str) -> bool:
    """Whether this process is to print what went wrong: the one that comes to it before the others is.

    That need not be the first process, as a file may be missing on another machine. Without torchrun's store, which
    outlives its processes, each prints it.
    """
    if processes.count() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        import torch.distributed as dist

        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            *place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5)
        )
        # torchrun may start them once more
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"dualout/{attempt}/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    except (ImportError, KeyError, ValueError, RuntimeError):
        return True


def deserted(error: BaseException) -> bool:
    """Whether an error of torch says that another process, which this one waits for, has ended."""
    shared = processes.count() > 1
    return shared and isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _GONE)
