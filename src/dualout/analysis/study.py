"""All that is measured of one model, and the figures that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualout.analysis import figures, pictures
from dualout.analysis.routes import crossings
from dualout.analysis.tables import Row, measured
from dualout.analysis.trajectories import Frame
from dualout.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FRAME = ("x_t", "x0", "x_next", "subtractive", "direct", "ratio")


class Drawing(NamedTuple):
    """A figure, what it is called and what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Study:
    """What `routes`, `drift` and `film` found.

    Attributes:
        protocol: the model, the data, the sampler, the seeds: whatever is needed to find the same again.
        routes: one row a t.
        reliability: one row a bin of r and t; empty for single outputs.
        trajectory: one row a step.
        maps: r of each pixel, mean over images, by t.
        frames: a film of a few images.
    """

    protocol: Row
    routes: Sequence[Row]
    reliability: Sequence[Row] = ()
    trajectory: Sequence[Row] = ()
    maps: Mapping[int, Tensor] = field(default_factory=dict)
    frames: Sequence[Frame] = ()

    @property
    def dual(self) -> bool:
        """Whether the model has two routes."""
        return bool(self.routes) and "ratio_mean" in self.routes[0]

    @property
    def crossings(self) -> list[float]:
        """The t at which the two routes are equally wrong."""
        return crossings(self.routes)

    def tables(self) -> dict[str, Sequence[Row]]:
        """The tidy tables by name; those without rows are left out."""
        found = {"routes": self.routes, "reliability": self.reliability, "trajectory": self.trajectory}
        return {name: rows for name, rows in found.items() if rows}

    def document(self) -> dict[str, Any]:
        """All but the pictures, as plain JSON values."""
        return {"protocol": self.protocol, "crossings": self.crossings, **self.tables()}

    def arrays(self) -> dict[str, np.ndarray]:
        """The pictures, as arrays."""
        found: dict[str, np.ndarray] = {}
        if self.maps:
            found["map_t"] = np.array(list(self.maps))
            found["maps"] = torch.stack(list(self.maps.values())).float().cpu().numpy()
        if self.frames:
            found["film_t"] = np.array([f.t for f in self.frames])
        for name in _FRAME:
            values = [getattr(f, name) for f in self.frames]
            if values and all(v is not None for v in values):
                found[f"film_{name}"] = torch.stack(values).float().cpu().numpy()
        return found

    @classmethod
    def of(cls, document: Any, arrays: Mapping[str, np.ndarray]) -> Study:
        """Rebuild from `document` and `arrays`.

        Raises:
            InputError: when they are none.
        """
        try:
            tables = {
                name: [dict(r) for r in document.get(name, ())] for name in ("routes", "reliability", "trajectory")
            }
            maps = {
                int(t): torch.from_numpy(m)
                for t, m in zip(arrays.get("map_t", ()), arrays.get("maps", ()), strict=True)
            }
            frames = [
                Frame(k, int(t), **{n: _frame(arrays, n, k) for n in _FRAME})
                for k, t in enumerate(arrays.get("film_t", ()))
            ]
            return cls(dict(document["protocol"]), **tables, maps=maps, frames=frames)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"this is no analysis: {type(error).__name__}: {error}") from error

    def drawings(self) -> list[Drawing]:
        """The figures of this model alone."""
        return [*self.inside(), *self.film()]

    def inside(self) -> list[Drawing]:
        """The figures of the two routes and their ratio; none for single outputs."""
        return [*self._ratio(), *self._blend()] if self.dual else []

    def film(self) -> list[Drawing]:
        """The film of the first image; none when there are no frames."""
        if not self.frames:
            return []
        sampler = self.protocol.get("sampler", "the sampler")
        both = "" if self.frames[0].ratio is None else ", x0 by each route alone, and the weight r of the direct one"
        return [
            Drawing(
                "film", "From noise to image",
                f"Each column is one step of {sampler}, its t above: the noisy image, the predicted clean "
                f"image{both}.",
                pictures.film(self.frames),
            )
        ]  # fmt: skip

    def _ratio(self) -> list[Drawing]:
        rows = self.routes
        found = [
            Drawing(
                "ratio", "The learned weight r over t",
                "r = 0 uses the subtractive route, r = 1 the direct one. The squares are the weight of least "
                "error, measured on held-out images.",
                figures.ratio(rows),
            )
        ]  # fmt: skip
        # a gate that is shut adds nothing at any t
        if any(measured(r.get("slope")) for r in rows):
            found.append(
                Drawing(
                    "slope", "Calibration of r over t",
                    "The regression slope of what x0 lacks on what the ratio adds: 1 where r is right, above 1 where r "
                    "is too small.",
                    figures.slope(rows),
                )
            )  # fmt: skip
        if self.reliability:
            found.append(
                Drawing(
                    "reliability", "What r says, and what would have been best",
                    "Pixels by what their r said (one point a bin and t, larger for more pixels): a calibrated ratio "
                    "lies on the line.",
                    figures.reliability(self.reliability),
                )
            )  # fmt: skip
        if self.maps:
            shown = list(self.maps)[:: max(1, -(-len(self.maps) // 12))]
            found.append(
                Drawing(
                    "maps", "Where in the image r is large",
                    "r of each pixel, mean over held-out images, from nearly clean (t = 0) to nearly pure noise.",
                    pictures.ratio_maps({t: self.maps[t] for t in shown}),
                )
            )  # fmt: skip
        return found

    def _blend(self) -> list[Drawing]:
        return [
            Drawing(
                "routes", "Error of the two routes over t",
                "Subtracting the noise is precise where there is little of it; asking for the image is, where there is "
                "much.",
                figures.route_errors(self.routes, self.crossings),
            ),
            Drawing(
                "excess", "What the blend loses",
                "Error of x0 above that of the best constant r at each t; 0 is as good as any constant, below 0 is "
                "what choosing pixel by pixel gains.",
                figures.excess(self.routes),
            ),
        ]  # fmt: skip


def _frame(arrays: Mapping[str, np.ndarray], name: str, k: int) -> Any:
    found = arrays.get(f"film_{name}")
    if found is None and name in ("x_t", "x0", "x_next"):
        raise KeyError(f"film_{name}")
    return None if found is None else torch.from_numpy(found[k])


def together(studies: Mapping[str, Study]) -> list[Drawing]:
    """The figures that hold models against each other (or show one)."""
    found = []
    routes = {name: s.routes for name, s in studies.items() if s.routes}
    if routes:
        found.append(
            Drawing(
                "errors", "Error over t, in the scale of v",
                "Square error on held-out images with the same noise; the scale of v makes every t count alike "
                "(v = alpha·ε − sigma·x0).",
                figures.models(routes),
            )
        )  # fmt: skip
    paths = {name: s.trajectory for name, s in studies.items() if s.trajectory}
    if not paths:
        return found
    samplers = {s.protocol.get("sampler", "") for s in studies.values() if s.trajectory}
    sampler = samplers.pop() if len(samplers) == 1 else "each model's sampler"
    found.append(
        Drawing(
            "spread", "Spread of the images on the way",
            f"Standard deviation of a pixel over seeds after each step of {sampler}. What even the exact denoiser "
            "(of Gaussian data with the set's covariance) loses against noisy data is the sampler's doing.",
            figures.spread_over_steps(paths),
        )
    )  # fmt: skip
    if ranged := {name: rows for name, rows in paths.items() if "clipped" in rows[0]}:
        found.append(
            Drawing(
                "clipped", "Clipped pixels",
                f"Share of the predicted pixels outside the range of images, at each step of {sampler}.",
                figures.per_step(ranged, "clipped", "pixels clipped, %", scale=100),
            )
        )  # fmt: skip
    found.append(
        Drawing(
            "drift", "Drift of the mean",
            "Mean of all pixels after each step, less that of noisy data at the same level; 0 is right.",
            figures.per_step(paths, "drift", "drift of the mean"),
        )
    )  # fmt: skip
    return found
