"""More output channels for a network that has been trained: the upgrade to dual output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.networks.adapter import Adapter, innermost
from dualout.networks.device import double
from dualout.networks.diffusers import check_shaped, elsewhere
from dualout.networks.output import Output, Plain, named, output_of
from dualout.networks.trace import Example, call, folded, guess, has_variance, listed, trace
from dualout.networks.wide import KINDS, Wide, layers_of, partial, rows_of, wider
from dualout.registry import as_python

ROUNDING = 1e-2
"""How far the old channels may be from what they were on a GPU, whose libraries may take other kernels from call to
call, some of which round to 10 bits: the root mean square, of that of the channels. Those of a wrong layer are not as
near. The weights are the same, bit for bit, everywhere; on a processor so are the channels."""


def widen(
    network: nn.Module,
    channels: int,
    *,
    layer: str | None = None,
    places: Sequence[int] | None = None,
    init: Callable[[Tensor], Any] = nn.init.zeros_,
    example: Example | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Give a trained network more output channels; its old outputs are unchanged until it is trained: bit for bit on a
    processor, to `ROUNDING` on a GPU.

    ``Denoiser(widen(network, 2 * C + 1), Dual(), schedule).route("eps")`` samples exactly as the eps-network did.

    Args:
        network: a module. What torch.compile made of it is unwrapped; of an adapter of `dualout.networks`, the network
            inside is widened.
        channels: how many output channels it will have.
        layer: the name of the output layer; None looks up the architecture in `dualout.networks.output`, or else finds
            the layer by tracing a call.
        places: where the old channels go, by index; None is first, in order. An x0-network's would be C … 2C − 1.
        init: fills the new rows' weights in place, say `torch.nn.init.xavier_uniform_`; their biases are 0.
        example: arguments of one call, (x_t, t) or (x_t, t, {name: condition}), to trace and to check with. None is
            noise of 32×32 pixels, t = 1, and class 0 for every further argument that the network must be given.
        inplace: change the network itself instead of a copy.

    Returns:
        the widened network. Its output layer is a `dualout.networks.wide` layer, with the plain layer's weights; where
        that was frozen, as under a LoRA, so is this one, and its new rows learn after ``requires_grad_(True)``.

    Raises:
        InputError: when the layer cannot be found (the candidates are named) or widened.
    """
    network = _plain(network)
    check_shaped(network, innermost(network))
    channels = as_python(channels)
    if not isinstance(channels, int) or isinstance(channels, bool):
        raise InputError(f"channels is a whole number; got {channels!r}")
    if not inplace:
        network = _copied(network)
    inner = _innermost(network)
    _uncompile(inner)
    output, example = _output(network, inner, layer, example)
    output.check(inner)
    _check_present(inner, output.layer)
    before = None if example is None else call(network, example)
    count = output.channels(inner)
    if places is None and channels == count + 1 and has_variance(network, count, example):
        raise InputError(
            f"this {type(inner).__name__} has {count} output channels for images of {count // 2}, as networks of ε and "
            "a learned variance have: dualout.training.upgrade.upgrade(Denoiser(network, LearnedVariance(Epsilon()), "
            f"schedule)) gives those their second output. Where they are ε and x0, say places=range({count})"
        )
    if before is not None and before.shape[1:2] != (count,):
        raise InputError(
            f"layer {output.layer!r} makes {count} channels, and this {type(inner).__name__} gives an output of shape "
            f"{tuple(before.shape)}, whose second side are not those; {elsewhere(inner)}"
        )
    places = _places(range(count) if places is None else places, count, channels, inner)
    old = {name: inner.get_submodule(name) for name in (output.layer, *output.beside)}
    fills = {name: init if name == output.layer else nn.init.zeros_ for name in old}
    wide = {name: _wider(inner, output, name, channels, places, fill) for name, fill in fills.items()}
    for name in output.past:
        old[name] = inner.get_submodule(name)
        wide[name] = partial(old[name], channels, places)
    _replace(inner, output, wide, channels)
    if example is not None and before is not None and before.device.type != "meta":
        try:
            _verify(network, example, before, channels, places, output.layer, empty=init is nn.init.zeros_)
        except InputError:
            _replace(inner, output, old, count)
            if not as_before(call(network, example), before, before.device.type == "cpu"):
                raise InputError(
                    f"this {type(inner).__name__} gives something else each time that it is called with the same, so "
                    "that it cannot be seen whether widening keeps that: switch off what is random in it"
                ) from None
            raise
    return network


