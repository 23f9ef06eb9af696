"""The figures, each from tidy rows: what is drawn is what the tables say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dualout.analysis import canvas
from dualout.analysis.canvas import COLOURS, plot
from dualout.analysis.tables import Row, grouped, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Models = Mapping[str, Sequence[Row]]
"""Rows of the same kind by what their model is called."""


def scores(
    rows: Sequence[Row], metric: str = "fd", title: str = "", limits: tuple[float, float] | None = None
) -> Figure:
    """A score against the number of steps, one line a method; a band of one standard deviation where seeds differ.

    Args:
        rows: each with `method`, `steps` and the metric.
        metric: its column.
        title: above the axes.
        limits: of the y axis, so that figures beside each other can be compared.
    """
    methods = grouped(rows, lambda r: r["method"])
    steps = sorted({r["steps"] for r in rows})

    def draw(axes: Axes) -> None:
        for (method, own), style in zip(methods.items(), canvas.styles(list(methods)), strict=True):
            found = {k: spread(r.get(metric) for r in own if r["steps"] == k) for k in steps}
            known = {k: s for k, s in found.items() if s is not None}
            means = np.array([s.mean for s in known.values()])
            axes.plot(list(known), means, label=method, **style)
            sd = np.array([s.sd for s in known.values()])
            if sd.any():
                low = np.maximum(means - sd, means / 10)
                axes.fill_between(list(known), low, means + sd, color=style["color"], alpha=0.18, linewidth=0)
        if limits:
            axes.set_ylim(limits)
        canvas.plain_log(axes)
        canvas.steps_axis(axes, steps)
        axes.set_ylabel(LABELS.get(metric, metric))
        canvas.legend_below(axes, 3)

    return plot(draw, title)


LABELS = {"fd": "Fréchet distance (lower is better)", "kid": "KID (lower is better)"}


def training(rows: Sequence[Row], title: str = "") -> Figure:
    """Every part of the loss over the steps of a training, smoothed over a fiftieth of it.

    Args:
        rows: each with `step` and numbers named `loss` or `loss/PART`.
        title: above the axes.
    """
    names = [name for name in dict.fromkeys(k for r in rows for k in r) if name.partition("/")[0] == "loss"]

    def draw(axes: Axes) -> None:
        for name in names:
            known = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            step, value = (np.array(v, float) for v in zip(*known, strict=True))
            part = name.partition("/")[2]
            own = canvas.styles([part])[0] if part in ("eps", "x0") else _PARTS.get(part, {"color": COLOURS["purple"]})
            style: dict[str, Any] = {**own, "marker": ""}
            value = _smoothed(value, max(1, len(value) // 50))
            axes.plot(step, value, label=part or "loss", **style)
        canvas.plain_log(axes)
        axes.set_xlabel("training step")
        axes.set_ylabel("loss")
        canvas.legend_below(axes, 4)

    return plot(draw, title)


_PARTS: dict[str, dict[str, Any]] = {
    "": {"color": COLOURS["ink"], "linestyle": "--", "zorder": 3},  # seen where it equals its only part
    "mu": {"color": COLOURS["blue"]},
}


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """A centred running mean, over fewer values at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    low, high = np.maximum(i - width, 0), np.minimum(i + width + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def ratio(rows: Sequence[Row], title: str = "") -> Figure:
    """The learned ratio over t, its spread over pixels, and the best constant one."""
    t = _column(rows, "t")

    def draw(axes: Axes) -> None:
        for low, high, alpha in (("ratio_q05", "ratio_q95", 0.14), ("ratio_q25", "ratio_q75", 0.22)):
            axes.fill_between(
                t, _column(rows, low), _column(rows, high), color=COLOURS["blue"], alpha=alpha, linewidth=0
            )
        axes.plot(t, _column(rows, "ratio_mean"), color=COLOURS["blue"], label="learned r (bands: 50%, 90% of pixels)")
        axes.errorbar(
            t, _column(rows, "ratio_best"), 2 * _column(rows, "ratio_best_se"), color=COLOURS["red"],
            marker="s", markersize=4, linestyle="none", elinewidth=1.2, label="best constant r* (± 2 s.e.)",
        )  # fmt: skip
        axes.plot(t, _column(rows, "ratio_velocity"), color=COLOURS["purple"], linestyle=":", label="σ² (v-prediction)")
        axes.set_ylim(-0.04, 1.04)
        _over_t(axes, "weight r of the direct route")
        canvas.legend_below(axes, 1)

    return plot(draw, title, 3.4)


_ROUTES = {
    "subtractive": ("subtractive: (x_t − σ ε)/α", "red", "-"),
    "direct": ("direct: x0 output", "green", "-"),
    "velocity": ("blend with r = σ²", "purple", ":"),
    "": ("blend with the learned r", "blue", "-"),
}


def route_errors(rows: Sequence[Row], crossings: Sequence[float] = (), title: str = "") -> Figure:
    """Square error of x0 over t: each route alone, and the blend."""
    t = _column(rows, "t")

    def draw(axes: Axes) -> None:
        for route in ("subtractive", "direct", ""):
            label, colour, line = _ROUTES[route]
            values = _column(rows, f"{route}_x0_error".removeprefix("_"))
            axes.plot(t, values, color=COLOURS[colour], linestyle=line, label=label)
        for crossing in crossings:
            axes.axvline(crossing, color=COLOURS["muted"], linewidth=1, linestyle="--")
            axes.annotate(f"t = {crossing:.0f}", (crossing, 0.03), (4, 0), ("data", "axes fraction"), "offset points")
        canvas.plain_log(axes)
        _over_t(axes, "mean square error of x0")
        canvas.legend_below(axes, 1)

    return plot(draw, title, 3.4)


def excess(rows: Sequence[Row], title: str = "", most: float = 30.0) -> Figure:
    """How much more each way to blend errs than the best constant ratio at that t, in percent."""
    t = _column(rows, "t")
    best = _column(rows, "best_x0_error")

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=COLOURS["muted"], linewidth=1)
        for route, (label, colour, line) in _ROUTES.items():
            values = 100 * (_column(rows, f"{route}_x0_error".removeprefix("_")) / best - 1)
            axes.plot(t, values, color=COLOURS[colour], linestyle=line, label=label)
        axes.set_ylim(min(-1.0, *(100 * (_column(rows, "blend_over_best") - 1))), most)
        _over_t(axes, "error above the best constant r, %")
        canvas.legend_below(axes, 1)

    return plot(draw, title, 3.6)


