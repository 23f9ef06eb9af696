"""Networks that cannot be widened are refused by name, with what to do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout.errors import InputError
from dualout.networks import Keyword, ScaledTime, build, widen
from dualout.networks.widen import as_before
from widened import Plain, same_first


def test_ambiguous_and_unknown_layers_are_listed() -> None:
    class Two(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv2d(12, 2, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h) + self.other(h)

    with pytest.raises(InputError, match=r"more than one layer.*last \(Conv2d, 2\), other \(Conv2d, 2\).*layer=NAME"):
        widen(Two(), 5)
    with pytest.raises(InputError, match=r"no convolution or linear layer 'lost'.*last \(Conv2d, 2\)"):
        widen(Plain(), 5, layer="lost")
    with pytest.raises(InputError, match=r"no layer of this Plain makes just its 8 .*last \(Conv2d, 2\)"):
        widen(Plain(tail=nn.PixelUnshuffle(2)), 17)
    with pytest.raises(InputError, match="no convolution and no linear layer"):
        widen(nn.ReLU(), 3)


def test_what_follows_the_layer_must_take_more_channels() -> None:
    class Residual(Plain):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x + super().forward(x, t)

    network = Residual()
    with pytest.raises(InputError, match="what comes after that layer, 'last', depends on its number of rows"):
        widen(network, 5, inplace=True)
    assert type(network.last) is nn.Conv2d
    with pytest.raises(InputError, match="depends on their number"):
        widen(Plain(tail=nn.Softmax(dim=1)), 5, layer="last", example=(torch.randn(1, 2, 8, 8), torch.zeros(1)))

    # where an image has one channel, nothing fails: the sum goes to all channels
    with pytest.raises(InputError, match="after layer 'last' is added to the new channels too"):
        widen(Residual(channels=1), 3)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("example", [None, (torch.randn(2, 2, 8, 8), torch.tensor([1, 700]))])
def test_a_named_layer_is_held_to_the_promise_too(example: Any, adapted: bool) -> None:
    class Normed(Plain):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return nn.functional.group_norm(super().forward(x, t), 1)

    class Told(Normed):
        def forward(self, x: Tensor, *, time: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, time)

    network = Keyword(Told(), "time") if adapted else Normed()
    kind = type(network).__name__
    with pytest.raises(InputError, match=f"widening that layer, 'last', does not give this {kind} 5 output channels"):
        widen(network, 5, layer="last", example=example, inplace=True)
    assert type(network.get_submodule("network.last" if adapted else "last")) is nn.Conv2d


def test_a_network_derived_from_a_known_one_is_held_to_the_promise_too() -> None:
    from diffusers import UNet2DModel

    class Added(UNet2DModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
            return x + super().forward(x, t).sample  # type: ignore[union-attr]

    class Same(UNet2DModel):
        pass

    few = {"sample_size": 8, "in_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    with pytest.raises(InputError, match="after layer 'conv_out' is added to the new channels too"):
        widen(Added(out_channels=1, **few, **blocks), 3)
    same = Same(out_channels=1, **few, **blocks).eval()
    same_first(widen(same, 3), same, 3, torch.randn(2, 1, 8, 8), torch.tensor([1, 700]))


def test_a_network_that_is_not_the_same_twice_is_named_as_such() -> None:
    class Random(Plain):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x), t)

    with pytest.raises(InputError, match="gives something else each time"):
        widen(Random(), 5)


class Logarithmic(Plain):
    """Is told a noise level, as EDM's networks are."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x * (1 + t.log() / 4).view(-1, 1, 1, 1), t)


def test_a_network_that_is_told_a_noise_level_is_looked_at_where_it_has_one() -> None:
    wide = widen(Logarithmic(), 5)
    assert wide.last.out_channels == 5
    with pytest.raises(InputError, match=r"this Logarithmic gives NaN .* and t = \[0\].*example="):
        widen(Logarithmic(), 5, example=(torch.randn(1, 2, 8, 8), torch.tensor([0])))