def _plain(network: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped; refuses what holds a network otherwise."""
    if isinstance(network, Denoiser):
        raise InputError("widen takes the network, not the denoiser around it: widen(denoiser.network, …)")
    network = getattr(network, "_orig_mod", network)
    if not isinstance(network, nn.Module):
        raise InputError(f"only a torch.nn.Module has a layer that can be widened; got {network!r}")
    kind = type(network).__name__
    if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputError(f"widen takes the network inside {kind}: widen(network.module, …)")
    if isinstance(getattr(network, "ema_model", None), nn.Module):
        # beside it is the network that it averages, which has to stay of the same shape
        raise InputError(f"widen takes the network inside {kind}: widen(network.ema_model, …)")
    if isinstance(network, torch.jit.ScriptModule):
        raise InputError(f"the layers of a {kind} cannot be exchanged: widen the module that it was compiled from")
    if {c.__name__ for c in type(network).__mro__} & {"FSDPModule", "FullyShardedDataParallel"}:
        raise InputError(f"this {kind} is sharded: widen the network first, and shard it then")
    lazy = next((n for n, p in network.named_parameters() if isinstance(p, nn.UninitializedParameter)), None)
    if lazy is not None:
        raise InputError(f"{lazy!r} of this {kind} is lazy, and has no shape yet: call the network once before")
    hooked = next((name for name, m in network.named_modules() if hasattr(m, "_diffusers_hook")), None)
    if hooked is not None:
        raise InputError(
            f"diffusers has put hooks into this {kind} ({hooked or 'itself'}), for layerwise casting, offloading or "
            "caching, which a new layer would not have: widen the network before these are enabled"
        )
    return network


def _callable(network: nn.Module, inner: nn.Module) -> Example | None:
    """A guessed example, if the network can be called with it."""
    try:
        example = guess(inner, network)
        call(network, example)
    except InputError:
        return None
    return None if example[0].device.type == "meta" else example


def _copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except (RuntimeError, TypeError) as error:
        normed = [name for name, module in network.named_modules() if "weight_g" in module._parameters]
        if normed:
            raise InputError(
                f"layers of this {type(network).__name__} are under weight_norm ({', '.join(normed[:4])}): "
                "torch.nn.utils.remove_weight_norm makes them plain"
            ) from error
        raise InputError(
            f"this {type(network).__name__} cannot be copied ({error}); widen(…, inplace=True) changes the network "
            "itself"
        ) from error


def _innermost(network: nn.Module) -> nn.Module:
    """The network itself, behind adapters."""
    while isinstance(network, Adapter):
        network.network = _plain(network.network)  # type: ignore[arg-type]
        network = network.network
    return network


def _uncompile(network: nn.Module) -> None:
    """Take parts of a network out of torch.compile's wrapping, which would go on calling the layers it was given."""
    while name := next((n for n, m in network.named_modules() if n and hasattr(m, "_orig_mod")), None):
        network.set_submodule(name, network.get_submodule(f"{name}._orig_mod"), strict=True)


def _output(
    network: nn.Module, inner: nn.Module, layer: str | None, example: Example | None
) -> tuple[Output, Example | None]:
    """The layer that makes the output, by its name, its architecture or a trace; and what to hold the result to, where
    the network can be called."""
    # as its name is without
    layer = layer and ".".join(part for part in layer.split(".") if part != "_orig_mod")
    output = output_of(inner)
    if layer is not None and (output is None or output.layer != layer):
        _check_present(inner, layer)
        example = _callable(network, inner) if example is None else example
        output = None if example is None else folded(network, inner, layer, example, call(network, example))
        return output or Plain(layer=layer), example
    if output is None:
        example = guess(inner, network) if example is None else example
        try:
            return trace(network, inner, example), example
        except InputError as error:
            # an adapter says already where they are
            raise InputError(f"{error}. {elsewhere(inner)}" if network is inner else str(error)) from error
    if example is None and named(type(inner)) not in output.classes:
        # one derived from the class may do more than that
        example = _callable(network, inner)
    return output, example


def _under_lora(network: nn.Module, layer: str) -> InputError:
    return InputError(
        f"layer {layer!r} of this {type(network).__name__} is under a LoRA or another adapter of PEFT, which is of its "
        "shape: merge that first, by network.merge_and_unload() in PEFT, or pipeline.fuse_lora() and "
        "pipeline.unload_lora_weights() in diffusers"
    )


def _check_present(network: nn.Module, layer: str) -> None:
    if f"{layer}.base_layer" in layers_of(network):
        raise _under_lora(network, layer)
    if layer not in layers_of(network):
        raise InputError(
            f"this {type(network).__name__} has no convolution or linear layer {layer!r}; its last layers are (with "
            f"their rows) {listed(network)}"
        )


def _places(places: Sequence[int], count: int, channels: int, network: nn.Module) -> list[int]:
    if channels < count:
        raise InputError(
            f"this {type(network).__name__} has {count} output channels, and widening takes none away; got {channels}"
        )
    if len(places) != count or len(set(places)) != count or not set(places) <= set(range(channels)):
        raise InputError(
            f"places are {count} different numbers from 0 to {channels - 1}, one an old channel; got {list(places)}"
        )
    return list(places)


def _wider(
    network: nn.Module, output: Output, name: str, channels: int, places: list[int], init: Callable[[Tensor], Any]
) -> nn.Module:
    layer = network.get_submodule(name)
    _check_layer(network, layer, name, output)
    count = len(places)
    each, left = divmod(rows_of(layer), count)
    if left:
        raise InputError(f"layer {name!r} has {rows_of(layer)} rows, which {count} channels do not divide")
    # row old[c, j] becomes new[places[c], j]
    old, new = output.rows(count, each), output.rows(channels, each)[places]
    moved = new.flatten()[old.flatten().argsort()]
    return wider(layer, channels * each, moved.tolist(), init)


def _check_layer(network: nn.Module, layer: nn.Module, name: str, output: Output) -> None:
    """Refuse layers whose rows are not simply their weights' own."""
    reason = None
    if parametrize.is_parametrized(layer):
        parameters = ", ".join(layer.parametrizations)  # type: ignore[arg-type]
        reason = f"its {parameters} is parametrized: torch.nn.utils.parametrize.remove_parametrizations makes it plain"
    elif {"weight_g", "weight_orig"} & layer._parameters.keys():
        norm = "weight_norm" if "weight_g" in layer._parameters else "spectral_norm"
        reason = f"it is under {norm}: torch.nn.utils.remove_{norm} makes it plain"
    elif type(layer) not in KINDS and not isinstance(layer, Wide) and named(type(layer)) not in output.same:
        reason = f"a {type(layer).__name__} is none of {', '.join(kind.__name__ for kind in KINDS)}"
    elif name.endswith(".base_layer"):
        raise _under_lora(network, name.removesuffix(".base_layer"))
    elif getattr(layer, "groups", 1) != 1:
        reason = f"its rows are in {layer.groups} groups, each of which sees a part of the input only"
    elif layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
        reason = "it has forward hooks, which would be lost: remove them first"
    elif "forward" in vars(layer):
        reason = "its forward was exchanged, which would be lost: put the class's own back first"
    else:
        for kind, own in layer.named_parameters(recurse=False):
            names = [n for n, p in network.named_parameters(remove_duplicate=False) if p is own]
            if len(names) > 1:
                reason = f"its {kind} is shared, as {' and '.join(names)}: what has another shape cannot be tied"
            elif not own.is_floating_point() or type(own.data) is not Tensor:
                reason = (
                    f"its {kind} is a {type(own.data).__name__} of {own.dtype}: widen before quantizing or sharding"
                )
    if reason:
        raise InputError(f"layer {name!r} of this {type(network).__name__} cannot be widened: {reason}")


def _replace(network: nn.Module, output: Output, layers: dict[str, nn.Module], channels: int) -> None:
    if not output.layer:
        raise InputError("the network is a single layer, which cannot be replaced in itself: put it in nn.Sequential")
    for name, layer in layers.items():
        network.set_submodule(name, layer, strict=True)
    output.record(network, channels)


def as_before(after: Tensor, before: Tensor, exact: bool) -> bool:
    """Whether channels are what they were: bit for bit, or to `ROUNDING`."""
    if exact:
        return torch.equal(after, before)
    difference = double(after - before).square().mean().sqrt()
    return bool(difference <= ROUNDING * double(before).square().mean().sqrt())


def _verify(
    network: nn.Module,
    example: Example,
    before: Tensor,
    channels: int,
    places: list[int],
    layer: str,
    *,
    empty: bool,
) -> None:
    """Hold the promise to an example: as many channels, the old ones as before, and nothing in those of empty rows."""
    try:
        after = call(network, example)
    except InputError as error:
        raise InputError(
            f"what comes after that layer, {layer!r}, depends on its number of rows, as a norm, a sum with the "
            "input or a fixed count of channels does: widen the part of the network that ends with it, and do the rest "
            f"around that; {error}"
        ) from error
    shape, exact = (*before.shape[:1], channels, *before.shape[2:]), before.device.type == "cpu"
    if after.shape != shape or not as_before(after[:, places], before, exact):
        raise InputError(
            f"widening that layer, {layer!r}, does not give this {type(network).__name__} {channels} output channels "
            f"of which {places} are as before: what comes after the layer depends on their number. Output of shape "
            f"{tuple(before.shape)} became {tuple(after.shape)}"
        )
    new = after.movedim(1, 0)[sorted(set(range(channels)) - set(places))].flatten(1)
    if empty and (new != new[:, :1]).any():
        raise InputError(
            f"what comes after layer {layer!r} is added to the new channels too, whose rows are zero, as a sum of one "
            "channel with the input is: widen the part of the network that ends with it, and do the rest around that"
        )
