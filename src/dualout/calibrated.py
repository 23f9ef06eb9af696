"""A few numbers a step that make a K-step trajectory end where the data are: a denoiser that wraps a denoiser.

With few steps the update itself errs, however good the denoiser: with the exact denoiser, five DDIM steps turn data of
standard deviation 0.30 into 0.11. A calibration corrects what a step sees, at its time t,

    logit of the ratio  →  ratio_gain·logit + ratio_shift         (before blending; dual output only)
    x0   →  x0_scale·(low(x0) + x0_fine·(x0 − low(x0)))           low: the mean of each square of 2×2 pixels
    eps  →  eps_scale·(low(eps) + eps_fine·(eps − low(eps)))
    x_t  →  alpha·x0 + sigma·eps of these
    x0   →  x0 + x0_trend·(clip(x0) − clip(x0 of the step before)), and eps as that x0 and x_t imply,

since what few steps lose depends on the variance of the data, of which images have little in fine detail, and on how x0
goes on between one step and the next: with x0_trend = h/2h₋, h the step in log(alpha/sigma) and h₋ the one before, DDIM
is DPM-Solver++ 2M. A Prediction it stays, so that every sampler that reads x_t, x0 and eps from Predictions is
corrected alike. UniPC's corrector makes x_t anew from x0: there the numbers of eps count in the first step alone.
"""

from __future__ import annotations

import operator
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dualout import checkpoint
from dualout.errors import InputError
from dualout.files import explained, read_json, sweep, write_json
from dualout.guidance import ClassifierFree
from dualout.parameterizations.base import subtract
from dualout.parameterizations.dual import blend
from dualout.prediction import Prediction
from dualout.schedules import schedule_of

NEUTRAL = {
    "x0_scale": 1.0, "eps_scale": 1.0, "x0_fine": 1.0, "eps_fine": 1.0, "ratio_gain": 1.0, "ratio_shift": 0.0,
    "x0_trend": 0.0,
}  # fmt: skip
"""Every number a step can have, and the value that changes nothing."""

DIRECTORY = "calibration"


@dataclass(frozen=True)
class Calibration:
    """The numbers of every step of one sampler, and how they were found."""

    sampler: dict[str, Any]
    """The sampler they were fitted for, as `Sampler.config()` writes it."""
    times: Sequence[int]
    """Its K time steps, those that it asks for or others that were found to do better."""
    values: Mapping[str, Sequence[float]]
    """By name of `NEUTRAL`, one number a step."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """How they were found: data, seeds, distance before and after, …"""

    def __post_init__(self) -> None:
        _check(self.times, self.values)

    def save(self, run: str | Path) -> Path:
        """Write it beside the weights, as RUN/calibration/SAMPLER.json; returns where."""
        directory = Path(run) / DIRECTORY
        with explained(directory):
            directory.mkdir(exist_ok=True)
        sweep(directory)
        path = directory / f"{file_name(self.sampler)}.json"
        write_json(path, self.record())
        return path

    def record(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        values = {k: [round(float(x), 7) for x in v] for k, v in self.values.items()}
        times = [int(t) for t in self.times]
        return {"sampler": self.sampler, "times": times, "values": values, "protocol": self.protocol}

    @classmethod
    def load(cls, run: str | Path, sampler: dict[str, Any]) -> Calibration:
        """Read the calibration of a sampler from a checkpoint directory.

        Raises:
            InputError: when the checkpoint has none for this sampler, or it is damaged or another sampler's.
        """
        directory = checkpoint.locate(run) / DIRECTORY
        path = directory / f"{file_name(sampler)}.json"
        if not path.is_file():
            present = ", ".join(sorted(p.stem for p in directory.glob("*.json"))) or "none"
            spacing = f" --spacing {sampler['spacing']}" if isinstance(sampler["spacing"], str) else ""
            raise InputError(
                f"{run} has no calibration for {file_name(sampler)} (it has: {present}); make one with dualout "
                f"calibrate {shlex.quote(str(run))} --sampler {':'.join([sampler['name'], *_options(sampler)])} "
                f"--steps {sampler['steps']}{spacing}"
            )
        try:
            content = read_json(path)
            if not all(isinstance(content.get(k, {}), dict) for k in ("sampler", "values", "protocol")):
                raise ValueError("sampler, values and protocol are objects")
            values = {k: [float(x) for x in v] for k, v in content["values"].items()}
            found = cls(content["sampler"], [int(t) for t in content["times"]], values, content.get("protocol", {}))
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{path} is damaged: {error}; calibrate again") from error
        if not all(abs(x) < 1e3 for v in found.values.values() for x in v):
            raise InputError(f"{path} holds numbers that no calibration has; calibrate again")
        # names of files do not tell one list of time steps from another, nor one range of clipping
        for key, value in found.sampler.items():
            if sampler.get(key, value) != value:
                raise InputError(
                    f"{path} was fitted for a sampler with {key} {value}, not {sampler[key]}; calibrate again"
                )
        return found


def _check(times: Sequence[int], values: Mapping[str, Sequence[float] | Tensor]) -> None:
    unknown = sorted(values.keys() - NEUTRAL.keys())
    wrong = [k for k, v in values.items() if len(v) != len(times)]
    if unknown or wrong:
        raise InputError(f"a calibration has one number a step of {', '.join(NEUTRAL)}; wrong: {unknown + wrong}")


def file_name(sampler: Mapping[str, Any]) -> str:
    """A sampler's settings as a file name: ddim-5-trailing, dpmsolver-10-linspace-order=3."""
    spacing = sampler["spacing"] if isinstance(sampler["spacing"], str) else "own"
    clip = (
        [] if tuple(sampler["clip"] or ()) == (-1.0, 1.0) else ["unclipped" if sampler["clip"] is None else "clipped"]
    )
    return "-".join([str(sampler["name"]), str(sampler["steps"]), spacing, *_options(sampler), *clip])


