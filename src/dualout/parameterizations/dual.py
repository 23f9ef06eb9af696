"""Noise and clean image are both predicted, and blended pixel by pixel.

Benny & Wolf, Dynamic Dual-Output Diffusion Models, CVPR 2022, arXiv 2203.04304:

    x0_eps = (x_t − sigma·eps_θ) / alpha                     the subtractive route
    ratio  = sigmoid(logit)
    x0_mix = ratio·x0_θ + (1 − ratio)·x0_eps

    loss = (|eps − eps_θ|² + |x0 − x0_θ|² + |mu(x0, x_t) − mu(sg[x0_mix], x_t)|²) / 3

where sg stops the gradient of both routes, so that the last term teaches the ratio only. mu, the mean of
q(x_{t−1} | x_t, x0), is affine in x0 at fixed x_t: mixing the means is mixing x0, and the last term is
gain_t²·|x0 − x0_mix|².

| here | paper |
|---|---|
| `eps`, `x0`, `ratio` | ε_θ, x_θ, r_θ |
| `gain` | √ᾱ_{t−1}·β_t / (1 − ᾱ_t) |

The two need not be noise and clean image: `first` and `second` may be any two single outputs, say v and x0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualout.errors import InputError, unknown
from dualout.levels import Level, Scalar, per_image
from dualout.parameterizations.base import Parameterization, Route, SingleOutput, check_channels, log, mean_square
from dualout.parameterizations.clean import CleanImage
from dualout.parameterizations.epsilon import Epsilon
from dualout.prediction import Prediction, directly
from dualout.schedules import Schedule

LEARNED = ("pixel", "channel", "image", "step")
RATIOS = (*LEARNED, "velocity", "flow")
GATES = ("posterior", "balanced")
BLEND: dict[str, Any] = {"gate": "balanced", "blend_weight": 1.0, "eps_weight": 0.3}
"""Dual output whose blend is trained too: the best in few steps in most of docs/results."""


@dataclass(frozen=True)
class Dual(Parameterization):
    """Two outputs and the weight that blends them; channels [first (C), second (C), ratio logit (1)].

    Attributes:
        ratio: where the ratio comes from. "pixel": one logit a pixel (the paper). "channel": one a pixel and
            channel. "image": the mean of the logit over the pixels. "step": a learned table, one number a time step.
            "velocity": sigma² / (alpha² + sigma²), with which eps and x0 are v-prediction; "flow": sigma / (alpha +
            sigma), with which they are rectified flow's velocity; or a fixed number from 0 (the first output only) to 1
            (the second only).
        gate: what teaches the ratio. "posterior": the paper's L_mu, whose weight falls from 1 at t = 0 to 1.7e-8 at
            t = 999 of the linear schedule. "balanced": a zero logit is the best ratio of two outputs that err alike
            ("velocity" for eps and x0), and each image's squared error is divided by the mean square of what the two
            routes differ by, so that every t teaches alike.
        detach: whether the routes are detached in the gate's loss (the paper).
        gate_weight: weight of the gate's loss; None is 1 for "posterior" and 0.05 for "balanced".
        eps_weight: weight of the first output's loss, |eps − eps_θ|².
        x0_weight: weight of the second output's loss, |x0 − x0_θ|².
        blend_weight: weight of the blend's own error in v, |v − v_mix|² with v_mix = alpha·eps_mix − sigma·x0_mix. It
            reaches both outputs and the ratio; the paper has none.
        first: what the first output is; used alone where the ratio is 0. Not a clean image, nor `second` noise: among
            the parts, `ratio` is the weight of `x0`, and `eps` is what the other route says.
        second: what the second output is; used alone where the ratio is 1.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dual-blend": BLEND}

    ratio: str | float = "pixel"
    gate: str = "posterior"
    detach: bool = True
    gate_weight: float | None = None
    eps_weight: float = 1.0
    x0_weight: float = 1.0
    blend_weight: float = 0.0
    first: SingleOutput = field(default_factory=Epsilon)
    second: SingleOutput = field(default_factory=CleanImage)

    def __post_init__(self) -> None:
        self.check_types()
        check_ratio(self.ratio, RATIOS)
        if self.gate not in GATES:
            raise unknown("gate", self.gate, GATES)
        for name in ("eps_weight", "x0_weight", "blend_weight", "gate_weight"):
            if not 0 <= (getattr(self, name) or 0.0) < math.inf:
                raise InputError(f"{name} is a number, 0 or more; got {getattr(self, name)!r}")
        pair = (self.first, self.second)
        plain = all(isinstance(p, SingleOutput) and p.input_scale(Level(1.0, 1.0)) is None for p in pair)
        if not plain or self.first.symbol == self.second.symbol:
            raise InputError(
                "first and second are two different single outputs of the same input, say Velocity() and "
                f"CleanImage(); got {self.first!r} and {self.second!r}"
            )
        if isinstance(self.first, CleanImage) or isinstance(self.second, Epsilon):
            raise InputError(
                "where one of two outputs is a clean image it is the second, and where one is noise it is the first; "
                f"got {self.first!r} and {self.second!r}"
            )

    @property
    def learns_ratio(self) -> bool:
        """Whether the two routes are blended by a learned ratio."""
        return self.ratio in LEARNED

    def channels(self, image_channels: int) -> int:
        """2C + 1; 3C with one ratio a channel; 2C where no output of the network is a ratio."""
        ratios = {"pixel": 1, "image": 1, "channel": image_channels}
        return 2 * image_channels + (ratios.get(self.ratio, 0) if isinstance(self.ratio, str) else 0)

    def head(self, schedule: Schedule) -> nn.Module | None:
        """The learned table of the ratio "step"."""
        return StepRatio(schedule.steps) if self.ratio == "step" else None

    def read(self, raw: Tensor, x_t: Tensor, level: Level) -> Prediction:
        """Blend the two routes."""
        channels, level = x_t.shape[1], level.over(x_t)
        given = check_channels(raw, x_t, self.accepts(channels), self.name)
        one, two, logit = raw.split_with_sizes((channels, channels, given - 2 * channels), 1)
        ratio = self._ratio(logit, level)
        x0_one, x0_two = self.first.to_x0(one, x_t, level), self.second.to_x0(two, x_t, level)
        parts = {self.first.symbol: one, self.second.symbol: two, "ratio": spread(ratio, x_t)}
        if "eps" not in parts:
            parts["eps"] = (x_t - level.alpha * x0_one) / level.sigma
        if "x0" not in parts:
            parts["x0"] = x0_two
        # what needs no gradient and nobody else holds may be written over
        mix = blend(ratio, x0_two, x0_one, inplace=not raw.requires_grad and x0_one is not one)
        first_alone = isinstance(ratio, float) and ratio == 0
        return directly(Prediction(x_t, level, mix, parts), one if first_alone and self.first.is_noise else None)

    def accepts(self, image_channels: int) -> tuple[int, ...]:
        """What the head leaves, where the ratio is learned; a network that learned one may be read without it."""
        c = image_channels
        if self.ratio in LEARNED:
            return (3 * c if self.ratio == "channel" else 2 * c + 1,)
        return (2 * c, 2 * c + 1, 3 * c)

    def _ratio(self, logit: Tensor, level: Level) -> Scalar:
        if self.ratio not in LEARNED:
            return unlearned_ratio(self.ratio, level)
        if self.ratio == "image":
            logit = logit.mean(tuple(range(1, logit.ndim)), keepdim=True)
        if self.gate == "balanced":
            logit = logit + 2 * log(self.first.gain(level) / self.second.gain(level))
        return logit.sigmoid()

    def losses(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """Those of the two outputs and, where the ratio is learned, the gate's loss."""
        losses = self.first.losses(prediction, x0, eps) | self.second.losses(prediction, x0, eps)
        if self.ratio in LEARNED or not self.detach:
            losses["mu"] = self._gate_loss(prediction, x0)
        if self.blend_weight:
            # v_mix is affine in x0_mix at fixed x_t
            alpha, sigma = prediction.level
            gain = (alpha**2 + sigma**2) / sigma
            losses["blend"] = mean_square(gain * (x0 - prediction.x0))
        return losses

    def _gate_loss(self, prediction: Prediction, x0: Tensor) -> Tensor:
        x_t, level, parts = prediction.x_t, prediction.level, prediction.parts
        one, two = (p.to_x0(parts[p.symbol], x_t, level) for p in (self.first, self.second))
        if self.detach:
            one, two = one.detach(), two.detach()
        error = mean_square(x0 - blend(parts["ratio"], two, one))
        if self.gate == "posterior":
            if level.gain is None:
                raise InputError("the gate 'posterior' needs levels from Schedule.level, which know their step's gain")
            gain = level.gain.flatten() if isinstance(level.gain, Tensor) else level.gain
            return gain**2 * error
        # where the routes agree to the last digit there is nothing to choose: the floor keeps 0 / 0 at 0
        apart = mean_square((two - one).detach())
        return error / apart.clamp(min=torch.finfo(apart.dtype).eps)

    def weights(self, schedule: Schedule) -> Mapping[str, float]:
        """A third each, times their weights."""
        gate = self.gate_weight
        if gate is None:
            gate = 1.0 if self.gate == "posterior" else 0.05
        parts = {self.first.symbol: self.eps_weight, self.second.symbol: self.x0_weight}
        parts |= {"mu": gate, "blend": self.blend_weight}
        return {name: weight / 3 for name, weight in parts.items()}

    def route(self, route: Route) -> Parameterization:
        """Read with another ratio: "eps" is 0, "x0" is 1, "velocity" and "flow" the blends of those names."""
        return self if route == "mix" else replace(self, ratio=ratio_of(route))


def check_ratio(ratio: str | float, names: Sequence[str]) -> None:
    """Refuse what is neither one of the names nor a fixed ratio."""
    if isinstance(ratio, str) and ratio not in names:
        raise unknown("ratio", ratio, [*names, "a number from 0 to 1"])
    if not isinstance(ratio, str) and not 0 <= ratio <= 1:
        raise InputError(f"a fixed ratio is a number from 0 (eps only) to 1 (x0 only), got {ratio!r}")


def unlearned_ratio(ratio: str | float, level: Level) -> Scalar:
    """The ratio of that name, "velocity" or "flow", or the number itself."""
    alpha, sigma = level
    if ratio == "velocity":
        return sigma**2 / (alpha**2 + sigma**2)
    return sigma / (alpha + sigma) if ratio == "flow" else float(ratio)


def spread(ratio: Scalar, x_t: Tensor) -> Tensor:
    """A ratio for all images in every pixel, (B, 1, H, W); one that has the images' dimensions stays as it is."""
    if isinstance(ratio, Tensor) and ratio.ndim == x_t.ndim:
        return ratio
    # a number is filled in where the images are: nothing is copied there
    ratio = ratio.to(x_t) if isinstance(ratio, Tensor) else x_t.new_full((), ratio)
    return ratio.expand(x_t.shape[0], 1, *x_t.shape[2:])


def ratio_of(route: Route) -> str | float:
    """The ratio that uses one route.

    Raises:
        InputError: for a route that dual output has not.
    """
    if not isinstance(route, str):
        return route
    known: dict[str, str | float] = {"eps": 0.0, "x0": 1.0, "velocity": "velocity", "flow": "flow"}
    if route not in known:
        raise unknown("route", route, ["mix", *known, "a number from 0 to 1"])
    return known[route]


class StepRatio(nn.Module):
    """One ratio logit a time step, put where the network's would be."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(steps))

    def forward(self, raw: Tensor, t: Tensor) -> Tensor:
        """(B, 2C, H, W), (B,) -> (B, 2C + 1, H, W)."""
        logit = per_image(self.logit[t].to(raw.dtype), raw)
        return torch.cat([raw, logit.expand(raw.shape[0], 1, *raw.shape[2:])], 1)


def blend(ratio: Scalar, x0: Tensor, x0_eps: Tensor, *, inplace: bool = False) -> Tensor:
    """ratio·x0 + (1 − ratio)·x0_eps; a ratio of 0 or 1 is exact, whatever the other route holds.

    `inplace` may write it into `x0_eps`.
    """
    if isinstance(ratio, float):
        return x0_eps if ratio == 0 else x0 if ratio == 1 else torch.lerp(x0_eps, x0, ratio)
    return x0_eps.lerp_(x0, ratio) if inplace else torch.lerp(x0_eps, x0, ratio)


def optimal_ratio(level: Level, variance_x0: Scalar, variance_eps: Scalar, correlation: Scalar = 0.0) -> Scalar:
    """The ratio of least error, when the errors of the two heads are known (closed form).

    With a = x0_θ − x0 of variance `variance_x0`, e = eps_θ − eps of variance `variance_eps` and their correlation
    ρ, the subtractive route errs by −(sigma/alpha)·e, and

        r* = (s² + ρ·s·s_x) / (s² + s_x² + 2ρ·s·s_x),    s = (sigma/alpha)·√variance_eps, s_x = √variance_x0
    """
    s, s_x = level.sigma / level.alpha * variance_eps**0.5, variance_x0**0.5
    cross = correlation * s * s_x
    return (s**2 + cross) / (s**2 + s_x**2 + 2 * cross)
