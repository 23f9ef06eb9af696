"""A trained output, and a second one that a gate lets in where it was found to help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dualout.errors import InputError
from dualout.levels import HALF, Level, Scalar, per_image
from dualout.parameterizations.base import Parameterization, Route, check_channels, mean_square, subtract
from dualout.parameterizations.clean import CleanImage
from dualout.parameterizations.dual import Dual, blend, check_ratio, ratio_of, spread, unlearned_ratio
from dualout.parameterizations.epsilon import Epsilon
from dualout.prediction import Prediction, directly
from dualout.schedules import Schedule

RATIOS = ("closed", "pixel", "velocity", "flow")
SHUT = 120.0
"""A logit whose ratio is 0 or 1 in float32, to the last bit."""

_GATE = Dual(gate="balanced")


@dataclass(frozen=True)
class Upgraded(Parameterization):
    """Dual output on top of a network that was trained with one; channels as `Dual`'s, [eps (C), x0 (C), logit (1)].

    The trained output keeps its meaning: that of eps is in the place of `eps`, of a clean image in that of `x0`, and of
    a velocity in that of `eps`, whose route to x0 is then the velocity's own. The ratio is a logit a pixel plus a table
    of one number a time step, which is measured (`dualout.training.upgrade`), not learned:

        ratio = sigmoid(logit + table[t])

    The new output's error counts as it does in a blend whose ratio is that of v-prediction, in which x0 has the share
    s = sigma² / (alpha² + sigma²) and eps the rest, and a squared error the square of it:

        loss = |y − y_θ|² + s²·|x0 − x0_θ|²                   y what `base` was trained to say

    Without s, what it errs by where nobody asks it, x0 at low noise, draws the shared layers away from the trained
    output.

    Attributes:
        base: how the trained output is read.
        ratio: "closed": the trained output alone is used, bit for bit as before; "pixel": the gate is open where
            the table opens it; "velocity" and "flow": as in `Dual`; or a fixed number from 0 to 1 (x0 only).
        gate_weight: weight of the gate's loss, which is that of ``Dual(gate="balanced")``.
    """

    base: Parameterization = field(default_factory=Epsilon)
    ratio: str | float = "closed"
    gate_weight: float = 0.05

    def __post_init__(self) -> None:
        self.check_types()
        if not isinstance(self.base, Parameterization) or self.base.channels(3) != 3:
            raise InputError(
                f"an upgrade starts from a parameterization of one output, say Epsilon(); got {self.base!r}"
            )
        check_ratio(self.ratio, RATIOS)

    @property
    def trained(self) -> str:
        """Which of the two outputs is the trained one: "eps" (also where it is a velocity) or "x0"."""
        return "x0" if isinstance(self.base, CleanImage) else "eps"

    @property
    def closed(self) -> float:
        """The ratio that uses the trained output alone."""
        return 1.0 if self.trained == "x0" else 0.0

    @property
    def learns_ratio(self) -> bool:
        """Whether the gate is open."""
        return self.ratio == "pixel"

    def channels(self, image_channels: int) -> int:
        """2C + 1."""
        return 2 * image_channels + 1

    def input_scale(self, level: Level) -> Tensor | float | None:
        """That of `base`."""
        return self.base.input_scale(level)

    def head(self, schedule: Schedule) -> nn.Module | None:
        """The table of the gate, where it is open; one that nothing was measured for starts at the ratio "velocity"."""
        return GateTable(-schedule.log_snr.float()) if self.ratio == "pixel" else None

    def read(self, raw: Tensor, x_t: Tensor, level: Level) -> Prediction:
        """Blend the trained route and the new one."""
        channels, level = x_t.shape[1], level.over(x_t)
        check_channels(raw, x_t, (2 * channels + 1,), self.name)
        first, x0, logit = raw.split_with_sizes((channels, channels, 1), 1)
        p = self.base.read(x0 if self.trained == "x0" else first, x_t, level)
        eps = first if self.trained == "x0" else p.eps if p.direct is None else p.direct
        ratio = self._ratio(logit, level)
        parts = {**p.parts, "eps": eps, "x0": x0, "ratio": spread(ratio, x_t)}
        if isinstance(ratio, float) and ratio == self.closed:
            return directly(replace(p, parts=parts), p.direct)
        direct, subtractive = (p.x0, subtract(eps, x_t, level)) if self.trained == "x0" else (x0, p.x0)
        return Prediction(x_t, level, blend(ratio, direct, subtractive), parts)

    def _ratio(self, logit: Tensor, level: Level) -> Scalar:
        if self.ratio == "pixel":
            return logit.sigmoid()
        return self.closed if self.ratio == "closed" else unlearned_ratio(self.ratio, level)

    def losses(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """That of `base`, the new output's share of its own, and where the gate is open the gate's."""
        losses = self.base.losses(prediction, x0, eps)
        alpha, sigma = prediction.level
        if self.trained == "x0":
            losses["eps"] = _share(alpha, sigma) ** 2 * mean_square(eps - prediction.parts["eps"])
        else:
            losses["x0"] = _share(sigma, alpha) ** 2 * mean_square(x0 - prediction.parts["x0"])
        if self.ratio == "pixel":
            losses["mu"] = _GATE.losses(prediction, x0, eps)["mu"]
        return losses

    def weights(self, schedule: Schedule) -> Mapping[str, float]:
        """1 for either output, `gate_weight` for the gate."""
        return {**self.base.weights(schedule), "mu": self.gate_weight}

    def route(self, route: Route) -> Parameterization:
        """Read with another ratio: "eps" is 0, "x0" is 1, "velocity" and "flow" the blends of those names."""
        return self if route == "mix" else replace(self, ratio=ratio_of(route))


class GateTable(nn.Module):
    """Adds one number a time step to the ratio's logit, the last channel.

    Args:
        logits: (T,).
    """

    logits: Tensor

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GateTable:
        kept = self.logits
        super()._apply(fn, recurse)
        if self.logits.dtype in HALF:
            # as the noise levels: the network's precision is its own affair
            self.logits = kept.to(self.logits.device)
        return self

    def forward(self, raw: Tensor, t: Tensor) -> Tensor:
        """(B, 2C + 1, H, W), (B,) -> the same shape."""
        return torch.cat([raw[:, :-1], raw[:, -1:] + per_image(self.logits[t].to(raw.dtype), raw)], 1)


def _share(own: Scalar, other: Scalar) -> Scalar:
    """own² / (own² + other²): one number an image, (B,), or one for all."""
    share = own**2 / (own**2 + other**2)
    return share.flatten() if isinstance(share, Tensor) else share
