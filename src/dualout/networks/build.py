"""From a name to a network."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from dualout import checkpoint
from dualout.errors import InputError
from dualout.networks.backbones import Backbone
from dualout.registry import as_python


def build(
    network: str | dict[str, Any] | Backbone,
    image_channels: int,
    size: int | tuple[int, int],
    out_channels: int,
    classes: int | None = None,
) -> nn.Module:
    """Build a network for images, with fresh weights.

    Args:
        network: a backbone's name, perhaps with options (``small``, ``small:width=48:dropout=0.1``); its fields
            ``{"name": …}``; or any class that a checkpoint may name, ``{"class": "diffusers.UNet2DModel", "arguments":
            {…}}``, where channels, size and classes are filled in.
        image_channels: C.
        size: height and width in pixels, or the side of a square.
        out_channels: `Parameterization.channels(C)`.
        classes: how many classes it is conditioned on (``class_labels``), or None. Index `classes`, the last, stands
            for "no class" (classifier-free guidance).

    Raises:
        InputError: for unknown names and options, and for images that do not fit.
    """
    size, image_channels, out_channels, classes = map(as_python, (size, image_channels, out_channels, classes))
    height, width = (size, size) if isinstance(size, int) else size
    counts = {"image_channels": image_channels, "height": height, "width": width, "out_channels": out_channels}
    for name, value in (counts | ({} if classes is None else {"classes": classes})).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is a whole number, 1 or more; got {value!r}")
    if isinstance(network, dict) and "class" in network:
        return checkpoint.construct(_filled(network, image_channels, (height, width), out_channels, classes))
    if isinstance(network, str):
        network = Backbone.parse(network)
    elif isinstance(network, dict):
        network = Backbone.from_config(network)
    if not isinstance(network, Backbone):
        raise InputError(f"a network is a name, or {{'class': …, 'arguments': {{…}}}}; got {network!r}")
    return checkpoint.construct(network.description(image_channels, (height, width), out_channels, classes))


def _filled(
    description: dict[str, Any], image_channels: int, size: tuple[int, int], out_channels: int, classes: int | None
) -> dict[str, Any]:
    """A description with what follows from the images put in; an adapter's inner network is filled instead."""
    arguments = dict(description.get("arguments") or {})
    inner = arguments.get("network")
    if isinstance(inner, dict):
        arguments["network"] = _filled(inner, image_channels, size, out_channels, classes)
        return description | {"arguments": arguments}
    known = inspect.signature(checkpoint.allowed(str(description.get("class"))).__init__).parameters
    if "sample_size" in known:
        arguments.setdefault("sample_size", size[0] if size[0] == size[1] else list(size))
    wanted = {"in_channels": image_channels, "out_channels": out_channels}
    if classes is not None:
        if "num_class_embeds" not in known:
            raise InputError(f"{description['class']} takes no num_class_embeds: it cannot be told classes")
        wanted["num_class_embeds"] = classes + 1
    for name, value in wanted.items():
        if name in known and arguments.setdefault(name, value) != value:
            raise InputError(
                f"the network's {name} is {arguments[name]!r}, but {value} is needed here; leave it out to have it "
                "filled in"
            )
    return description | {"arguments": arguments}