def models(rows: Models, title: str = "", error: str = "v_error") -> Figure:
    """One error over t, one line a model."""

    def draw(axes: Axes) -> None:
        for (name, own), style in zip(rows.items(), canvas.styles(list(rows)), strict=True):
            axes.plot(_column(own, "t"), _column(own, error), label=name, markersize=3.5, **style)
        canvas.plain_log(axes)
        _over_t(axes, f"mean square error of {error.removesuffix('_error')}")
        canvas.legend_below(axes, 3)

    return plot(draw, title)


def slope(rows: Sequence[Row], title: str = "") -> Figure:
    """Calibration over t: what x0 lacks, regressed on what the ratio adds; 1 is right."""
    t, value, se = (_column(rows, name) for name in ("t", "slope", "slope_se"))

    def draw(axes: Axes) -> None:
        axes.axhline(1, color=COLOURS["muted"], linewidth=1)
        axes.fill_between(t, value - 2 * se, value + 2 * se, color=COLOURS["blue"], alpha=0.22, linewidth=0)
        axes.plot(t, value, color=COLOURS["blue"], marker="o", markersize=3.5)
        if np.nanmax(value) > 10:
            canvas.plain_log(axes)
        _over_t(axes, "slope (band: ± 2 s.e.)")

    return plot(draw, title)


def reliability(rows: Sequence[Row], title: str = "", least: float = 0.01) -> Figure:
    """What the ratio says against what would have been best there, one point a bin of r and t.

    Args:
        rows: of `routes`' reliability.
        title: above the axes.
        least: bins that hold less than this share of a t's pixels, or of its |x0_θ − x0_eps|², are left out.
    """
    known = [r for r in rows if r["share"] >= least and r["weight"] >= least and r.get("ratio_best") is not None]

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1)
        sizes = 60 * np.sqrt(_column(known, "share"))
        points = axes.scatter(
            _column(known, "ratio_mean"), _column(known, "ratio_best"), sizes, _column(known, "t"),
            cmap="viridis", alpha=0.85, linewidths=0,
        )  # fmt: skip
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.1, 1.1)
        axes.set_xlabel("the ratio says")
        axes.set_ylabel("best ratio there")
        axes.figure.colorbar(points, ax=axes, label="t")

    return plot(draw, title, 3.3)


def spread_over_steps(rows: Models, title: str = "") -> Figure:
    """Spread of the images after each step, against the exact denoiser with the same sampler and the data."""
    first = next(iter(rows.values()))

    def draw(axes: Axes) -> None:
        x = _column(first, "k") + 1
        axes.plot(
            x, _column(first, "sd_data"), color=COLOURS["muted"], linestyle="-", label="noisy data", linewidth=1.2
        )
        axes.plot(
            x, _column(first, "sd_exact"), color=COLOURS["ink"], linestyle="--", label="exact denoiser", linewidth=1.4
        )
        for (name, own), style in zip(rows.items(), canvas.styles(list(rows)), strict=True):
            axes.plot(x, _column(own, "sd"), label=name, markersize=3.5, **style)
        canvas.plain_log(axes)
        _over_steps(axes, x, "standard deviation of a pixel")
        canvas.legend_below(axes, 2)

    return plot(draw, title, 3.3)


def per_step(rows: Models, column: str, label: str, title: str = "", scale: float = 1.0) -> Figure:
    """One column of `drift`'s rows over the steps, one line a model."""

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=COLOURS["muted"], linewidth=1)
        x = np.array([1.0])
        for (name, own), style in zip(rows.items(), canvas.styles(list(rows)), strict=True):
            x = _column(own, "k") + 1
            axes.plot(x, scale * _column(own, column), label=name, markersize=3.5, **style)
        _over_steps(axes, x, label)
        canvas.legend_below(axes, 3)

    return plot(draw, title, 2.8)


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([np.nan if r.get(name) is None else r[name] for r in rows], float)


def _over_t(axes: Axes, label: str) -> None:
    axes.set_xlabel("t  (0: clean, right: noise)")
    axes.set_ylabel(label)


def _over_steps(axes: Axes, x: np.ndarray, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_xlabel("after step")
    axes.set_ylabel(label)
    axes.set_xlim(float(x.min()) - 0.3, float(x.max()) + 0.3)
