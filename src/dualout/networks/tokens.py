"""Networks of packed tokens: patches of the image, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualout.denoiser import tensor_of
from dualout.errors import InputError
from dualout.networks.adapter import Adapter

PLACES = ("ids", "shapes", "sizes", "none")


class Tokens(Adapter):
    """A network of tokens (B, L, C·patch²), each the channels of a patch; a channel's pixels are next to each other.

    What says where a token lies in the image is made here, unless it is among the conditions.

    Args:
        network: the network.
        patch: the height and width of a patch, in pixels (of latents): 2 for Flux.
        places: how the network is told where tokens lie. "ids": `img_ids` and `txt_ids` of `axes` numbers a token
            (Flux); "shapes": `img_shapes`, (frames, rows, columns) an image (QwenImage); "sizes": `num_frames`,
            `height` and `width` (LTX); "none": it is not.
        axes: of ids, how many numbers: 3 is (0, row, column), where those of a text are zero; 4 is (0, row, column, 0),
            where a text's last is its token's number (Flux 2).
    """

    def __init__(
        self, network: nn.Module | Callable[..., Any], patch: int = 2, places: str = "ids", axes: int = 3
    ) -> None:
        super().__init__(network)
        check_patch(patch)
        if places not in PLACES or axes not in (3, 4):
            raise InputError(f"places is one of {', '.join(PLACES)}, and axes 3 or 4; got {places!r}, {axes!r}")
        self.patch, self.places, self.axes = patch, places, axes

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"network": self.network, "patch": self.patch, "places": self.places, "axes": self.axes}

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The network's output, (B, channels, …), for noisy images (B, C, H, W) or (B, C, F, H, W) at steps (B,)."""
        p = self.patch
        if x_t.ndim not in (4, 5) or x_t.shape[-2] % p or x_t.shape[-1] % p:
            raise InputError(
                f"a network of tokens sees images (B, C, H, W) or (B, C, F, H, W) whose sides are multiples of its "
                f"patch, {p} pixels; got {tuple(x_t.shape)}"
            )
        told = {k: v for k, v in self._told(_grid(x_t, p), x_t, conditions).items() if k not in conditions}
        y = tensor_of(self.network(self._packed(x_t), t, **conditions, **told))
        return unpacked(y, p, x_t)

    def _packed(self, x: Tensor) -> Tensor:
        """(B, C, [F,] H, W) -> (B, L, C·patch²)."""
        # (B, C, [F,] rows, p, columns, p) -> (B, [F,] rows, columns, C, p, p)
        x = x.unflatten(-1, (-1, self.patch)).unflatten(-3, (-1, self.patch))
        return x.movedim(-3, -2).movedim(1, -3).flatten(-3).flatten(1, -2)

    def _told(self, grid: tuple[int, int, int], x: Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
        """What the network is told of where its tokens lie."""
        if self.places == "none":
            return {}
        if self.places == "sizes":
            return dict(zip(("num_frames", "height", "width"), grid, strict=True))
        if self.places == "shapes":
            return {"img_shapes": [[grid]] * len(x)}
        text = conditions.get("encoder_hidden_states")
        number = torch.arange(float(text.shape[1] if isinstance(text, Tensor) else 0), device=x.device)
        images = torch.cartesian_prod(*(torch.arange(float(n), device=x.device) for n in grid))
        texts = number.new_zeros(len(number), self.axes)
        if self.axes == 4:
            texts[:, 3] = number
        return {"img_ids": F.pad(images, (0, self.axes - 3)), "txt_ids": texts}


def check_patch(patch: Any) -> None:
    """Refuse what is no number of pixels.

    Raises:
        InputError: for that.
    """
    if not isinstance(patch, int) or isinstance(patch, bool) or patch < 1:
        raise InputError(f"patch is a whole number of pixels, 1 or more; got {patch!r}")


def unpacked(y: Tensor, patch: int, x: Tensor) -> Tensor:
    """(B, L, channels·patch²) -> (B, channels, [F,] H, W), as images x are; a channel's pixels are next to each other.

    Raises:
        InputError: for another number of tokens, or of pixels in them.
    """
    grid = _grid(x, patch)
    if y.ndim != 3 or y.shape[1] != prod(grid) or y.shape[2] % patch**2:
        raise InputError(
            f"a network of {prod(grid)} tokens gives as many, of {patch**2} pixels each; got {tuple(y.shape)}"
        )
    y = y.unflatten(-1, (-1, patch, patch)).unflatten(1, grid)  # (B, F, rows, columns, channels, p, p)
    y = y.movedim(4, 1).movedim(-2, -3).flatten(-2).flatten(-3, -2)  # (B, channels, F, H, W)
    return y if x.ndim == 5 else y.squeeze(2)


def _grid(x: Tensor, patch: int) -> tuple[int, int, int]:
    """How many patches images have: (frames, rows, columns)."""
    return (x.shape[2] if x.ndim == 5 else 1, x.shape[-2] // patch, x.shape[-1] // patch)
