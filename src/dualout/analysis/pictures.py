"""The figures that are made of images: films, and maps of the ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dualout.analysis import canvas
from dualout.analysis.trajectories import Frame
from dualout.data.pixels import to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def ratio_maps(maps: Mapping[int, Tensor], title: str = "", columns: int = 6) -> Figure:
    """r of each pixel, mean over images, at some t."""
    tiles = [ratio_map.float().mean(0).cpu().numpy() for ratio_map in maps.values()]
    height, width = tiles[0].shape
    gap = (0.32 * height, 0.08 * width)
    with canvas.styled():
        rows = -(-len(tiles) // columns)
        figure = canvas.blank(height=0.3 + 0.75 * rows)
        figure.suptitle(title, x=0, ha="left", weight="bold", size=10.5)
        axes = _bare(figure.subplots())
        shown: Any = None
        for k, (t, tile) in enumerate(zip(maps, tiles, strict=True)):
            y, x = (k // columns) * (height + gap[0]), (k % columns) * (width + gap[1])
            shown = axes.imshow(tile, extent=(x, x + width, y + height, y), cmap="cividis", vmin=0, vmax=1)
            axes.text(x + width / 2, y - 0.05 * height, f"t {t}", ha="center", va="bottom", size=9)
        axes.set_xlim(0, columns * (width + gap[1]))
        axes.set_ylim(rows * (height + gap[0]) - gap[0], -gap[0])
        figure.colorbar(shown, ax=axes, label="r", shrink=0.9)
    return figure


def film(frames: Sequence[Frame], image: int = 0, title: str = "") -> Figure:
    """A column a step: the noisy image, the predicted x0, x0 by each route, and the ratio."""
    lines = [("x_t", [f.x_t for f in frames]), ("x0", [f.x0 for f in frames])]
    dual = frames[0].ratio is not None and frames[0].direct is not None
    if dual:
        lines += [("sub-\ntractive", [f.subtractive for f in frames]), ("direct", [f.direct for f in frames])]
    height, width = frames[0].x0.shape[-2:]
    down, across = height * 1.15, width * 1.06
    pictures = [(name, [_picture(_present(v)[image]) for v in values]) for name, values in lines]
    with canvas.styled():
        side = (canvas.WIDTH - 0.6) / len(frames) / across
        figure = canvas.blank(height=0.35 + (len(pictures) + dual) * down * side + (0.55 if dual else 0))
        figure.suptitle(title, x=0, ha="left", weight="bold", size=10.5)
        axes = _bare(figure.subplots())
        for row, (_, line) in enumerate(pictures):
            for k, picture in enumerate(line):
                axes.imshow(
                    picture, extent=_extent(row * down, k * across, height, width), cmap="gray", vmin=0, vmax=255
                )
        if dual:
            shown: Any = None
            for k, f in enumerate(frames):
                ratio = _present(f.ratio)[image].float().mean(0).cpu().numpy()
                extent = _extent(len(pictures) * down, k * across, height, width)
                shown = axes.imshow(ratio, extent=extent, cmap="cividis", vmin=0, vmax=1)
            label = "r: 0 subtractive, 1 direct"
            figure.colorbar(shown, ax=axes, location="bottom", shrink=0.5, aspect=30, label=label)
        names = [*(name for name, _ in pictures), *(["r"] if dual else [])]
        for row, name in enumerate(names):
            axes.text(-0.1 * width, row * down + height / 2, name, ha="right", va="center", size=9)
        for k, f in enumerate(frames):
            if k % -(-len(frames) // 12) == 0:
                axes.text(k * across + width / 2, -0.08 * height, str(f.t), ha="center", va="bottom", size=8.5)
        axes.set_xlim(0, len(frames) * across)
        axes.set_ylim(len(names) * down, 0)
    return figure


def _bare(axes: Axes) -> Axes:
    axes.set_axis_off()
    axes.set_aspect("equal")
    return axes


def _extent(y: float, x: float, height: int, width: int) -> tuple[float, float, float, float]:
    return x, x + width, y + height, y


def _present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _picture(image: Tensor) -> np.ndarray:
    """(C, H, W) in [−1, 1] -> (H, W) or (H, W, 3), uint8: of 2 channels the first, of more than 3 the first three."""
    pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    return pixels[..., 0] if pixels.shape[2] < 3 else pixels[..., :3]
