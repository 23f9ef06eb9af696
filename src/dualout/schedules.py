"""Noise schedules: how much signal and how much noise an image holds at each step.

    x_t = alpha_t · x0 + sigma_t · eps,   t = 0 … T−1,   "clean" is alpha 1, sigma 0

| here | DDPM (Ho et al. 2020, arXiv 2006.11239) |
|---|---|
| `alpha` | √ᾱ_t |
| `sigma` | √(1 − ᾱ_t) |

Tables are float64 and are cast on use.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from dualout.errors import InputError
from dualout.levels import Level, Posterior, lasting
from dualout.registry import Registered

_MOST = 100_000
"""Steps of a schedule, of which each has its numbers in tables; more is a slip, or damage."""


@dataclass(frozen=True)
class Schedule(Registered, ABC):
    """T noise levels, from nearly clean (t = 0) to nearly pure noise (t = T−1)."""

    kind: ClassVar[str] = "schedule"
    steps: int = 1000

    def __post_init__(self) -> None:
        self.check_types()
        if not 1 <= self.steps <= _MOST:
            raise InputError(f"a schedule has from 1 to {_MOST} steps, got {self.steps!r}")

    def __str__(self) -> str:
        """The spec, for messages; of a table, how long it is."""
        return spec if len(spec := self.spec) < 200 else f"{self.name} of {self.steps} steps"

    @abstractmethod
    def tables(self) -> tuple[Tensor, Tensor]:
        """`alpha` and `sigma` of every t, each of shape (T,), float64: what a schedule is given by; `levels` has them
        checked."""

    @property
    def levels(self) -> Level[Tensor]:
        """The noise level at every t: tensors (T,), float64, on the CPU.

        Raises:
            InputError: for tables that are no noise schedule's.
        """
        # not the tables themselves, which could be written to
        return self._levels.map(Tensor.clone)

    @cached_property
    def _levels(self) -> Level[Tensor]:
        """Every t at once: tables of shape (T,), float64."""
        with torch.device("cpu"):  # whatever torch.set_default_device says
            # of a class of one's own they may be arrays, or float32
            tables = [torch.as_tensor(table, dtype=torch.float64) for table in self.tables()]
        if [table.shape for table in tables] != [(self.steps,)] * 2:
            raise InputError(
                f"the two tables of schedule {self.name!r} have one number for each of its {self.steps} steps; got "
                f"{' and '.join(str(tuple(table.shape)) for table in tables[:3])}"
            )
        alpha, sigma = tables
        bad = ~((alpha > 0) & (sigma > 0) & alpha.isfinite() & sigma.isfinite())
        if bad.any():
            t = int(bad.nonzero()[0])
            raise InputError(
                f"schedule {self.name!r} has alpha {alpha[t]:.3g} and sigma {sigma[t]:.3g} at t = {t}; both are above "
                "0 at every t, so that either can be divided by"
            )
        if ((sigma / alpha).diff() < 0).any():
            raise InputError(f"schedule {self.name!r} has less noise at some t than at t − 1; it rises from t = 0 on")
        before_alpha = torch.cat([alpha.new_ones(1), alpha[:-1]])
        before_sigma = torch.cat([sigma.new_zeros(1), sigma[:-1]])
        step = alpha / before_alpha
        large = sigma**2 - step**2 * before_sigma**2
        small = large * before_sigma**2 / sigma**2
        small[0] = small[1] if self.steps > 1 else large[0]
        return Level(alpha, sigma, Posterior(before_alpha * large / sigma**2, large, small))

    @cached_property
    def _scalars(self) -> list[Level[float]]:
        lists = self._levels.map(Tensor.tolist)
        return [lists.map(lambda values, t=t: values[t]) for t in range(self.steps)]

    @cached_property
    def _on_device(self) -> dict[torch.device, Tensor]:
        return {}

    def level(self, t: int | Tensor) -> Level[Tensor]:
        """The noise level at step `t`: an int gives 0-d tensors, a LongTensor (B,) gives tensors (B,), float64.

        Of times on Apple's GPUs, which have no float64, they are float32.

        Raises:
            InputError: when `t` is outside 0 … T−1 (of a tensor on the CPU), or not of integers.
        """
        if not isinstance(t, Tensor):
            index = self._index(t)
            # not a view, through which the table could be written to
            return self._levels.map(lambda table: table[index].clone())
        rows = self._rows(t)
        return _unstacked(rows.view(len(rows), *t.shape))

    def level_for(self, x: Tensor, t: Tensor) -> Level[Tensor]:
        """``level(t).like(x)`` for time steps (B,), its five numbers looked up and cast at once.

        Raises:
            InputError: as `level`.
        """
        rows = self._rows(t).to(device=x.device, dtype=x.dtype)
        return _unstacked(rows.view(*rows.shape, *[1] * (x.ndim - 1)))

    def scalars(self, t: int) -> Level[float]:
        """The noise level at step `t` as Python floats, for coefficients that are computed once."""
        if type(t) is int and 0 <= t < self.steps:
            return self._scalars[t]
        return self._scalars[self._index(t)]

    @property
    def log_snr(self) -> Tensor:
        """log(alpha² / sigma²) at every t, of shape (T,), float64."""
        alpha, sigma = self._levels
        return 2 * (alpha.log() - sigma.log())

    def _index(self, t: Any) -> int:
        try:
            index = -1 if isinstance(t, bool) else operator.index(t)  # also of numpy's integers
        except TypeError:
            index = -1
        if not 0 <= index < self.steps:
            raise InputError(f"a time step is an integer from 0 to {self.steps - 1}, got {t!r}")
        return index

    def _rows(self, t: Tensor) -> Tensor:
        """A level's numbers at B time steps, stacked: (5, B), float64."""
        if t.dtype.is_floating_point or t.dtype == torch.bool:
            raise InputError(f"a time step is an integer from 0 to {self.steps - 1}, got a tensor of {t.dtype}")
        try:
            # not table[t], which takes −1 for T−1
            return self._stacked_on(t.device).index_select(0, t.long().reshape(-1)).t()
        except IndexError as error:
            raise InputError(
                f"a time step is an integer from 0 to {self.steps - 1}, got {int(t.min())} to {int(t.max())}"
            ) from error

    def _stacked_on(self, device: torch.device) -> Tensor:
        """A level's numbers at every t: (T, 5)."""
        found = self._on_device.get(device)
        if found is None:
            level = self._levels
            assert level.posterior is not None
            # Apple's GPUs have no float64; elsewhere the tables keep it until they are used
            dtype = torch.float32 if device.type == "mps" else torch.float64
            found = torch.stack([*level, *level.posterior], 1).to(device, dtype)
            if lasting(found):
                self._on_device[device] = found
        return found


