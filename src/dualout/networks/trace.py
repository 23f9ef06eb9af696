"""Finding layers by watching the network work: the one that makes its output channels, and the one deepest inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dualout.denoiser import tensor_of
from dualout.errors import InputError
from dualout.networks.adapter import Adapter, config_of, innermost
from dualout.networks.output import Interleaved, Output, Plain
from dualout.networks.positional import Positional
from dualout.networks.tables import indices_checked
from dualout.networks.wide import layers_of, rows_of

Example = Sequence[Any]
"""The arguments of one call: (x_t, t), or (x_t, t, {name: condition})."""

_LAST = 3
"""How many of the layers that are run last are tried for an output that is rearranged."""
_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def listed(network: nn.Module, names: Sequence[str] | None = None, most: int = 8) -> str:
    """Layers in words: these, or the last that there are."""
    layers = layers_of(network)
    names = list(layers)[-most:] if names is None else names
    return ", ".join(f"{n or '(the network itself)'} ({type(layers[n]).__name__}, {rows_of(layers[n])})" for n in names)


def trace(network: nn.Module, inner: nn.Module, example: Example) -> Output:
    """The layer in `inner` whose rows are the output's channels, and how they lie in it.

    It is the layer whose result is the output itself; or else the only one with as many rows as the output has
    channels of which the first and the last move the output's first and last channel and no other; or else one of the
    last to be run, whose result is rearranged into the output (patches, a pixel shuffle).

    Args:
        network: what is called, as (x_t, t, **conditions).
        inner: the network itself, where `network` is an adapter of it.
        example: arguments to call it with.

    Raises:
        InputError: when there is no such layer, or more than one; the candidates are named.
    """
    calls: dict[str, list[Tensor]] = {}

    def note(name: str, y: Tensor) -> None:
        calls.setdefault(name, []).append(y)

    try:
        with watched(inner, note):
            output = call(network, example)
    except InputError as error:
        raise InputError(
            f"{error}. So which layer makes the output cannot be seen: say layer=NAME, or example=(x_t, t, {{…}}). "
            f"The last layers are (with their rows) {listed(inner)}"
        ) from error
    channels, layers = output.shape[1], layers_of(inner)
    once = [name for name, ys in calls.items() if len(ys) == 1]
    fitting = [name for name in once if rows_of(layers[name]) == channels]
    found = [name for name in fitting if calls[name][0] is output]
    shown = output.device.type != "meta"
    found = found or [name for name in fitting if shown and _leads(network, inner, name, example, output)]
    # the parts of a LoRA lead there as the layer does that they are put around
    found = [name for name in found if name.endswith(".base_layer")] or found
    if len(found) == 1:
        return Plain(layer=found[0])
    if found:
        raise InputError(
            f"more than one layer of this {type(inner).__name__} could make its {channels} output channels: "
            f"{listed(inner, found)}. Say which: layer=NAME"
        )
    for name in once[: -_LAST - 1 : -1] if shown else ():
        if (made := folded(network, inner, name, example, output)) is not None:
            return made
    last = _last(network, inner, example)
    raise InputError(
        f"no layer of this {type(inner).__name__} makes just its {channels} output channels, one row a channel. "
        + (f"Its output is what {last} gives. " if last else "")
        + f"The last layers are (with their rows) {listed(inner)}; say layer=NAME, or give the architecture a class in "
        "dualout.networks.output that tells how channels lie in its rows"
    )


def folded(network: nn.Module, inner: nn.Module, name: str, example: Example, output: Tensor) -> Output | None:
    """How a layer's rows lie in the output, where that is its result rearranged: several rows a channel.

    The result is replaced by each row's number, and the output then tells which rows each channel is made of.

    Args:
        network: what is called.
        inner: the network itself.
        name: the layer's, in `inner`.
        example: arguments to call it with.
        output: what it gives for them.

    Returns:
        None where more is done to the result, or channels lie in no known order.
    """
    layer, channels = layers_of(inner)[name], output.shape[1]
    count = rows_of(layer)
    each, left = divmod(count, channels)
    if left or not each:
        return None

    def numbered(at: str, y: Tensor) -> Tensor | None:
        if at != name:
            return None
        dim = y.ndim - 1 if isinstance(layer, nn.Linear) else 1
        numbers = torch.arange(count, dtype=torch.float32, device=y.device)
        return numbers.view(-1, *[1] * (y.ndim - 1 - dim)).expand_as(y).clone()

    try:
        with watched(inner, numbered):
            seen = call(network, example)
    except InputError:
        return None
    if seen.shape != output.shape:
        return None
    # an adapter may change the sign
    sets = [tuple(channel.abs().unique().tolist()) for channel in seen.movedim(1, 0)]
    for kind in (Plain, Interleaved):
        made = kind(layer=name, each=each)
        if sets == [tuple(float(row) for row in rows) for rows in made.rows(channels, each).tolist()]:
            return made
    return None


def _last(network: nn.Module, inner: nn.Module, example: Example) -> str:
    """In words, the part of a network, without parts of its own, whose result is the output."""
    results: list[tuple[str, Any]] = []
    parts = {n: m for n, m in inner.named_modules() if n and not isinstance(m, nn.Identity) and not list(m.children())}
    with watching(parts, lambda name, y: results.append((name, y))):
        output = call(network, example)
    return next((f"{n!r} ({type(parts[n]).__name__})" for n, y in reversed(results) if y is output), "")


@torch.no_grad()
def deepest(network: nn.Module, images: Tensor, look: Callable[[], object]) -> str | None:
    """The name of the largest module that gives the fewest positions; of several alike, the middle one.

    In a UNet that is one of the blocks at its lowest resolution, in a transformer the middle block. What gives as many
    positions as the image has is left out: it may be the output itself.

    Args:
        network: the network.
        images: what it looks at, (B, C, H, W).
        look: calls it.

    Returns:
        None for a network that nowhere has fewer positions than the image.
    """
    calls: dict[str, list[Any]] = {}
    named = {name: module for name, module in network.named_modules() if name}
    with watching(named, lambda name, y: calls.setdefault(name, []).append(first(y))):
        look()
    places = {name: _positions(ys[0], images) for name, ys in calls.items() if len(ys) == 1}
    few = min((n for n in places.values() if 1 < n < prod(images.shape[2:])), default=None)
    sizes = {name: sum(p.numel() for p in named[name].parameters()) for name, n in places.items() if n == few}
    largest = [name for name, size in sizes.items() if size == max(sizes.values())]
    return largest[len(largest) // 2] if largest and few is not None else None


def first(y: Any) -> Any:
    """What a module gives, or the first of it where it gives several."""
    return y[0] if isinstance(y, tuple | list) and y else y


def _positions(y: Any, images: Tensor) -> int:
    """How many places of the image something has features of: pixels of a map, or tokens; 0 for anything else."""
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(images):
        return 0
    if y.ndim == images.ndim:
        return prod(y.shape[2:])
    return y.shape[1] if y.ndim == 3 else 0


def guess(network: nn.Module, called: nn.Module | None = None) -> Example:
    """A noisy image and a time step for a network: 32×32 pixels, with as many channels as its first layer takes.

    What else it cannot be called without is taken for classes, and is 0.

    Args:
        network: the network itself.
        called: an adapter of it, if there is one.

    Raises:
        InputError: when it has no layer.
    """
    layers = layers_of(network)
    convolution = next((m for m in layers.values() if not isinstance(m, nn.Linear)), None)
    first = convolution or next(iter(layers.values()), None)
    if first is None:
        raise InputError(f"this {type(network).__name__} has no convolution and no linear layer to widen")
    weight = first.weight
    assert isinstance(weight, Tensor)
    channels = getattr(first, "in_channels", None) or getattr(first, "in_features", 1)
    shape = (1, channels, *[32] * (weight.ndim - 2))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cpu").to(weight.device, weight.dtype)
    # not t = 0: networks that are told a noise level may take its logarithm
    t = torch.ones(1, dtype=torch.long, device=weight.device)
    further = _further(network if called is None else called)
    return (x, t, dict.fromkeys(further, torch.zeros_like(t))) if further else (x, t)


def has_variance(network: nn.Module, count: int, example: Example | None = None) -> bool:
    """Whether so many output channels are one output and a learned variance: twice those of the images.

    Where there is no example, a network's configuration says how many these have, or else its first layer.
    """
    if example is not None:
        return count == 2 * example[0].shape[1]
    takes = config_of(network).get("in_channels") or guess(innermost(network), network)[0].shape[1]
    return count == 2 * takes


def _further(network: nn.Module) -> list[str]:
    """The arguments after x_t and t that a network cannot be called without."""
    if isinstance(network, Positional):
        return network.conditions
    if isinstance(network, Adapter):
        return []
    try:
        arguments = list(inspect.signature(network.forward).parameters.values())[2:]
    except (TypeError, ValueError):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [a.name for a in arguments if a.kind in named and a.default is a.empty]


@torch.no_grad()
def call(network: nn.Module, example: Example) -> Tensor:
    """The network's output for an example, in the network's precision, with dropout and the like off.

    Raises:
        InputError: when it cannot be called so, or gives something else than a tensor of channels, or NaN.
    """
    if (
        isinstance(example, Tensor)
        or len(example) not in (2, 3)
        or not isinstance(example[0], Tensor)
        or not all(isinstance(c, Mapping) for c in example[2:])
    ):
        raise InputError("an example is (x_t, t) or (x_t, t, {name: condition})")
    x_t, t, *rest = example
    dtype = next((p.dtype for p in network.parameters() if p.dtype in _COMPUTED), x_t.dtype)
    if x_t.is_floating_point() and x_t.dtype != dtype:
        x_t = x_t.to(dtype)
    try:
        with evaluating(network), indices_checked(network):
            output = network(x_t, t, **(rest[0] if rest else {}))
    except Exception as error:  # networks raise whatever unfit arguments lead them to
        named = "".join(f", {name}" for name in (rest[0] if rest else {}))
        raise InputError(
            f"this {type(network).__name__} cannot be called as (x_t, t{named}) with x_t of shape {tuple(x_t.shape)}: "
            f"{str(error) or type(error).__name__}"
        ) from error
    tensor = tensor_of(output)
    if tensor.ndim < 2:
        raise InputError(
            f"this {type(network).__name__} gives a tensor of shape {tuple(tensor.shape)}, which has no channels. A "
            "wrapper that computes the loss is left out: widen(wrapper.model, …)"
        )
    if tensor.device.type != "meta" and tensor.isnan().any():
        raise InputError(
            f"this {type(network).__name__} gives NaN for x_t of shape {tuple(x_t.shape)} and t = {t.tolist()}, where "
            "nothing can be seen; say example=(x_t, t) with others"
        )
    return tensor


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Dropout and the like are off meanwhile; every part then has the mode that it had."""
    modes = {m: m.training for m in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def watching(modules: Mapping[str, nn.Module], note: Any) -> Iterator[None]:
    """Call ``note(name, y)`` with what each of these modules gives; a tensor that `note` returns takes its place."""
    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(lambda _, __, y, name=name: note(name, y)))
        yield


@contextmanager
def watched(network: nn.Module, note: Any) -> Iterator[None]:
    """Call ``note(name, y)`` with what each layer gives; a tensor that `note` returns takes the place of y."""
    with watching(layers_of(network), note):
        yield


def _leads(network: nn.Module, inner: nn.Module, name: str, example: Example, output: Tensor) -> bool:
    """Whether a layer's first and last row move the output's first and last channel, and no other."""
    layer = layers_of(inner)[name]
    last = rows_of(layer) - 1

    def moved(row: int) -> list[int]:
        def push(at: str, y: Tensor) -> Tensor | None:
            if at != name:
                return None
            y = y.clone()
            y.select(-1 if isinstance(layer, nn.Linear) else 1, row).add_(1)
            return y

        with watched(inner, push):
            there = call(network, example)
        return (there != output).transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()

    return moved(0) == [0] and moved(last) == [last]
