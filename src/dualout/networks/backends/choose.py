"""Which backend computes a network: the one asked for, or for "auto" the one that measures fastest.

What another backend gives is compared with eager float32 before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualout.denoiser import tensor_of
from dualout.errors import InputError, unknown
from dualout.networks.backends.base import Backend, Call
from dualout.networks.device import seconds
from dualout.networks.precision import Precision
from dualout.samplers import Sampler
from dualout.samplers.base import Denoises

AUTO = "auto"
EAGER = "eager"
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.01}
"""How far a network's output may be from that of eager float32, by number format: the root mean square of the
difference, of that of the output. bfloat16 rounds every product to 2⁻⁹, float16 to 2⁻¹²; what is left of it after a
whole network is about ten times that."""
GAIN = 0.25
"""The share of the time that a backend can hope to save; it is not prepared where that would cost more."""
REPEATS = 3


class Chosen(NamedTuple):
    """A network, ready to be called."""

    network: nn.Module
    record: dict[str, Any]
    """Which backend, why, and how far it is from eager float32: plain JSON values."""


def check(name: str, precision: Precision) -> None:
    """Refuse a backend that does not exist or cannot compute here, before any work.

    Raises:
        InputError: with what to do.
    """
    if name != AUTO:
        _named(name).check(precision)


@torch.no_grad()
def choose(name: str, network: nn.Module, calls: Sequence[Call], precision: Precision, count: int) -> Chosen:
    """Prepare a network.

    Args:
        name: of a backend, or "auto".
        network: what computes, in evaluation mode, on its device.
        calls: examples of what it will be called with, all of the same shapes; the backends are compared on them.
        precision: of the network.
        count: how many calls are to come.

    Raises:
        InputError: when the backend cannot compute the network, or differs from eager float32 by more than `TOLERANCE`.
    """
    expected = [] if name == EAGER else [_call(network, call) for call in calls]
    if name != AUTO:
        backend = _named(name)
        prepared, record = _prepared(backend, network, calls, precision, expected)
        return Chosen(prepared, {"backend": backend.name, "why": "as asked"} | record)
    return _fastest(network, calls, precision, count, expected)


@torch.no_grad()
def fuse(
    name: str, denoiser: Denoises, sampler: Sampler, noise: Tensor, conditions: dict[str, Any], steps: int
) -> tuple[Callable[..., Tensor] | None, str]:
    """The rest of a sampler's steps, as the backend that computes the network does it; and who does it, or why not.

    Arguments are those of `Backend.fuse`.
    """
    try:
        fused = _named(name).fuse(denoiser, sampler, noise, conditions, steps)
    except InputError as error:
        return None, f"eager: {error}"
    return fused, "eager" if fused is None else name


def _named(name: str) -> Backend:
    kinds = Backend.kinds()
    if name not in kinds:
        raise unknown("backend", name, [AUTO, *kinds])
    return kinds[name]()


def _fastest(
    network: nn.Module, calls: Sequence[Call], precision: Precision, count: int, expected: Sequence[Tensor]
) -> Chosen:
    """The backend with which `count` calls end first, what preparing it takes included."""
    best, record = _prepared(_named(EAGER), network, calls, precision, expected)
    seconds = {EAGER: _seconds(best, calls[0], precision)}
    name, refused = EAGER, {}
    for other in sorted((kind() for kind in Backend.kinds().values()), key=lambda backend: backend.seconds):
        left = count * seconds[name]
        if other.name == EAGER:
            continue
        if other.seconds > GAIN * left:
            refused[other.name] = f"preparing it takes about {other.seconds:.0f} s, and all there is to do {left:.1f} s"
            continue
        try:
            other.check(precision)
            prepared, found = _prepared(other, network, calls, precision, expected)
        except InputError as error:
            refused[other.name] = str(error)
            continue
        seconds[other.name] = _seconds(prepared, calls[0], precision)
        if seconds[other.name] < seconds[name]:
            name, best, record = other.name, prepared, found
    measured = {key: round(1000 * value, 3) for key, value in seconds.items()}
    why = {"why": "the fastest, measured", "ms a call": measured, "calls": count, "not tried": refused}
    return Chosen(best, {"backend": name} | why | record)


def _prepared(
    backend: Backend, network: nn.Module, calls: Sequence[Call], precision: Precision, expected: Sequence[Tensor]
) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and how far it is from eager float32; eager itself is not compared.

    Raises:
        InputError: when that is too far.
    """
    prepared = backend.prepare(network, calls[0], precision)
    if backend.name == EAGER:
        return prepared, {}
    with precision.autocast():
        found = [_call(prepared, call) for call in calls]
    worst = max(_difference(a, b) for a, b in zip(found, expected, strict=True))
    limit = TOLERANCE[precision.name]
    # written so that NaN is refused, too
    if not worst <= limit:
        raise InputError(
            f"--backend {backend.name} in {precision.name} differs from eager fp32 by {worst:.2g} of this network's "
            f"output, and {limit:g} is allowed: take --precision fp32 --backend eager"
        )
    return prepared, {"difference": float(f"{worst:.2g}"), "tolerance": limit}


def _difference(found: Tensor, expected: Tensor) -> float:
    difference = (found.float() - expected.float()).square().mean().sqrt()
    return float(difference / expected.float().square().mean().sqrt().clamp(min=1e-12))


def _call(network: nn.Module, call: Call) -> Tensor:
    return tensor_of(network(call.x, call.t, **call.conditions))


def _seconds(network: nn.Module, call: Call, precision: Precision) -> float:
    """The quickest of a few calls: what else the machine does is not of the network."""
    return min(_one(network, call, precision) for _ in range(REPEATS))


def _one(network: nn.Module, call: Call, precision: Precision) -> float:
    def look() -> None:
        with precision.autocast():
            _call(network, call)

    return seconds(look, call.x.device)
