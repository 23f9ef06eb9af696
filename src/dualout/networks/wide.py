"""Layers with more output rows than they were trained with.

One product over all rows may add in another order than one over the trained rows alone. Of the float32 layers tried on
one CPU, at the sizes of small networks, widening in place changed the last bits of a third of the 1×1 convolutions and
linear maps and of a ninth of the 3×3 convolutions, channels_last and small batches above all. So the trained rows are
computed apart, exactly as before, and the new ones beside them, which costs 1 to 2% of a small UNet's forward pass and
6 to 10% of its training step. The weights are those of the plain layer with as many rows: either loads into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualout.errors import InputError

TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
Rows = Sequence[Sequence[int]]
"""Row indices in groups; a group is computed in one product. Together they are all rows of a layer, each once."""


class Wide(nn.Module):
    """A convolution or linear map whose rows are computed in groups: mixed into a class of torch.nn.

    Args:
        arguments: those of the class of torch.nn.
        rows: the groups.
    """

    names: ClassVar[tuple[str, ...]]
    """What of the class of torch.nn makes another like it; `bias` beside them."""
    stands_in: ClassVar[bool] = True
    """A checkpoint names it beside the network's class and arguments, which do not tell of it."""
    weight: Tensor
    """Its rows are along the side `row_dim`."""
    bias: Tensor | None
    order: Tensor
    back: Tensor

    def __init__(self, *arguments: Any, rows: Rows, **options: Any) -> None:
        super().__init__(*arguments, **options)
        order = [row for group in rows for row in group]
        if sorted(order) != list(range(rows_of(self))) or not all(rows):
            raise InputError(f"rows are 0 to {rows_of(self) - 1} in groups, each once; got {rows}")
        self.rows = [list(group) for group in rows]
        self.in_order = order == sorted(order)
        index = torch.tensor(order, device=self.weight.device)
        self.register_buffer("order", index, persistent=False)
        self.register_buffer("back", index.argsort(), persistent=False)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in (*self.names, "rows")} | {"bias": self.bias is not None}

    def apart(self, product: Callable[[Tensor, Tensor | None], Tensor], dim: int) -> Tensor:
        """The products (weight, bias) -> y of all groups, along `dim` in the order of the rows."""
        weight, bias, side = self.weight, self.bias, row_dim(self)
        if not self.in_order:
            weight, bias = weight.index_select(side, self.order), None if bias is None else bias[self.order]
        sizes = [len(group) for group in self.rows]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        y = torch.cat([product(w, b) for w, b in zip(weight.split(sizes, side), biases, strict=True)], dim)
        return y if self.in_order else y.index_select(dim, self.back)


class _WideConv(Wide):
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """As the convolution."""
        return self.apart(lambda weight, bias: self._conv_forward(input, weight, bias), dim=1)


class WideConv1d(_WideConv, nn.Conv1d):
    """Conv1d."""


class WideConv2d(_WideConv, nn.Conv2d):
    """Conv2d."""


class WideConv3d(_WideConv, nn.Conv3d):
    """Conv3d."""


