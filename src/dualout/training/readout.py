"""New rows of an output layer in closed form: with the network before it frozen, they are a least-squares problem.

    min over W of  Σ_t w_t · mean |y − W·φ(x_t, t)|²,      y the clean image (the noise, where that is the new output)

φ is what enters the layer: for a convolution the patch under its kernel, and 1 for the bias. One pass over the images
adds up φφᵀ, φyᵀ and |y|² apart for bins of t, in float64, so that any weights of t can be solved for afterwards, and
each bin's error is known without another pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.networks.device import double
from dualout.networks.wide import TRANSPOSED, rows_of, weight_rows
from dualout.training.noised import Noised


@dataclass(eq=False)
class Moments:
    """Sums over what was seen, by bin of t: F features, R rows.

    Attributes:
        gram: Σ φφᵀ, (bins, F, F), float64.
        cross: Σ φyᵀ, (bins, F, R).
        power: Σ |y|², (bins,).
        count: how many φ were seen, (bins,).
    """

    gram: Tensor
    cross: Tensor
    power: Tensor
    count: Tensor

    @classmethod
    def none(cls, bins: int, features: int, rows: int, device: torch.device) -> Moments:
        """Nothing seen yet."""
        sizes = ((bins, features, features), (bins, features, rows), (bins,), (bins,))
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, bin: int, phi: Tensor, y: Tensor) -> None:
        """Take in features (N, F) and what they are to give, (N, R), both float64."""
        self.gram[bin] += phi.T @ phi
        self.cross[bin] += phi.T @ y
        self.power[bin] += y.square().sum()
        self.count[bin] += len(phi)

    def solve(self, weights: Tensor | None = None, ridge: float = 1e-8) -> Tensor:
        """The rows of least error, (F, R).

        Args:
            weights: of each bin, (bins,); None is all alike.
            ridge: added to the diagonal, as a share of its mean.
        """
        weights = torch.ones_like(self.count) if weights is None else weights
        w = weights / self.count.clamp(min=1)
        gram, cross = torch.einsum("b,bfg->fg", w, self.gram), torch.einsum("b,bfr->fr", w, self.cross)
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            # features that depend on each other: the shortest of the solutions
            return torch.linalg.lstsq(gram.cpu(), cross.cpu(), driver="gelsd").solution.to(gram.device)
        return torch.cholesky_solve(cross, factor)

    def errors(self, rows: Tensor) -> Tensor:
        """Each bin's mean |y − W·φ|² a row, for rows (F, R): (bins,)."""
        fitted = torch.einsum("fr,bfg,gr->b", rows, self.gram, rows) - 2 * torch.einsum("fr,bfr->b", rows, self.cross)
        return (self.power + fitted).clamp(min=0) / (self.count.clamp(min=1) * rows.shape[1])

    def solve_blended(self, trained: Tensor, rounds: int = 8) -> Tensor:
        """The rows that lower the error of the blend most, (F, R).

        A blend of routes with errors a (trained) and b (new) errs by about ab / (a + b): times where the trained route
        is good need no new one. Each round weighs t by the slope of Σ log of that, a / (b·(a + b)).

        Args:
            trained: mean squared error of the trained route in each bin, (bins,).
            rounds: how often the weights are made anew.
        """
        rows = self.solve()
        for _ in range(rounds):
            new = self.errors(rows).clamp(min=1e-12)
            weights = trained / (new * (trained + new))
            rows = self.solve(weights / weights.max())
        return rows


