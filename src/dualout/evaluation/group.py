"""The processes that torchrun started, sharing one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from dualout import processes
from dualout.errors import InputError
from dualout.evaluation.statistics import Statistics

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """So many processes, of which this is one.

    Attributes:
        rank: this one's number, counted from 0; the first alone writes results.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def here(cls) -> Iterator[Group]:
        """The group that this process was started in; without torchrun it is alone.

        Only features' sums and a few numbers are exchanged, through the processors, wherever networks are computed.
        """
        size = processes.count()
        if size == 1:
            yield cls()
            return
        dist.init_process_group("gloo", timeout=processes.PATIENCE)
        try:
            yield cls(dist.get_rank(), size)
        finally:
            dist.destroy_process_group()

    def share(self, count: int) -> range:
        """This process's part of 0 … count − 1: the parts follow one another, and differ by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do the same in every process, in the first before the others, who find in a cache what it has left there.

        Raises:
            InputError: in all, when it is raised in the first.
        """
        if self.size == 1:
            return work()
        if self.rank:
            if (wrong := self.agreed(None)) is not None:
                raise InputError(wrong)
            return work()
        try:
            done = work()
        except InputError as error:
            self.agreed(str(error))
            raise
        self.agreed(None)
        return done

    def agreed(self, value: T) -> T:
        """The first process's value, for all."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def merged(self, statistics: Statistics) -> Statistics:
        """Those of all processes in their order, in the first; in the others, their own.

        With the parts of `share` it is what one process would have gathered, sums to float64's rounding.
        """
        if self.size == 1:
            return statistics
        own = {name: v.cpu() for name, v in statistics.tensors().items()} if statistics.count else None
        found: list[Any] = [None] * self.size
        dist.gather_object(own, found if self.rank == 0 else None)
        if self.rank:
            return statistics
        whole = Statistics(statistics.limit)
        for tensors in found:
            if tensors is not None:
                whole.merge(Statistics.from_tensors(tensors))
        return whole