class _WideConvTranspose(Wide):
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "dilation")
    product: ClassVar[Callable[..., Tensor]]

    def forward(self: Any, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """As the transposed convolution."""
        dims = len(self.kernel_size)
        sizes = self.stride, self.padding, self.kernel_size, dims, self.dilation
        more = self._output_padding(input, output_size, *sizes)
        options = {"stride": self.stride, "padding": self.padding, "output_padding": more, "dilation": self.dilation}
        return self.apart(lambda weight, bias: self.product(input, weight, bias, **options), dim=1)


class WideConvTranspose1d(_WideConvTranspose, nn.ConvTranspose1d):
    """ConvTranspose1d."""

    product = staticmethod(F.conv_transpose1d)


class WideConvTranspose2d(_WideConvTranspose, nn.ConvTranspose2d):
    """ConvTranspose2d."""

    product = staticmethod(F.conv_transpose2d)


class WideConvTranspose3d(_WideConvTranspose, nn.ConvTranspose3d):
    """ConvTranspose3d."""

    product = staticmethod(F.conv_transpose3d)


class WideLinear(Wide, nn.Linear):
    """Linear."""

    names = ("in_features", "out_features")

    def forward(self, input: Tensor) -> Tensor:
        """As the linear map."""
        return self.apart(lambda weight, bias: F.linear(input, weight, bias), dim=-1)


class PartialConv1d(nn.Conv1d):
    """Conv1d of some of its input's channels, where it has them; in the others' place its output is zero.

    Args:
        arguments: those of Conv1d.
        total: how many channels input and output have.
        places: which of them are the convolution's, in order.
    """

    stands_in: ClassVar[bool] = True
    """A checkpoint names it beside the network's class and arguments, which do not tell of it."""

    def __init__(self, *arguments: Any, total: int, places: Sequence[int], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.total, self.places = total, list(places)
        if not len(self.places) == self.in_channels == self.out_channels or not set(places) <= set(range(total)):
            raise InputError(f"places are {self.in_channels} of {total} channels; got {self.places}")
        self.register_buffer("index", torch.tensor(self.places, device=self.weight.device), persistent=False)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in (*_WideConv.names, "total", "places")} | {
            "bias": self.bias is not None
        }

    def forward(self, input: Tensor) -> Tensor:
        """(B, total, L) -> (B, total, L)."""
        y = super().forward(input.index_select(1, self.index))  # type: ignore[arg-type]
        return y.new_zeros(len(y), self.total, *y.shape[2:]).index_copy(1, self.index, y)  # type: ignore[arg-type]


KINDS: dict[type[nn.Module], type[Wide]] = {
    nn.Conv1d: WideConv1d,
    nn.Conv2d: WideConv2d,
    nn.Conv3d: WideConv3d,
    nn.ConvTranspose1d: WideConvTranspose1d,
    nn.ConvTranspose2d: WideConvTranspose2d,
    nn.ConvTranspose3d: WideConvTranspose3d,
    nn.Linear: WideLinear,
}
"""What can be widened, and what it becomes."""


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """What can be widened, by name."""
    return {name: m for name, m in network.named_modules() if isinstance(m, (*KINDS, Wide))}


def row_dim(layer: nn.Module) -> int:
    """Along which side of a layer's weight its rows are: a transposed convolution has its input's channels first."""
    return 1 if isinstance(layer, TRANSPOSED) else 0


def weight_rows(layer: nn.Module) -> Tensor:
    """A layer's weight with its rows first: (rows, …), a view."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.movedim(row_dim(layer), 0)


def rows_of(layer: nn.Module) -> int:
    """How many rows a layer has: output channels or features."""
    return len(weight_rows(layer))


@torch.no_grad()
def wider(layer: nn.Module, rows: int, places: Sequence[int], init: Callable[[Tensor], Any]) -> Wide:
    """A layer with more rows.

    Args:
        layer: one of KINDS, or already wide.
        rows: how many it will have.
        places: where each of the old rows goes, by index.
        init: fills the weights of the new rows, (new rows, …), in place; their biases are 0.
    """
    kind = type(layer) if isinstance(layer, Wide) else next(w for k, w in KINDS.items() if isinstance(layer, k))
    weight, bias, trained = layer.weight, layer.bias, weight_rows(layer)
    assert isinstance(weight, Tensor)
    groups = layer.rows if isinstance(layer, Wide) else [range(len(trained))]
    new = sorted(set(range(rows)) - set(places))
    options = {name: getattr(layer, name) for name in kind.names} | {kind.names[1]: rows}
    wide = kind(
        **options,
        bias=bias is not None,
        rows=[[places[row] for row in group] for group in groups] + ([new] if new else []),
        device=weight.device,
        dtype=weight.dtype,
    )
    if weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        wide.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    weight_rows(wide)[list(places)] = trained
    if new:
        fresh = trained.new_empty(len(new), *trained.shape[1:])
        init(fresh)
        weight_rows(wide)[new] = fresh
    wide.weight.requires_grad_(weight.requires_grad)
    if isinstance(bias, Tensor) and wide.bias is not None:
        wide.bias.zero_()
        wide.bias[list(places)] = bias
        wide.bias.requires_grad_(bias.requires_grad)
    return wide.train(layer.training)


def partial(layer: nn.Module, total: int, places: Sequence[int]) -> PartialConv1d:
    """A convolution of all channels as one of as many among `total`, its weights shared.

    Args:
        layer: a Conv1d, or what this made of one.
        total: how many channels there will be.
        places: where each of the old channels goes, by index.
    """
    if isinstance(layer, PartialConv1d):
        places = [places[old] for old in layer.places]
    elif type(layer) is not nn.Conv1d:
        raise InputError(f"a {type(layer).__name__} is no Conv1d, whose new channels can go past it")
    options = {name: getattr(layer, name) for name in _WideConv.names}
    found = PartialConv1d(**options, bias=layer.bias is not None, total=total, places=places, device="meta")
    found.weight, found.bias = layer.weight, layer.bias
    found.index = torch.tensor(list(places), device=layer.weight.device)
    return found.train(layer.training)
