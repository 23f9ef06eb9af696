"""Two processes of one command that share its work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def two(*arguments: str, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command of dualout as two processes, and wait for both.

    Args:
        arguments: of the command.
        torchrun: started by it, which is one more process that imports torch; or else as it starts them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = ["-m", "dualout", *arguments]
    if torchrun:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
        return subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=900)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        out, err = zip(*(process.communicate(timeout=900) for process in started), strict=True)
    finally:
        for process in started:
            process.kill()
    return subprocess.CompletedProcess(
        command, max(abs(process.returncode) for process in started), "".join(out), "".join(err)
    )
