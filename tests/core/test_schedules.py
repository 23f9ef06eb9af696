"""Each schedule is the one that its paper writes down, and refuses what is none."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.levels import CLEAN, Level
from dualout.parameterizations import Epsilon
from dualout.samplers.diffusers import check_schedule
from dualout.schedules import EDM, Cosine, FromBetas, Linear, RectifiedFlow, ScaledLinear, Schedule


def products(betas: np.ndarray) -> np.ndarray:
    """ᾱ_t, one factor at a time."""
    out, product = [], 1.0
    for beta in betas:
        product *= 1 - float(beta)
        out.append(product)
    return np.array(out)


def test_linear_is_ddpm() -> None:
    level = Linear(100, 1e-3, 0.2).level(torch.arange(100))
    expected = products(np.linspace(1e-3, 0.2, 100))
    np.testing.assert_allclose(level.alpha**2, expected, rtol=1e-12)
    np.testing.assert_allclose(level.sigma**2, 1 - expected, rtol=1e-12)


def test_defaults_are_the_papers() -> None:
    assert Linear() == Linear(steps=1000, beta_start=1e-4, beta_end=2e-2)
    assert Cosine() == Cosine(steps=1000, offset=0.008, beta_max=0.999)
    # DDPM's last ᾱ, and where IDDPM's figure 5 has its cosine halfway
    assert Linear().scalars(999).alpha ** 2 == pytest.approx(4.0358e-5, rel=1e-4)
    assert Cosine().scalars(499).alpha ** 2 == pytest.approx(0.4938, abs=1e-4)


def test_scaled_linear_is_latent_diffusions() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(ScaledLinear().level(torch.arange(1000)).alpha ** 2, products(betas), rtol=1e-12)


def test_cosine_follows_its_curve_until_beta_is_capped() -> None:
    def f(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = Cosine()
    for t in (0, 10, 500, 990):
        assert schedule.scalars(t).alpha ** 2 == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert schedule.variances().max() == 0.999


def test_from_betas_repeats_another() -> None:
    for betas in (Linear(50).variances(), Linear(50).variances().tolist(), tuple(Linear(50).variances().tolist())):
        same = FromBetas(betas)
        assert same.steps == 50
        assert same == FromBetas(betas)
        assert hash(same) == hash(FromBetas(betas))
        torch.testing.assert_close(same.log_snr, Linear(50).log_snr)


def test_messages_do_not_write_tables_out() -> None:
    assert str(FromBetas(Linear().variances())) == "frombetas of 1000 steps"
    assert str(Cosine(50)) == "cosine:steps=50"
    scheduler = pytest.importorskip("diffusers").DDIMScheduler()
    with pytest.raises(InputError, match=r"another noise schedule than the denoiser \(frombetas of 1000 steps\)"):
        check_schedule(scheduler, FromBetas(torch.linspace(1e-4, 0.05, 1000)))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rectified_flow_is_straight(shift: float) -> None:
    alpha, sigma = RectifiedFlow(99, shift=shift).level(torch.arange(99))[:2]
    torch.testing.assert_close(alpha + sigma, torch.ones(99, dtype=torch.float64))
    s = torch.arange(1, 100, dtype=torch.float64) / 100
    # shifting multiplies the noise-to-signal ratio
    torch.testing.assert_close(sigma / alpha, shift * s / (1 - s))


def test_edm_keeps_the_image() -> None:
    alpha, sigma = EDM(18).level(torch.arange(18))[:2]
    assert (alpha == 1).all()
    assert sigma[0] == pytest.approx(0.002)
    assert sigma[-1] == pytest.approx(80)
    # equation 5 of the paper counts from the noisy end
    i = 5
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert sigma[17 - i] == pytest.approx(expected)


def test_gain_falls_as_the_design_says() -> None:
    gain = Linear().level(torch.arange(1000)).gain
    assert gain is not None
    assert gain[0] == pytest.approx(1)
    assert gain[999] ** 2 == pytest.approx(1.66e-8, rel=0.02)
    assert 1 / Linear().scalars(999).alpha == pytest.approx(157, rel=0.01)


@pytest.mark.parametrize(
    "t", [-1, 1000, True, 3.0, None, [1, 2], np.array([1, 2]), torch.tensor([5, -1]), torch.tensor([1000]),
          torch.tensor([True]), torch.tensor([1.0])], ids=repr,
)  # fmt: skip
def test_what_is_no_time_step_is_refused(t: object) -> None:
    # −1 would be T−1 to a table, and True a new axis
    with pytest.raises(InputError, match="a time step is an integer from 0 to 999, got"):
        Linear().level(t)  # type: ignore[arg-type]


def test_clean_has_no_noise() -> None:
    assert (CLEAN.alpha, CLEAN.sigma, CLEAN.gain) == (1.0, 0.0, None)
    x = torch.zeros(2, 1, 2, 2)
    assert CLEAN.like(x) == CLEAN
    assert Level(1, 0).like(x)[:2] == (1, 0)


def test_a_level_may_be_written_to() -> None:
    schedule = Linear()
    for t in (5, torch.tensor(5), torch.tensor([5])):
        alpha, sigma = schedule.level(t)
        alpha *= alpha
        sigma.zero_()
    assert torch.equal(schedule.level(5).alpha, Linear().level(5).alpha)
    assert schedule.scalars(5) == Linear().scalars(5)


def test_any_number_of_time_steps_is_looked_up() -> None:
    for t in (torch.empty(0, dtype=torch.long), torch.tensor([[1, 2, 3], [4, 5, 6]])):
        assert Linear().level(t).sigma.shape == t.shape


def test_tables_stay_float64_until_they_are_used() -> None:
    level = Linear().level(torch.tensor([0, 999]))
    assert level.alpha.dtype == torch.float64
    assert level.like(torch.zeros(2, 1, 2, 2)).alpha.dtype == torch.float32
    exact = level.like(torch.zeros(2, 1, 2, 2, dtype=torch.float64))
    assert torch.equal(exact.alpha, level.alpha.view(2, 1, 1, 1))
    # and where they are, for which the meta device stands
    assert all(number.is_meta for number in level.like(torch.zeros(2, 1, 2, 2, device="meta")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_looked_up_at_once_to_the_same_numbers(dtype: torch.dtype) -> None:
    x, t = torch.zeros(3, 1, 2, 2, dtype=dtype), torch.tensor([0, 999, 500])
    apart, at_once = Linear().level(t).like(x), Linear().level_for(x, t)
    flat = [[level.alpha, level.sigma, *level.posterior] for level in (apart, at_once)]  # type: ignore[misc]
    assert len(flat[1]) == 5
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*flat, strict=True))
    with pytest.raises(InputError, match="from 0 to 999, got -1 to 5"):
        Linear().level_for(x, torch.tensor([5, -1, 0]))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Linear(0), "from 1 to 100000 steps, got 0"),
        (lambda: Linear(2.5), "steps of schedule 'linear' is a whole number; got 2.5"),  # type: ignore[arg-type]
        (lambda: Linear(True), "steps of schedule 'linear' is a whole number; got True"),
        (lambda: Linear(beta_start=0.0), "beta_start=0.0"),
        (lambda: Linear(beta_start=0.3, beta_end=0.2), "beta_start=0.3, beta_end=0.2"),
        (lambda: ScaledLinear(beta_end=1.5), "beta_end=1.5"),
        (lambda: Linear(beta_end=math.nan), "beta_end=nan"),
        (lambda: Cosine(beta_max=2.0), "beta_max < 1"),
        (lambda: Cosine(offset=-1.0), "offset >= 0"),
        (lambda: RectifiedFlow(shift=0.0), "shift is a number above 0, got 0.0"),
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda: FromBetas([]), "one or more numbers between 0 and 1"),
        (lambda: FromBetas([0.1, 1.0]), "one or more numbers between 0 and 1"),
        (lambda: FromBetas([0.1, 1.0]), "a last β of 1 leaves nothing of the image: say 1 − 2⁻¹²"),
        (lambda: FromBetas([0.1, -0.1]), "one or more numbers between 0 and 1"),
        (lambda: FromBetas([0.9999] * 1000).level(0), "alpha 0 and sigma 1 at t = 80"),
    ],
)
def test_what_is_no_schedule_is_refused(make, says: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert says in str(error.value)


def test_tables_of_ones_own() -> None:
    """They may be arrays or float32; those of another length, or upside down, would show in the samples only."""

    class Own(Schedule):
        def tables(self):
            return made

    s = np.linspace(0.01, 0.99, 20, dtype=np.float32)
    made = np.sqrt(1 - s), np.sqrt(s)
    assert Own(20).level(3).alpha.dtype == torch.float64
    assert Own(20).scalars(3).sigma == float(np.sqrt(s)[3])
    levels = Own(20).levels
    assert levels.alpha.dtype == torch.float64
    np.testing.assert_array_equal(levels.sigma, np.sqrt(s).astype(np.float64))
    with pytest.raises(InputError, match=r"each of its 30 steps; got \(20,\) and \(20,\)"):
        Own(30).level(3)
    made = (np.sqrt(s),)
    with pytest.raises(InputError, match=r"the two tables of schedule 'own' .* got \(20,\)$"):
        Own(20).level(3)
    # upside down, with and without a signal that falls
    for made in ((np.sqrt(s), np.sqrt(1 - s)), (np.ones(20), 80 * (1 - s))):  # noqa: B007
        with pytest.raises(InputError, match="schedule 'own' has less noise at some t than at t − 1"):
            Own(20).scalars(3)
    for first, last, says in ((0.0, 1.0, "sigma 0 at t = 0"), (0.1, math.inf, "sigma inf at t = 19")):
        made = np.ones(20), np.array([first, *np.linspace(0.2, 0.9, 18), last])
        with pytest.raises(InputError, match=f"schedule 'own' has alpha 1 and {says}; both are above 0"):
            Denoiser(lambda x, t: x, Epsilon(), Own(20))


def test_the_levels_of_a_schedule_are_those_of_each_step_and_nobody_elses() -> None:
    schedule = Linear(20)
    levels, expected = schedule.levels, schedule.level(torch.arange(20))
    assert torch.equal(torch.stack([*levels, *levels.posterior]), torch.stack([*expected, *expected.posterior]))
    levels.alpha.zero_()
    assert torch.equal(schedule.levels.alpha, expected.alpha)
    assert torch.equal(schedule.level(3).alpha, expected.alpha[3])


def test_a_level_is_its_two_scales_and_keeps_its_step() -> None:
    level = Linear().level(torch.tensor([0, 500, 999]))
    alpha, sigma = level
    assert torch.equal(alpha, level.alpha)
    assert torch.equal(sigma, level.sigma)
    # another alpha or sigma is another step
    assert level._replace(alpha=alpha / 2).gain is None
    for same in (copy.deepcopy(level), pickle.loads(pickle.dumps(level)), level.map(lambda v: v)):
        assert all(map(torch.equal, same, level))
        assert all(map(torch.equal, same.posterior, level.posterior))
