"""From one output to two: any trained diffusion model becomes a dual-output one, with a smaller error on the whole.

    before                       the gate is closed: the trained output alone is used, bit for bit
    closed form                  the new rows, by least squares, with the rest as it is (`dualout.training.readout`)
    fine-tuning                  of the new rows, the last block or everything, by `dualout.training.Run`
    after each                   the gate is opened where held-out images say so (`dualout.training.opening`)

What is written down is the best so far. It replaces what was there only when no time's error on the held-out images is
larger than the original's, by more than is tolerated.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dualout.denoiser import Denoiser
from dualout.errors import InputError, unknown
from dualout.networks.adapter import innermost
from dualout.networks.output import output_of
from dualout.networks.trace import Example, call, guess, has_variance, watching
from dualout.networks.wide import Wide, row_dim, rows_of
from dualout.networks.widen import widen
from dualout.parameterizations import Upgraded
from dualout.parameterizations.learned_variance import base_of, rebased
from dualout.parameterizations.upgraded import GateTable
from dualout.training.opening import table

SCOPES = ("closed", "rows", "last", "all")


def upgrade(denoiser: Denoiser, *, layer: str | None = None, example: Example | None = None) -> Denoiser:
    """A dual-output denoiser that samples exactly as a single-output one, bit for bit, until it is trained.

    Args:
        denoiser: that was trained to predict noise, clean images or velocity, perhaps with a learned variance; it is
            not changed.
        layer: the network's output layer, by name, where it cannot be found.
        example: arguments of one call of the network, (x_t, t) or (x_t, t, {name: condition}).

    Returns:
        a denoiser with the parameterization `Upgraded`, whose gate is closed, and a network of 2C + 1 output channels
        (3C + 1 with a learned variance). The new rows are zero.

    Raises:
        InputError: for a model that has two outputs already, or whose output layer cannot be found or widened.
    """
    if not isinstance(denoiser, Denoiser):
        raise InputError(
            f"upgrade takes a denoiser, a network with how it is read; got {type(denoiser).__name__}: say "
            "Denoiser(network, Epsilon(), schedule), or widen(network, channels) for a network alone"
        )
    parameterization, network = denoiser.parameterization, denoiser.network
    if not isinstance(network, nn.Module):
        raise InputError(f"only a torch.nn.Module has a layer that can be widened; got {network!r}")
    base = base_of(parameterization)
    if base.channels(3) != 3:
        raise InputError(f"a model of {base.spec} has two outputs already: it is trained on with dualout train --init")
    count = _channels(network, example)
    c, left = divmod(count, parameterization.channels(1))
    if has_variance(network, c, example):
        raise InputError(
            f"this {type(innermost(network)).__name__} gives {c} channels for images of {c // 2}, as networks that "
            f"learned a variance do: say Denoiser(network, LearnedVariance({parameterization!r}), schedule)"
        )
    if left:
        raise InputError(f"{parameterization.spec} has two outputs a channel, but the network has {count} in all")
    upgraded = Upgraded(base=base)
    first = c if upgraded.trained == "x0" else 0
    # [eps (C), x0 (C), logit (1)], and a learned variance after these
    places = [*range(first, first + c), *range(2 * c + 1, c + 1 + count)]
    read = rebased(parameterization, upgraded)
    wide = widen(network, read.channels(c), layer=layer, places=places, example=example)
    found = Denoiser(wide, read, denoiser.schedule).to(denoiser.times.device)
    found.card, found.training = copy.deepcopy(denoiser.card), denoiser.training
    return found


def upgraded_of(denoiser: Denoiser) -> Upgraded:
    """The parameterization of an upgraded denoiser, without a learned variance."""
    base = base_of(denoiser.parameterization)
    if not isinstance(base, Upgraded):
        raise InputError(
            f"this is not an upgraded model, but one of {denoiser.parameterization.spec}; upgrade(denoiser) makes one"
        )
    return base


def open_gate(denoiser: Denoiser, ratios: Sequence[float]) -> Denoiser:
    """The same network with its gate opened at these ratios, one a bin of t; weights are shared, not copied.

    A gate that would be closed everywhere is left closed, so that samples are the original's bit for bit.
    """
    own = upgraded_of(denoiser)
    if all(r == own.closed for r in ratios):
        return denoiser
    opened = rebased(denoiser.parameterization, replace(own, ratio="pixel"))
    found = Denoiser(denoiser.network, opened, denoiser.schedule).to(denoiser.times.device)
    gate_logits(found).copy_(table(ratios, denoiser.schedule.steps, own.closed))
    found.card, found.training = denoiser.card, denoiser.training
    return found


def gate_logits(denoiser: Denoiser) -> Tensor:
    """The table of an open gate, (T,)."""
    (found,) = (module for module in denoiser.modules() if isinstance(module, GateTable))
    return found.logits


def output_layer(network: nn.Module) -> str:
    """The name of the layer that `widen` widened last."""
    wide = [name for name, m in network.named_modules() if isinstance(m, Wide)]
    if not wide:
        raise InputError("this network has no widened layer")
    return wide[-1]


def new_rows(denoiser: Denoiser) -> list[int]:
    """The rows of the output layer that the upgrade added."""
    layer = denoiser.network.get_submodule(output_layer(denoiser.network))  # type: ignore[union-attr, arg-type]
    assert isinstance(layer, Wide)
    return sorted(layer.rows[-1])


def set_scope(denoiser: Denoiser, scope: str, example: Example) -> int:
    """Let only a part of an upgraded denoiser be trained; returns how many numbers that are.

    Args:
        denoiser: whose weights' `requires_grad` is set.
        scope: "rows": the rows that were added; "last": the last block and what follows it; "all".
        example: arguments of one call of the network, which shows the order of its layers.
    """
    if scope not in SCOPES[1:]:
        raise unknown("scope", scope, SCOPES)
    network = denoiser.network
    assert isinstance(network, nn.Module)
    name = output_layer(network)
    frozen = {n for n, p in network.named_parameters() if not p.requires_grad}
    network.requires_grad_(False)
    if scope == "rows":
        return _only_rows(network.get_submodule(name), new_rows(denoiser))
    chosen = [""] if scope == "all" else last_block(network, name, example)
    for n, p in network.named_parameters():
        # what the original kept fixed, such as a table of frequencies, stays so
        p.requires_grad_(n not in frozen and any(n.startswith(f"{c}." if c else "") for c in chosen))
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def last_block(network: nn.Module, layer: str, example: Example) -> list[str]:
    """The modules that are trained as the last block: the last numbered one to be run, and all that run after it.

    Args:
        network: the widened network.
        layer: its output layer.
        example: arguments of one call.
    """
    order: list[str] = []
    leaves = {n: m for n, m in network.named_modules() if m._parameters and n != layer}
    with watching(leaves, lambda name, _: order.append(name)):
        call(network, example)
    blocks = [_block(n) for n in order]
    last = next((b for b in reversed(blocks) if b is not None), None)
    if last is None:
        # nothing is numbered: the part of the network that ran last
        return [layer, *(order[-1].split(".")[:1] if order else [])]
    end = len(blocks) - 1 - blocks[::-1].index(last)
    return [last, *dict.fromkeys(order[end + 1 :]), layer]


def _block(name: str) -> str | None:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])


def _only_rows(layer: nn.Module, rows: list[int]) -> int:
    """Train some rows of a layer: the gradient of the others is zero, and Adam then leaves them as they are."""
    count, total = 0, rows_of(layer)
    for p in layer.parameters(recurse=False):
        p.requires_grad_(True)
        keep = torch.zeros(total, device=p.device)
        keep[rows] = 1
        # a bias has one side, that of the rows
        side = row_dim(layer) if p.ndim > 1 else 0
        keep = keep.view([-1 if d == side else 1 for d in range(p.ndim)])
        p.register_hook(lambda g, keep=keep: g * keep.to(g))
        count += p.numel() // total * len(rows)
    return count


def _channels(network: nn.Module, example: Example | None) -> int:
    """How many channels a network gives."""
    inner = innermost(network)
    output = output_of(inner)
    if output is not None:
        return output.channels(inner)
    if example is not None:
        return call(network, example).shape[1]
    try:
        return call(network, guess(inner, network)).shape[1]
    except InputError as error:
        raise InputError(f"{error}. How many channels it gives cannot be seen: say example=(x_t, t, {{…}})") from error
