"""Where networks are computed."""

from __future__ import annotations

import torch

from dualout.errors import InputError


def device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the accelerator of this machine, or else its processor.

    Raises:
        InputError: when there is no such device here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        asked = torch.device(name)
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = torch.accelerator.current_accelerator(check_available=True)
        raise InputError(
            f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}; this machine has cpu"
            + (f" and {here.type}" if here else "")
        ) from error
    return asked