def _options(sampler: Mapping[str, Any]) -> list[str]:
    """What a kind of sampler has beside what all have, where it is not as usual."""
    plain = {"name", "steps", "spacing", "clip"}
    defaults = {"eta": 0.0, "variance": "large", "published": False}
    return [f"{k}={v}" for k, v in sampler.items() if k not in plain and defaults.get(k) != v]


class Calibrated(nn.Module):
    """A denoiser, corrected at each of the K time steps of one sampler.

    Args:
        denoiser: what is corrected.
        times: the K time steps.
        values: by name of `NEUTRAL`, one number a step: floats, or a tensor (K,) to find them by gradients.
        clip: the sampler's, to which x0 is clipped where it is compared with that of the step before.

    With an x0_trend it remembers the x0 of the step before, so that it follows one trajectory at a time.

    Raises:
        InputError: for a guided denoiser (put guidance around `Calibrated`, not inside); for what is no denoiser; and
            where there is not one number a step.
    """

    def __init__(
        self,
        denoiser: Callable[..., Prediction],
        times: Sequence[int],
        values: Mapping[str, Sequence[float] | Tensor],
        clip: Sequence[float] | None = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        if isinstance(denoiser, ClassifierFree):
            raise InputError(
                "guidance goes around a calibration, not into it: ClassifierFree(Calibrated(denoiser, …), scale, …)"
            )
        _check(times, values)
        self.denoiser = denoiser
        self.schedule = schedule_of(denoiser, "a calibration wraps")
        self.step_of = {int(t): k for k, t in enumerate(times)}
        self.values = dict(values)
        self.clip = clip
        self._seen: dict[int, Tensor] = {}

    @classmethod
    def of(cls, denoiser: Callable[..., Prediction], calibration: Calibration) -> Calibrated:
        """Apply a calibration."""
        return cls(denoiser, calibration.times, calibration.values, calibration.sampler.get("clip"))

    if TYPE_CHECKING:  # torch's is of Any
        __call__: Callable[..., Prediction]

    @property
    def follows(self) -> bool:
        """Whether it goes on from the step before, which then has to be of the same batch."""
        return "x0_trend" in self.values

    def forward(self, x_t: Tensor, t: int | Tensor, **conditions: Any) -> Prediction:
        """Look at noisy images at one of the K time steps.

        Raises:
            InputError: at another time step than the calibrated ones.
        """
        try:
            k = self.step_of.get(operator.index(t))  # also of numpy's integers, and of a tensor of one
        except TypeError:
            k = None
        if k is None:
            raise InputError(f"this calibration is for the time steps {list(self.step_of)}, got {t}")
        value = {name: values[k] for name, values in self.values.items()}
        trend = value.pop("x0_trend", None)
        p = corrected(self.denoiser(x_t, t, **conditions), **value)
        return p if trend is None else self._followed(p, k, trend)

    def _followed(self, p: Prediction, k: int, trend: Tensor | float) -> Prediction:
        """Going on by `trend` as x0 went since the step before; the first step has none."""
        if k == 0:
            self._seen.clear()
        x0 = p.x0 if self.clip is None else p.x0.clamp(*self.clip)
        # Heun looks at a level twice, so the last two are kept
        self._seen.pop(k - 2, None)
        self._seen[k] = x0
        before = self._seen.get(k - 1)
        return p if before is None else Prediction(p.x_t, p.level, p.x0 + trend * (x0 - before), p.parts)


def corrected(
    p: Prediction,
    x0_scale: Tensor | float = 1.0,
    eps_scale: Tensor | float = 1.0,
    ratio_gain: Tensor | float = 1.0,
    ratio_shift: Tensor | float = 0.0,
    x0_fine: Tensor | float = 1.0,
    eps_fine: Tensor | float = 1.0,
) -> Prediction:
    """The Prediction that a step sees."""
    x0 = p.x0
    neutral = isinstance(ratio_gain, float) and isinstance(ratio_shift, float) and (ratio_gain, ratio_shift) == (1, 0)
    if "ratio" in p.parts and not neutral:
        ratio = torch.sigmoid(p.parts["ratio"].logit(eps=1e-6) * ratio_gain + ratio_shift)
        x0 = blend(ratio, p.parts["x0"], subtract(p.parts["eps"], p.x_t, p.level))
        p = Prediction(p.x_t, p.level, x0, {**p.parts, "ratio": ratio})
    eps = _fine(p.eps, eps_fine) * eps_scale
    x0 = _fine(x0, x0_fine) * x0_scale
    return Prediction(p.level.alpha * x0 + p.level.sigma * eps, p.level, x0, p.parts)


def _fine(x: Tensor, scale: Tensor | float) -> Tensor:
    """(B, C, H, W), with what differs from the mean of its square of 2×2 pixels scaled."""
    if isinstance(scale, float) and scale == 1:
        return x
    low = nn.functional.avg_pool2d(x, 2, ceil_mode=True)
    return torch.lerp(nn.functional.interpolate(low, size=x.shape[-2:], mode="nearest"), x, scale)
