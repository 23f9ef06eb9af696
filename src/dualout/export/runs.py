"""Tables of few values, such as an upgrade's ratio over t, as JSON: a pipeline's configuration is printed with it."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dualout.errors import InputError

_RUNS = "runs"


def shortened(values: Tensor) -> Any:
    """Numbers as nested lists; of one dimension as {"runs": [[how often, number], …]} where that is shorter."""
    listed: list[Any] = values.tolist()
    if values.ndim != 1:
        return listed
    runs = [[len(list(same)), value] for value, same in groupby(listed)]
    return {_RUNS: runs} if 2 * len(runs) < len(listed) else listed


def restored(written: Any, most: int) -> Tensor:
    """What `shortened` made of up to `most` numbers.

    Raises:
        InputError: for something else.
    """
    try:
        if not isinstance(written, dict):
            return torch.tensor(written)
        counts, values = zip(*written[_RUNS], strict=True)
        if min(counts) < 1 or sum(counts) > most:
            raise ValueError(f"{sum(counts)} numbers in place of {most}")
        return torch.tensor(values).repeat_interleave(torch.tensor(counts))
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"a table of numbers is damaged: {error}") from error
