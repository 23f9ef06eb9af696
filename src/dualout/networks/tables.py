"""Embeddings whose tables end before the indices that they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def indices_checked(network: nn.Module) -> Iterator[None]:
    """Meanwhile an index beyond an embedding's table is an IndexError wherever it is looked up.

    By itself a GPU notices it later, in an operation that has nothing to do with it, and computes nothing from then on.
    """
    # a class of its own may look up something else than it is given, as positions of words
    tables = [m for m in network.modules() if isinstance(m, nn.Embedding) and type(m).forward is nn.Embedding.forward]
    handles = [table.register_forward_pre_hook(_check, with_kwargs=True) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(table: nn.Embedding, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    (index,) = arguments or named.values()
    # what is being traced has no values yet
    if torch.compiler.is_compiling() or index.is_meta or not index.numel():
        return
    low, high = map(int, index.aminmax())
    if low < 0 or high >= table.num_embeddings:
        raise IndexError(
            f"its table of {table.num_embeddings} rows, 0 … {table.num_embeddings - 1}, was asked for {low} … {high}"
        )
