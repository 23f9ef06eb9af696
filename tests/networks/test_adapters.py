"""Adapters: each network is called as it wants to be, and each adapter can be written down and rebuilt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout import checkpoint
from dualout.errors import InputError
from dualout.networks import Adapter, Positional, ScaledTime, SigmaConditioned, build
from dualout.networks.adapter import config_of, innermost


class Recorder(nn.Module):
    """Remembers how it was called."""

    def forward(self, *arguments: Any, **conditions: Any) -> Tensor:
        self.arguments, self.conditions = arguments, conditions
        return arguments[0]


@pytest.fixture
def x_t() -> Tensor:
    return torch.randn(3, 2, 4, 4)


T = torch.tensor([0, 500, 999])


def test_positional(x_t: Tensor) -> None:
    network = Recorder()
    labels, text = torch.arange(3), torch.randn(3, 5)
    adapter = Positional(network, ["class_labels", "text"])
    adapter(x_t, T, text=text, class_labels=labels)
    assert network.arguments[2] is labels
    assert network.arguments[3] is text
    assert network.conditions == {}
    with pytest.raises(InputError, match="takes the conditions class_labels, text; got class_labels"):
        adapter(x_t, T, class_labels=labels)
    with pytest.raises(InputError, match=r"takes the conditions \(none\); got class_labels"):
        Positional(network)(x_t, T, class_labels=labels)
    with pytest.raises(InputError, match=r"list of names, say \['y'\]"):
        Positional(network, "y")
    with pytest.raises(InputError, match=r"list of names, .*; got \[''\]"):
        Positional(network, [""])


def test_scaled_time(x_t: Tensor) -> None:
    network = Recorder()
    ScaledTime(network, scale=1 / 1000, shift=1 / 1000)(x_t.bfloat16(), T, y=3)
    t = network.arguments[1]
    assert t.dtype == torch.float32
    assert network.conditions == {"y": 3}
    torch.testing.assert_close(t, torch.tensor([0.001, 0.501, 1.0]))


@pytest.mark.parametrize(
    "schedule", [dualout.schedules.Linear(), dualout.schedules.EDM(), dualout.schedules.RectifiedFlow()]
)
def test_sigma(schedule: dualout.Schedule, x_t: Tensor) -> None:
    network = Recorder()
    level = schedule.level(T)
    SigmaConditioned(network, schedule)(x_t, T)
    torch.testing.assert_close(network.arguments[1], (level.sigma / level.alpha).float())
    assert network.arguments[0] is x_t
    SigmaConditioned(network, schedule, log=True, exploding=True)(x_t, T)
    torch.testing.assert_close(network.arguments[1], ((level.sigma / level.alpha).log() / 4).float())
    torch.testing.assert_close(network.arguments[0], x_t / level.alpha.float().view(-1, 1, 1, 1))


def test_a_network_of_sigma_is_the_same_belief_in_any_signal_scale() -> None:
    # the exact denoiser of N(0, s²) data, written as EDM does: a network of (x0 + σ·eps, σ), which knows no alpha
    s2 = 0.3

    def eps_of(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.view(-1, 1, 1, 1)
        return x * sigma / (s2 + sigma**2)

    schedule = dualout.schedules.Linear()
    network = SigmaConditioned(eps_of, schedule, exploding=True)
    denoiser = dualout.Denoiser(network, dualout.Epsilon(), schedule)
    x_t = torch.randn(3, 1, 4, 4)
    level = schedule.level(T).like(x_t)
    exact = level.alpha * s2 * x_t / (level.alpha**2 * s2 + level.sigma**2)
    torch.testing.assert_close(denoiser(x_t, T).x0, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "adapt",
    [
        lambda n: Positional(n, ["class_labels"]),
        lambda n: ScaledTime(n, 0.25, 3.0),
        lambda n: SigmaConditioned(n, dualout.schedules.Cosine(steps=50), log=True),
        lambda n: ScaledTime(SigmaConditioned(n, dualout.schedules.FromBetas([0.1, 0.2, 0.3]), exploding=True), 1.0),
    ],
    ids=["positional", "scaled", "sigma", "nested"],
)
def test_adapters_are_written_down_with_the_network_in_them(adapt: Any) -> None:
    adapter: Adapter = adapt(build("tiny", 1, 8, 1))
    described = checkpoint.describe(adapter)
    again = checkpoint.construct(described)
    assert checkpoint.describe(again) == described
    assert type(again) is type(adapter)
    again.load_state_dict(adapter.state_dict())
    for a, b in zip(adapter.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b)


def test_adapters_of_plain_callables_work_but_cannot_be_written_down(x_t: Tensor) -> None:
    adapter = ScaledTime(lambda x, t: x * t.view(-1, 1, 1, 1), 0.5)
    assert torch.equal(adapter(x_t, T), x_t * (T * 0.5).view(-1, 1, 1, 1))
    with pytest.raises(InputError, match="cannot be saved"):
        checkpoint.describe(adapter)
    with pytest.raises(InputError, match=r"class .*Recorder cannot be saved"):
        checkpoint.describe(ScaledTime(Recorder(), 0.5))
    with pytest.raises(InputError, match="adapts a network"):
        ScaledTime(3, 0.5)  # type: ignore[arg-type]


def test_tables_are_where_the_network_is() -> None:
    # the meta device stands for a GPU
    schedule = dualout.schedules.Linear()
    there = SigmaConditioned(nn.Conv2d(2, 2, 1, device="meta"), schedule)
    moved = SigmaConditioned(nn.Conv2d(2, 2, 1), schedule)
    assert not any(table.is_meta for table in moved.buffers())
    with torch.device("meta"):  # as after torch.set_default_device
        function = SigmaConditioned(lambda x, t: x, schedule)
    for adapter in (there, moved.to("meta"), function):
        assert list(adapter.buffers())
        assert all(table.is_meta for table in adapter.buffers())


def test_a_network_is_found_behind_adapters_and_what_compiles_it() -> None:
    network = build("tiny:width=8", 1, 8, 1, classes=3)
    for inside in (network, torch.compile(network)):
        adapter = Positional(ScaledTime(inside, 0.5), ["class_labels"])
        for outside in (adapter, torch.compile(adapter)):
            assert innermost(outside) is network
            assert config_of(outside)["num_class_embeds"] == 4