def collect(
    denoiser: Denoiser,
    layer: str,
    outputs: slice,
    batches: Iterable[Noised],
    bins: int,
    *,
    target: str = "x0",
    pixels: int | None = None,
    seed: int = 0,
) -> tuple[Moments, Tensor]:
    """Pass images through a frozen network, once.

    Args:
        denoiser: of a widened network.
        layer: the output layer's name in the network.
        outputs: which of the network's output channels are new.
        batches: what to look at; images may be of several sizes.
        bins: how many bins of t there are.
        target: "x0" or "noise": what the new outputs are to give.
        pixels: positions to look at in each batch, at random; None is all.
        seed: of that choice.

    Returns:
        the sums, and which rows of the layer they are for, (R,).

    Raises:
        InputError: when the network's output is not the layer's, rearranged.
    """
    module = denoiser.network.get_submodule(layer)  # type: ignore[union-attr]
    moments = None
    found: dict[torch.Size, tuple[Tensor, Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        shape = batch.x0.shape[1:]
        if shape not in found:
            found[shape] = _placed(denoiser, module, outputs, batch)
        rows, place = found[shape]
        features = _entering(denoiser, module, batch)
        y = getattr(batch, target)
        # (C, H, W) of the image -> (positions, rows) of the layer
        aimed = y.new_zeros(len(y), features.shape[1] * len(rows)).index_copy_(1, place, y.flatten(1))
        aimed = aimed.view(len(y), features.shape[1], len(rows))
        if pixels is not None and pixels < features.shape[1]:
            some = torch.randperm(features.shape[1], generator=generator)[:pixels].to(features.device)
            features, aimed = features[:, some], aimed[:, some]
        for bin, own in _by_bin(batch.bin):
            phi = double(features[own].flatten(0, 1))
            if module.bias is not None:
                phi = torch.cat([phi, phi.new_ones(len(phi), 1)], 1)
            if moments is None:
                moments = Moments.none(bins, phi.shape[1], len(rows), phi.device)
            moments.add(bin, phi, double(aimed[own].flatten(0, 1)))
    if moments is None:
        raise InputError("there are no images to solve the new rows with")
    return moments, next(iter(found.values()))[0]


def _by_bin(bin: int | Tensor) -> Iterator[tuple[int, Any]]:
    """Each bin of a batch, and which of its images are of it."""
    if isinstance(bin, int):
        yield bin, slice(None)
    else:
        yield from ((b, bin == b) for b in bin.unique().tolist())


@torch.no_grad()
def write_rows(layer: nn.Module, rows: Tensor, solution: Tensor) -> None:
    """Put solved rows (F, R) into a layer; its other rows stay as they are."""
    weight, bias = weight_rows(layer), layer.bias
    values = solution.T.to(weight)
    if isinstance(bias, Tensor):
        bias[rows] = values[:, -1]
        values = values[:, :-1]
    weight[rows] = values.reshape(-1, *weight.shape[1:])


def patches(layer: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    """What each position's rows are multiplied with: (B, positions, F), F in the order of the weight of each row.

    Args:
        layer: a convolution, transposed or not, or a linear map.
        z: its input.
        y: its result, of which only the shape matters.
    """
    if isinstance(layer, nn.Linear):
        return z.reshape(len(z), -1, z.shape[-1])
    if isinstance(layer, TRANSPOSED):
        dims, z, strides = len(layer.kernel_size), _spread(layer, z, y.shape[2:]), (1,) * len(layer.kernel_size)
    else:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        dims, strides = len(layer.kernel_size), layer.stride
        z = F.pad(z, layer._reversed_padding_repeated_twice, mode=mode)
    for d, (k, stride, dilation) in enumerate(zip(layer.kernel_size, strides, layer.dilation, strict=True)):
        z = z.unfold(2 + d, (k - 1) * dilation + 1, stride)[..., ::dilation]
    if isinstance(layer, TRANSPOSED):
        # its kernel runs the other way
        z = z.flip(tuple(range(2 + dims, 2 + 2 * dims)))
    # (B, C, positions …, kernel …) -> (B, positions, C · kernel)
    order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return z.permute(order).flatten(1 + dims).flatten(1, dims)


def _spread(
    layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, z: Tensor, shape: Sequence[int]
) -> Tensor:
    """The input of the convolution with stride 1 that a transposed one is: zeros between the numbers, and around.

    A call may say what shape it wants, so that the zeros at the far sides do not follow from the layer.
    """
    spread = z.new_zeros(*z.shape[:2], *((n - 1) * s + 1 for n, s in zip(z.shape[2:], layer.stride, strict=True)))
    spread[(..., *(slice(None, None, s) for s in layer.stride))] = z
    kernel = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    near = [k - int(p) for k, p in zip(kernel, layer.padding, strict=True)]
    far = [n + k - m - a for n, k, m, a in zip(shape, kernel, spread.shape[2:], near, strict=True)]
    return F.pad(spread, [n for sides in zip(reversed(near), reversed(far), strict=True) for n in sides])


@torch.no_grad()
def _entering(denoiser: Denoiser, layer: nn.Module, batch: Noised) -> Tensor:
    """What each position's rows are multiplied with as the network looks at a batch: (B, positions, F)."""
    seen: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        seen.append(patches(layer, inputs[0], y))

    with layer.register_forward_hook(note):
        batch.seen_by(denoiser)
    # frames of a video may be images of their own for the layer
    return seen[0].reshape(len(batch.x0), -1, seen[0].shape[2])


@torch.no_grad()
def _placed(denoiser: Denoiser, layer: nn.Module, outputs: slice, batch: Noised) -> tuple[Tensor, Tensor]:
    """Which rows make these outputs, (R,), and where (C, H, W), flattened, lies in (positions, R).

    The layer's result is replaced by numbers, and the network's output then tells where each went: digit by digit, as
    half precision, which some networks return to, counts no further than to 256.
    """
    shape, base = [0], 128

    def digit(k: int) -> Tensor:
        def numbered(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            shape[:] = y.shape
            return (torch.arange(y.numel(), device=y.device) // base**k % base).float().view_as(y)

        with layer.register_forward_hook(numbered):
            # of the whole batch, of which the first image is read: not every condition has a row an image
            raw, *_ = batch.seen_by(denoiser)
        return raw[0, outputs].flatten()

    found = [digit(0)]
    found += [digit(k) for k in range(1, math.ceil(math.log(math.prod(shape), base)))]
    digits = torch.stack(found)
    flat = (digits.long() * base ** torch.arange(len(digits), device=digits.device)[:, None]).sum(0)
    # as in `_entering`, an image may be several for the layer
    unit, each = math.prod(shape[1:]), math.prod(shape) // len(batch.x0)
    whole = torch.equal(digits, digits.round()) and bool(((digits >= 0) & (digits < base)).all())
    if not whole or flat.max() >= each or len(flat.unique()) < len(flat):
        raise InputError(
            "the new rows cannot be solved for in closed form: what comes after the output layer does more than "
            "rearrange its result; dualout upgrade --start zero, or a loop of one's own, trains them from zero instead"
        )
    count = rows_of(layer)
    positions = unit // count
    image, inside = flat // unit, flat % unit
    last = isinstance(layer, nn.Linear)
    row, position = (inside % count, inside // count) if last else (inside // positions, inside % positions)
    rows, number = row.unique(return_inverse=True)
    return rows, (image * positions + position) * len(rows) + number