def schedule_of(denoiser: Any, asks: str) -> Schedule:
    """The noise levels of a denoiser, plain or wrapped.

    Raises:
        InputError: for anything else, say a network; it begins with `asks`.
    """
    schedule = getattr(denoiser, "schedule", None)
    if not isinstance(schedule, Schedule):
        raise InputError(
            f"{asks} a denoiser, which has a schedule; got {type(denoiser).__name__}. dualout.Denoiser(network, …) "
            "makes one of a network; DDP and torch's averages hold theirs as .module"
        )
    return schedule


def _unstacked(numbers: Tensor) -> Level[Tensor]:
    """A level of which each entry is a row."""
    alpha, sigma, *posterior = numbers.unbind()
    return Level(alpha, sigma, Posterior(*posterior))


class _Betas(Schedule, ABC):
    """A variance-preserving schedule given by the variance β_t that each step adds."""

    @abstractmethod
    def variances(self) -> Tensor:
        """β_t, of shape (T,), float64."""

    def tables(self) -> tuple[Tensor, Tensor]:
        """`alpha` and `sigma` of every t, each of shape (T,), float64."""
        signal = torch.cumprod(1 - self.variances(), 0)
        return signal.sqrt(), (1 - signal).sqrt()


@dataclass(frozen=True)
class Linear(_Betas):
    """β rises linearly (DDPM, Ho et al. 2020, section 4).

    The values are those of T = 1000. Fewer steps need larger ones in proportion: with these, alpha is 0.6 at the last
    of 100, and what samples begin with, noise alone, is nothing that a network was trained on.
    """

    beta_start: float = 1e-4
    beta_end: float = 2e-2

    def variances(self) -> Tensor:
        """β_t, of shape (T,), float64."""
        return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self.beta_start, self.beta_end)