def _shared(network: nn.Module) -> None:
    network.twin = nn.Conv2d(24, 3, 3)
    network.twin.weight = network.conv_out.weight


def _old_weight_norm(network: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(network.conv_out)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight norm": (lambda n: nn.utils.parametrizations.weight_norm(n.conv_out), "its weight is parametrized"),
    "spectral norm": (lambda n: nn.utils.spectral_norm(n.conv_out), "under spectral_norm"),
    "old weight norm": (_old_weight_norm, r"under weight_norm( \(conv_out\))?: torch"),
    "tied": (_shared, "shared, as conv_out.weight and twin.weight"),
    "one layer, two names": (lambda n: setattr(n, "twin", n.conv_out), "shared, as conv_out.* and twin"),
    "hooks": (lambda n: n.conv_out.register_forward_hook(lambda *_: None), "forward hooks"),
    "hooks before": (lambda n: n.conv_out.register_forward_pre_hook(lambda *_: None), "forward hooks"),
    "accelerate's hooks": (lambda n: setattr(n.conv_out, "_hf_hook", None), "forward hooks"),
    "another forward": (lambda n: setattr(n.conv_out, "forward", lambda x: x), "its forward was exchanged"),
    "groups": (lambda n: setattr(n, "conv_out", nn.Conv2d(24, 3, 3, padding=1, groups=3)), "3 groups"),
    "two inputs": (lambda n: setattr(n, "conv_out", nn.Bilinear(24, 24, 3)), "no convolution or linear layer"),
    "a layer of its own": (
        lambda n: setattr(n, "conv_out", type("Odd", (nn.Conv2d,), {})(24, 3, 3, padding=1)),
        "a Odd is none of Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear",
    ),
    "integers": (
        lambda n: setattr(n.conv_out, "weight", nn.Parameter(torch.zeros(3, 24, 3, 3, dtype=torch.int8), False)),
        "torch.int8: widen before quantizing",
    ),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_are_refused_by_name(case: str, inplace: bool, tiny: nn.Module) -> None:
    network = copy.deepcopy(tiny)
    change, message = REFUSED[case]
    change(network)
    layer = network.conv_out
    with pytest.raises(InputError, match=message):
        widen(network, 7, inplace=inplace)
    assert network.conv_out is layer
    assert network.config.out_channels == 3


def test_arguments_that_are_refused(tiny: nn.Module) -> None:
    from diffusers import UNet2DModel

    skipping = UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )  # fmt: skip
    denoiser = dualout.Denoiser(tiny, dualout.Epsilon(), dualout.schedules.Linear())
    for network, channels, options, message in [
        (tiny, 2, {}, "has 3 output channels, and widening takes none away; got 2"),
        (tiny, "7", {}, "channels is a whole number"),
        (tiny, 7, {"places": [0, 1, 7]}, "3 different numbers from 0 to 6"),
        (tiny, 7, {"places": [0, 1, 1]}, "3 different numbers"),
        (tiny, 7, {"places": [0, 1]}, "3 different numbers"),
        (tiny, 7, {"places": [0, 1, 2, 2]}, "3 different numbers"),
        (nn.Conv2d(3, 3, 1), 7, {"layer": ""}, "the network is a single layer"),
        (skipping, 7, {}, "skip blocks"),
        (denoiser, 7, {}, "denoiser.network"),
        (nn.DataParallel(tiny), 7, {}, "network.module"),
        (torch.compile(nn.DataParallel(tiny)), 7, {}, "network.module"),
        (lambda x, t: x, 7, {}, "only a torch.nn.Module"),
        (ScaledTime(lambda x, t: x, 1.0), 7, {}, "only a torch.nn.Module"),
    ]:
        with pytest.raises(InputError, match=message):
            widen(network, channels, **options)


