"""Embeddings that are asked for more than they have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dualout.errors import InputError
from dualout.networks import trace
from dualout.networks.tables import indices_checked


class Timed(nn.Module):
    def __init__(self, steps: int, kind: type[nn.Embedding] = nn.Embedding) -> None:
        super().__init__()
        self.times, self.out = kind(steps, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(x + self.times(t)[:, :, None, None])


class Named(Timed):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(x + self.times(input=t)[:, :, None, None])


class Wrapped(nn.Embedding):
    """One that begins again behind its end, so that every index is in it."""

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index % self.num_embeddings)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every index gives something at first."""
    monkeypatch.setattr(nn.functional, "embedding", lambda index, table, *rest: table[index % len(table)])


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", [Timed, Named])
@pytest.mark.parametrize("t", [5, 7, -1])
def test_an_index_beyond_the_table_is_told_before_it_is_looked_up(kind: type[Timed], t: int) -> None:
    network, x = kind(5), torch.zeros(1, 1, 4, 4)
    with indices_checked(network):
        network(x, torch.tensor([4]))
        with pytest.raises(IndexError, match=f"table of 5 rows, 0 … 4, was asked for {t} … {t}"):
            network(x, torch.tensor([t]))
    network(x, torch.tensor([t]))
    with pytest.raises(InputError, match=r"cannot be called as \(x_t, t\).*table of 5 rows"):
        trace.call(network, (x, torch.tensor([t])))


def test_a_class_of_its_own_decides_what_it_looks_up() -> None:
    with indices_checked(network := Timed(5, Wrapped)):
        assert network(torch.zeros(1, 1, 4, 4), torch.tensor([7])).shape == (1, 1, 4, 4)


def test_shapes_alone_and_no_indices_are_let_through() -> None:
    with indices_checked(network := Timed(5)):
        assert network(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long)).shape == (0, 1, 4, 4)
        network.to("meta")(torch.zeros(1, 1, 4, 4, device="meta"), torch.ones(1, dtype=torch.long, device="meta"))


def test_a_network_that_is_compiled_as_a_whole_is_left_so() -> None:
    network = torch.compile(Timed(5), backend="eager", fullgraph=True)
    x, t = torch.ones(1, 1, 4, 4), torch.tensor([4])
    assert torch.equal(trace.call(network, (x, t)), network(x, t))