@dataclass(frozen=True)
class ScaledLinear(_Betas):
    """√β rises linearly (latent diffusion, Rombach et al. 2022)."""

    beta_start: float = 0.00085
    beta_end: float = 0.012

    def variances(self) -> Tensor:
        """β_t, of shape (T,), float64."""
        return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64) ** 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self.beta_start, self.beta_end)


@dataclass(frozen=True)
class Cosine(_Betas):
    """ᾱ follows a squared cosine (IDDPM, Nichol & Dhariwal 2021, equation 17)."""

    offset: float = 0.008
    beta_max: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.offset >= 0 and 0 < self.beta_max < 1):
            raise InputError(f"needs offset >= 0 and 0 < beta_max < 1, got {self.offset} and {self.beta_max}")

    def variances(self) -> Tensor:
        """β_t, of shape (T,), float64."""
        time = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        signal = torch.cos((time + self.offset) / (1 + self.offset) * math.pi / 2) ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(max=self.beta_max)


@dataclass(frozen=True)
class FromBetas(_Betas):
    """A schedule given by its table of β."""

    steps: int = field(default=0, init=False)
    betas: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        try:
            values = self.betas.tolist() if isinstance(self.betas, Tensor) else self.betas
            betas = tuple(float(b) for b in values)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"betas are a list of numbers between 0 and 1, got {self.betas!r}") from error
        if not betas or not all(0 < b < 1 for b in betas):
            nothing = "; a last β of 1 leaves nothing of the image: say 1 − 2⁻¹²" if betas[-1:] == (1.0,) else ""
            raise InputError(
                f"betas are one or more numbers between 0 and 1, got {len(betas)}: {betas[:4]} … {betas[-1:]}{nothing}"
            )
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "steps", len(betas))

    def variances(self) -> Tensor:
        """β_t, of shape (T,), float64."""
        return torch.tensor(self.betas, dtype=torch.float64)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """Straight lines between image and noise: alpha = 1 − s, sigma = s (Liu et al. 2022, arXiv 2209.03003).

    s = (t + 1) / (T + 1) before shifting, so that neither end divides by zero; ``shift`` > 1 moves the steps
    towards noise, s → shift·s / (1 + (shift − 1)·s) (Esser et al. 2024, arXiv 2403.03206, equation 23).
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shift < math.inf:
            raise InputError(f"shift is a number above 0, got {self.shift}")

    def tables(self) -> tuple[Tensor, Tensor]:
        """`alpha` and `sigma` of every t, each of shape (T,), float64."""
        s = torch.arange(1, self.steps + 1, dtype=torch.float64) / (self.steps + 1)
        s = self.shift * s / (1 + (self.shift - 1) * s)
        return 1 - s, s


@dataclass(frozen=True)
class EDM(Schedule):
    """Noise is added and the image kept: alpha = 1 (Karras et al. 2022, arXiv 2206.00364, equation 5)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.sigma_min < self.sigma_max < math.inf and self.rho > 0):
            raise InputError(
                f"needs 0 < sigma_min < sigma_max and rho > 0, got {self.sigma_min}, {self.sigma_max} and {self.rho}"
            )

    def tables(self) -> tuple[Tensor, Tensor]:
        """`alpha` and `sigma` of every t, each of shape (T,), float64."""
        ramp = torch.linspace(0, 1, self.steps, dtype=torch.float64)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma = (low + ramp * (high - low)) ** self.rho
        return torch.ones_like(sigma), sigma


def _check_range(start: float, end: float) -> None:
    if not 0 < start <= end < 1:
        raise InputError(f"needs 0 < beta_start <= beta_end < 1, got beta_start={start}, beta_end={end}")