def test_networks_whose_layers_are_not_their_own_are_refused(tiny: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    sharded = copy.deepcopy(tiny)
    sharded.__class__ = type("FSDPUNet", (FSDPModule, type(tiny)), {})
    hooked: Any = copy.deepcopy(tiny)
    hooked.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Plain(), (torch.randn(1, 2, 8, 8), torch.zeros(1)))
    for network, message in [
        (sharded, "FSDPUNet is sharded: widen the network first"),
        (hooked, "diffusers has put hooks into this UNet2DModel .*widen the network before"),
        (traced, "widen the module that it was compiled from"),
    ]:
        with pytest.raises(InputError, match=message):
            widen(network, 7)


def test_an_average_beside_its_network_is_widened_alone(tiny: nn.Module) -> None:
    class EMA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online_model, self.ema_model = tiny, copy.deepcopy(tiny)

        def forward(self, *arguments: Any) -> Any:
            return self.ema_model(*arguments)

    with pytest.raises(InputError, match=r"the network inside EMA: widen\(network.ema_model"):
        widen(EMA(), 7, inplace=True)


class Adapted(nn.Module):
    """As PEFT puts a LoRA around a convolution."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(layer.in_channels, 2, 3, padding=1, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(2, layer.out_channels, 1, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("layer", [None, "last", "last.base_layer"])
def test_an_output_layer_under_a_lora_is_refused(layer: str | None) -> None:
    network: Any = Plain().eval()
    network.last = Adapted(network.last)
    with pytest.raises(InputError, match=r"layer 'last' of this Plain is under a LoRA .*network.merge_and_unload\(\)"):
        widen(network, 5, layer=layer)
    known: Any = build("tiny", 2, 8, 2)
    known.conv_out = Adapted(known.conv_out)
    with pytest.raises(InputError, match="layer 'conv_out' of this UNet2DModel is under a LoRA"):
        widen(known, 5)
    # elsewhere it is no matter
    network = Plain().eval()
    network.first = Adapted(network.first)
    same_first(widen(network, 5), network, 5, torch.randn(2, 2, 8, 8), torch.tensor([1, 700]))


def test_a_learned_variance_is_not_taken_for_x0() -> None:
    network, x, t = build("tiny", 3, 8, 6).eval(), torch.randn(2, 3, 8, 8), torch.tensor([1, 700])
    for example in (None, (x, t)):
        with pytest.raises(InputError, match=r"6 output channels for images of 3, as networks of ε and a learned var"):
            widen(network, 7, example=example)
    same_first(widen(network, 7, places=range(6)), network, 7, x, t)
    same_first(widen(network, 10), network, 10, x, t)


def test_what_is_no_network_is_told_as_such() -> None:
    class Loss(Plain):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t).mean()

    class Picky(Plain):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if len(x) == 1:
                raise AssertionError
            return super().forward(x, t)

    with pytest.raises(InputError, match=r"gives a tensor of shape \(\), which has no channels. A wrapper that"):
        widen(Loss(), 5)
    with pytest.raises(InputError, match=r"this Picky cannot be called as \(x_t, t\) with x_t of shape .* Assertion"):
        widen(Picky(), 5)
    network, example = Picky().eval(), (torch.randn(2, 2, 8, 8), torch.tensor([1, 700]))
    same_first(widen(network, 5, example=example), network, 5, *example)


def test_what_gives_the_output_is_named_where_it_is_no_layer_that_can_be_widened() -> None:
    with pytest.raises(InputError, match=r"Its output is what 'tail' \(Softmax\) gives"):
        widen(Plain(tail=nn.Softmax(1)), 5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_on_a_gpu_the_old_channels_may_round_otherwise_but_not_be_others(scale: float) -> None:
    before = scale * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rounded = before.bfloat16().float()
    assert not as_before(rounded, before, exact=True)
    assert as_before(rounded, before, exact=False)
    assert not as_before(before + 0.05 * before.flip(0), before, exact=False)
    assert not as_before(before * torch.nan, before, exact=False)
