"""diffusers' networks by name: how each is called, and which layer makes its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Self

from torch import nn

from dualout.errors import InputError
from dualout.networks.adapter import Adapter, innermost
from dualout.networks.flowtime import FlowTime
from dualout.networks.keyword import Keyword
from dualout.networks.listed import Listed
from dualout.networks.output import Interleaved, Plain, named
from dualout.networks.scaled import ScaledTime
from dualout.networks.shaped import Unshaped
from dualout.networks.sides import ChannelsAt, Concatenated
from dualout.networks.sigma import SigmaConditioned
from dualout.networks.tokens import Tokens
from dualout.schedules import Schedule


@dataclass(frozen=True)
class Convention:
    """How a network of diffusers is called, and what it was trained to predict."""

    layout: Callable[[nn.Module], Adapter] = Keyword
    """Puts it behind the call (x_t, t, **conditions) with images (B, C, …)."""
    time: Callable[[Adapter, Schedule], Adapter] | None = None
    """Tells it the noise level of a schedule; None where it is told t."""
    predicts: str = "flow"
    """The parameterization that reads it, as most models of the class were trained."""
    concatenated: tuple[str, ...] = ()
    """Conditions that it always sees beside the noisy images."""


def _tokens(network: nn.Module, **options: Any) -> Adapter:
    return Tokens(Keyword(network), **options)


def _channels_at(network: nn.Module, side: int) -> Adapter:
    return ChannelsAt(Keyword(network), side)


def _listed(network: nn.Module) -> Adapter:
    return Listed(Keyword(network, "t"), ["cap_feats"])


def _unshaped(network: nn.Module) -> Adapter:
    return Unshaped(Keyword(network), "proj_out", innermost(network).config.patch_size)


def _told_floats(network: nn.Module) -> Adapter:
    return ScaledTime(Keyword(network), 1.0)


def _scaled_flow(network: Adapter, schedule: Schedule) -> Adapter:
    return FlowTime(network, schedule, 1000.0 * innermost(network).config.timestep_scale)


_FROM_ONE = partial(FlowTime, scale=1.0)
_FRAMES_FIRST = partial(_channels_at, side=2)

CONVENTIONS: dict[str, Convention] = {
    "AllegroTransformer3DModel": Convention(predicts="eps"),
    "AuraFlowTransformer2DModel": Convention(time=_FROM_ONE),
    "BriaTransformer2DModel": Convention(_tokens, FlowTime),
    "ChromaTransformer2DModel": Convention(_tokens, _FROM_ONE),
    "CogVideoXTransformer3DModel": Convention(_FRAMES_FIRST, predicts="velocity"),
    "CogView3PlusTransformer2DModel": Convention(predicts="velocity"),
    "ConsisIDTransformer3DModel": Convention(_FRAMES_FIRST, predicts="velocity", concatenated=("image_latents",)),
    "DiTTransformer2DModel": Convention(predicts="eps"),
    "EasyAnimateTransformer3DModel": Convention(_unshaped, FlowTime),
    "Flux2Transformer2DModel": Convention(partial(_tokens, patch=1, axes=4), _FROM_ONE),
    "FluxTransformer2DModel": Convention(_tokens, _FROM_ONE),
    "HunyuanDiT2DModel": Convention(_told_floats, predicts="velocity"),
    "HunyuanVideoTransformer3DModel": Convention(time=FlowTime),
    "Kandinsky5Transformer3DModel": Convention(partial(_channels_at, side=-1), FlowTime),
    "LTXVideoTransformer3DModel": Convention(partial(_tokens, patch=1, places="sizes"), FlowTime),
    "LatteTransformer3DModel": Convention(predicts="eps"),
    "Lumina2Transformer2DModel": Convention(time=partial(FlowTime, scale=1.0, backwards=True)),
    "MochiTransformer3DModel": Convention(time=partial(FlowTime, backwards=True)),
    "PRXTransformer2DModel": Convention(time=_FROM_ONE),
    "PixArtTransformer2DModel": Convention(predicts="eps"),
    "QwenImageTransformer2DModel": Convention(partial(_tokens, places="shapes"), _FROM_ONE),
    "SD3Transformer2DModel": Convention(time=FlowTime),
    "SanaTransformer2DModel": Convention(time=_scaled_flow),
    "SanaVideoTransformer3DModel": Convention(time=FlowTime),
    "SkyReelsV2Transformer3DModel": Convention(time=FlowTime),
    "UNet2DConditionModel": Convention(predicts="eps"),
    "UNet3DConditionModel": Convention(predicts="eps"),
    "UNetSpatioTemporalConditionModel": Convention(
        _FRAMES_FIRST, partial(SigmaConditioned, log=True), "velocity", ("image_latents",)
    ),
    "WanTransformer3DModel": Convention(time=FlowTime),
    "ZImageTransformer2DModel": Convention(_listed, partial(FlowTime, scale=1.0, backwards=True)),
}
"""By class. A network that is not here is put behind adapters by hand."""


def adapted(
    network: nn.Module, schedule: Schedule | None = None, *, concatenated: Sequence[str] | None = None
) -> Adapter:
    """A network of diffusers behind the call ``(x_t, t, **conditions)``, with images (B, C, H, W) or (B, C, F, H, W).

    ``Denoiser(adapted(flux, schedule), Flow(), schedule)`` is Flux; `widen` and `upgrade` take it as any other.
    Conditions have the names of the network's own arguments; tokens are packed here, and told where they lie.

    Args:
        network: of a class in `CONVENTIONS`.
        schedule: the denoiser's, for networks that are told the noise level instead of t: for those of rectified flow
            ``RectifiedFlow(shift=…)``.
        concatenated: conditions that the network sees beside the noisy images, as more channels, in this order; None is
            what the class always has: ``image_latents`` for Stable Video Diffusion.

    Raises:
        InputError: for another network, or where the schedule is missing.
    """
    inner = getattr(network, "_orig_mod", network)
    name, convention = type(inner).__name__, _known(inner)
    if convention is None:
        raise InputError(
            f"how a {name} is called is not known here: put it behind adapters of dualout.networks by hand, such as "
            f"FlowTime(ChannelsAt(Keyword(network), 2), schedule). Known of diffusers are {', '.join(CONVENTIONS)}"
        )
    if convention.time is not None and not isinstance(schedule, Schedule):
        given = "RectifiedFlow()" if convention.predicts == "flow" else "ScaledLinear()"
        raise InputError(
            f"a {name} is told the noise level: say adapted(network, schedule) with the denoiser's schedule, as "
            f"dualout.schedules.{given}; got {schedule!r}"
        )
    found = convention.layout(network)
    names = convention.concatenated if concatenated is None else concatenated
    found = Concatenated(found, names) if names else found
    return found if convention.time is None or schedule is None else convention.time(found, schedule)


def check_shaped(network: nn.Module, inner: nn.Module) -> None:
    """Refuse a network that shapes its output by its input's channels, unless that is done outside it.

    Args:
        network: what is called.
        inner: the network itself.

    Raises:
        InputError: for that.
    """
    convention = _known(inner)
    if convention and convention.layout is _unshaped and not any(isinstance(m, Unshaped) for m in network.modules()):
        raise InputError(f"this {type(inner).__name__} makes as many channels as it sees. {elsewhere(inner)}")


def elsewhere(network: nn.Module) -> str:
    """What to do with a network whose channels are not the second side of its output."""
    if _known(network) is not None:
        return f"A {type(network).__name__} is widened behind dualout.networks.adapted(network, schedule)"
    return (
        "A network whose output has its channels at another side is widened behind "
        "dualout.networks.ChannelsAt(network, side), one of packed tokens behind dualout.networks.Tokens(network)"
    )


def _known(network: nn.Module) -> Convention | None:
    # of a class of diffusers that derives from another, that one's says nothing: DreamLite's UNet is of rectified flow
    own = (cls for cls in type(network).__mro__ if named(cls) == f"diffusers.{cls.__name__}" and hasattr(cls, "config"))
    return next((CONVENTIONS.get(cls.__name__) for cls in own), None)


_LAYERS = {
    "DiTTransformer2DModel": "proj_out_2",
    "Kandinsky5Transformer3DModel": "out_layer.out_layer",
    "Lumina2Transformer2DModel": "norm_out.linear_2",
    "PRXTransformer2DModel": "final_layer.linear",
}
"""Output layers of transformers that call them otherwise than `proj_out`."""


def _volume(network: Any) -> int:
    """How many pixels a patch of this network has."""
    size = network.config.patch_size
    return (prod(size) if isinstance(size, Sequence) else size**2) * (network.config.get("patch_size_t") or 1)


def _found(network: Any) -> dict[str, Any]:
    """Its output layer, and how many rows of it a channel has."""
    layers = [_LAYERS[cls.__name__] for cls in type(network).__mro__ if cls.__name__ in _LAYERS]
    return {"layer": layers[0] if layers else "proj_out", "each": _volume(network)}


@dataclass(frozen=True, kw_only=True)
class Packed(Plain):
    """Tokens of 2×2 pixels; a pixel's channels are as many rows apart as a patch has pixels."""

    classes = (
        "diffusers.FluxTransformer2DModel",
        "diffusers.ChromaTransformer2DModel",
        "diffusers.BriaTransformer2DModel",
        "diffusers.QwenImageTransformer2DModel",
    )
    layer: str = "proj_out"
    each: int = 4

    def record(self, network: Any, channels: int) -> None:
        """QwenImage counts channels, the others the rows of a token."""
        super().record(network, channels * self.each // _volume(network))


@dataclass(frozen=True, kw_only=True)
class Blocks(Plain):
    """Transformers that end with a linear map to patches, a channel's pixels next to each other."""

    classes = (
        "diffusers.CogVideoXTransformer3DModel",
        "diffusers.ConsisIDTransformer3DModel",
        "diffusers.CogView3PlusTransformer2DModel",
        "diffusers.EasyAnimateTransformer3DModel",
        "diffusers.Flux2Transformer2DModel",
        "diffusers.HunyuanVideoTransformer3DModel",
        "diffusers.Kandinsky5Transformer3DModel",
        "diffusers.LTXVideoTransformer3DModel",
        "diffusers.PRXTransformer2DModel",
    )
    layer: str = "proj_out"

    @classmethod
    def of(cls, network: Any) -> Self:
        """By this network's patches."""
        return cls(**_found(network))


@dataclass(frozen=True, kw_only=True)
class Patches(Interleaved):
    """Transformers that end with a linear map to patches, a pixel's channels next to each other."""

    classes = (
        "diffusers.AllegroTransformer3DModel",
        "diffusers.AuraFlowTransformer2DModel",
        "diffusers.DiTTransformer2DModel",
        "diffusers.HunyuanDiT2DModel",
        "diffusers.LatteTransformer3DModel",
        "diffusers.Lumina2Transformer2DModel",
        "diffusers.MochiTransformer3DModel",
        "diffusers.PixArtTransformer2DModel",
        "diffusers.SD3Transformer2DModel",
        "diffusers.SanaTransformer2DModel",
        "diffusers.SanaVideoTransformer3DModel",
        "diffusers.SkyReelsV2Transformer3DModel",
        "diffusers.WanTransformer3DModel",
    )
    layer: str = "proj_out"

    @classmethod
    def of(cls, network: Any) -> Self:
        """By this network's patches."""
        return cls(**_found(network))


@dataclass(frozen=True, kw_only=True)
class Audio(Interleaved):
    """Transformers of sound end with a linear map, and a convolution that is added to its result."""

    classes = (
        "diffusers.MiniMaxMusic3Transformer1DModel",
        "diffusers.StableAudioDiTModel",
        "diffusers.StableAudio3DiTModel",
    )
    layer: str = "proj_out"
    past: tuple[str, ...] = ("postprocess_conv",)

    @classmethod
    def of(cls, network: Any) -> Self:
        """As many rows a channel as this network's patch has moments."""
        return cls(each=network.config.get("patch_size", 1))


@dataclass(frozen=True, kw_only=True)
class ZImage(Interleaved):
    """A last layer for each size of patches."""

    classes = ("diffusers.ZImageTransformer2DModel",)
    layer: str = ""

    @classmethod
    def of(cls, network: Any) -> Self:
        """That of the only size, or of the first, which `check` refuses."""
        size, frames = network.config.all_patch_size[0], network.config.all_f_patch_size[0]
        return cls(layer=f"all_final_layer.{size}-{frames}.linear", each=size**2 * frames)

    def check(self, network: Any) -> None:
        """Refuse networks of several sizes."""
        if len(network.config.all_patch_size) > 1:
            sizes = ", ".join(map(str, network.config.all_patch_size))
            raise InputError(
                f"this ZImageTransformer2DModel has a last layer for each of its sizes of patches, {sizes}, and one is "
                "widened: it cannot be"
            )
