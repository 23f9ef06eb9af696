"""Drawing surfaces: figures that read well on a phone, in light and in dark, and never touch matplotlib's global state.

Figures are small (as wide as a phone's screen at the size their letters are meant for), and their SVG names every
colour as a CSS variable, so that a page can change them all at once.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dualout.analysis.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "ink": "#1b1e22",
    "muted": "#666c73",
    "grid": "#dfe2e6",
    "blue": "#0069aa",
    "red": "#c94f0a",
    "green": "#007f5b",
    "purple": "#a0468d",
    "amber": "#a16e00",
    "sky": "#2b8ab9",
    "brown": "#7d5a44",
}
"""Told apart also by the colour-blind (after Okabe & Ito 2008), and dark enough for thin lines on white."""

_METHODS = {
    "dual": "blue", "eps": "red", "x0": "green", "velocity": "purple", "v": "purple", "karras": "amber", "edm": "amber",
    "flow": "sky",
}  # fmt: skip
_MARKERS = {"blue": "o", "red": "s", "green": "^", "purple": "D", "amber": "v", "sky": "P", "brown": "X"}


WIDTH = 4.3
"""Inches: 413 CSS pixels, a phone's width, where letters have their own size."""
_LEGEND_ROW = 0.2
_LEGEND_LINE = 0.6
"""Inches of a line in a legend, and of what is around it."""


def styles(labels: Sequence[str]) -> list[dict[str, Any]]:
    """Colour, marker and line of each method: its own colour or brown, and a dashed line for the second that has it.

    Args:
        labels: names that begin with a parameterization's, such as "dual", "dual:gate=balanced" or "eps, calibrated".
    """
    used: list[str] = []
    found = []
    for label in labels:
        name = re.split(r"\W", label, maxsplit=1)[0]
        colour = _METHODS.get(name, "brown")
        lines = ("-", (0, (4, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.5, 1, 1.5)))
        found.append(
            {"color": COLOURS[colour], "marker": _MARKERS[colour], "linestyle": lines[used.count(colour) % len(lines)]}
        )
        used.append(colour)
    return found


_RC: Any = {
    "font.size": 9.5,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "lines.linewidth": 1.9,
    "lines.markersize": 5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "text.parse_math": False,  # names may hold a $
    "svg.fonttype": "none",
    "svg.hashsalt": "dualout",
    "image.interpolation": "none",
}


@contextmanager
def styled() -> Iterator[None]:
    """The house style, for as long as the block lasts."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def blank(height: float = 3.0) -> Figure:
    """An empty figure; its height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot(draw: Callable[[Axes], None], title: str = "", height: float = 3.0) -> Figure:
    """A figure of one pair of axes, which `draw` fills."""
    with styled():
        figure = blank(height)
        axes = figure.subplots()
        axes.set_title(title)
        draw(axes)
    return figure


def steps_axis(axes: Axes, steps: Sequence[int]) -> None:
    """A logarithmic axis with a tick at each number of steps that was measured, and at no other."""
    axes.set_xscale("log")
    axes.set_xticks(list(steps), [str(k) for k in steps])
    axes.minorticks_off()
    axes.set_xlabel("steps")


def plain_log(axes: Axes) -> None:
    """A logarithmic y axis with ordinary numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # as many as there is room for
    fine = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    subs = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 4 else fine
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 3)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend_below(axes: Axes, columns: int = 2) -> None:
    """A legend under the axes, where it hides nothing, in as many columns at most as its names leave room for; from its
    third row on the figure grows with it."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure: Any = axes.figure
        columns = min(columns, max(1, int(figure.get_figwidth() / (_LEGEND_LINE + _widest(labels, figure)))))
        rows = -(-len(labels) // columns)
        figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * max(0, rows - 2))
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(columns, len(labels)),
            # long enough that a dashed line shows beside its marker
            handlelength=3.0, handletextpad=0.5, columnspacing=1.0,
        )  # fmt: skip


def _widest(labels: Sequence[str], figure: Any) -> float:
    """Inches of the longest in a legend."""
    import matplotlib
    from matplotlib.font_manager import FontProperties

    measured, font = figure.canvas.get_renderer(), FontProperties(size=matplotlib.rcParams["legend.fontsize"])
    return max(measured.get_text_width_height_descent(label, font, False)[0] for label in labels) / figure.dpi


def png(figure: Figure, title: str = "") -> bytes:
    """The figure as a PNG file on white, with its title above it."""
    if title:
        with styled():
            figure.suptitle(title, x=0, ha="left", weight="bold", size=10.5)
    return _saved(figure, format="png", dpi=160, metadata={"Software": None})


def svg(figure: Figure, name: str, title: str = "") -> str:
    """The figure as an SVG element for a web page; its colours are CSS variables (--ink, --blue …).

    Args:
        figure: what to draw.
        name: unique on the page; the ids in the element begin with it.
        title: what a screen reader says.
    """
    text = _saved(figure, format="svg", transparent=True, metadata={"Date": None, "Creator": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'\b(?:xlink:)?href="#', f'href="#{name}-', text)
    text = text.replace("xlink:href=", "href=")
    # equal pictures are given equal ids; those that nothing refers to are not needed
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour},{value})")
    # the height follows the width
    text = re.sub(r'<svg\b[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    label = re.sub(r"[<>&]", "", title or name)
    text = text.replace('role="img">', f'role="img"><title>{label}</title>', 1)
    return re.sub(r"\n\s*", "\n", text).strip()


def _saved(figure: Figure, **options: Any) -> bytes:
    target = io.BytesIO()
    with styled():
        figure.savefig(target, **options)
    return target.getvalue()


def tiles(images: np.ndarray, columns: int, gap: int = 1, fill: int = 128) -> np.ndarray:
    """Images side by side: uint8 (N, H, W, C) -> uint8 (rows·(H + gap) − gap, columns·(W + gap) − gap, C)."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), fill, np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        sheet[y * (h + gap) : y * (h + gap) + h, x * (w + gap) : x * (w + gap) + w] = image
    return sheet


def sheet(images: np.ndarray, turn: int = 1) -> bytes:
    """Images in a square, as a PNG file; those of a few pixels are made large enough to be seen.

    Args:
        images: uint8 (N, H, W, 1 or 3).
        turn: how many classes the images go through in turn; where they are few enough, each has columns of its own.
    """
    columns = math.isqrt(len(images) - 1) + 1
    if 1 < turn <= 2 * columns:
        columns = min(len(images), turn * max(1, round(columns / turn)))
    return png_of(tiles(images, columns), max(1, 64 // images.shape[1]))


def png_of(image: np.ndarray, scale: int = 1) -> bytes:
    """An image, uint8 (H, W, 1 or 3), as a PNG file, each pixel a square of `scale` pixels."""
    from PIL import Image

    big = image.repeat(scale, 0).repeat(scale, 1)
    target = io.BytesIO()
    Image.fromarray(big[..., 0] if big.shape[2] == 1 else big).save(target, "PNG", optimize=True)
    return target.getvalue()
