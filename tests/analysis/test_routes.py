import math

import numpy as np
import pytest
import torch

import dualout
from dualout.analysis.routes import crossings, grid, routes
from dualout.errors import InputError
from dualout.parameterizations.dual import optimal_ratio
from dualout.randomness import mix

SCHEDULE = dualout.schedules.Linear()
VARIANCE = 0.25
"""Of the pixels, which are independent: the exact denoiser is known."""


class Injected:
    """A dual-output network that errs from the exact one by noise of known variance and correlation.

    Errors and ratio may differ between the left half of the image and the right one.
    """

    def __init__(self, sd_eps, sd_x0, correlation=0.0, ratio=0.5, seed=5):
        self.sd_eps, self.sd_x0, self.correlation, self.ratio = sd_eps, sd_x0, correlation, ratio
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x_t, t):
        level = SCHEDULE.scalars(int(t[0]))
        power = level.alpha**2 * VARIANCE + level.sigma**2
        z, w = (torch.randn(x_t.shape, generator=self.generator, dtype=x_t.dtype) for _ in range(2))
        e = _halves(x_t, self.sd_eps) * z
        a = _halves(x_t, self.sd_x0) * (self.correlation * z + math.sqrt(1 - self.correlation**2) * w)
        ratio = self.ratio(level) if callable(self.ratio) else self.ratio
        logit = _halves(x_t, ratio).logit()[:, :1]
        return torch.cat([level.sigma / power * x_t + e, level.alpha * VARIANCE / power * x_t + a, logit], 1)


def _halves(x, value):
    left, right = value if isinstance(value, tuple) else (value, value)
    out = torch.full_like(x, right)
    out[..., : x.shape[-1] // 2] = left
    return out


def images(n=400, c=2, size=8):
    generator = torch.Generator().manual_seed(1)
    return VARIANCE**0.5 * torch.randn(n, c, size, size, generator=generator, dtype=torch.float64)


def measured(network, times, parameterization=None, **options):
    denoiser = dualout.Denoiser(network, parameterization or dualout.Dual(), SCHEDULE)
    return list(routes(denoiser, images(), times, **options))


@pytest.mark.parametrize("correlation", [-0.6, 0.0, 0.4])
def test_the_best_ratio_is_the_closed_form_of_the_injected_errors(correlation):
    sd_eps, sd_x0 = 0.1, 0.15
    for row, *_ in measured(Injected(sd_eps, sd_x0, correlation, 0.4), [50, 200, 400, 700, 950]):
        expected = optimal_ratio(SCHEDULE.scalars(row["t"]), sd_x0**2, sd_eps**2, correlation)
        assert abs(row["ratio_best"] - expected) < 5 * row["ratio_best_se"] < 0.2
        assert row["ratio_closed_form"] == pytest.approx(row["ratio_best"], abs=1e-9)
        assert row["ratio_mean"] == pytest.approx(0.4, abs=1e-6)
        assert row["ratio_gap"] == pytest.approx(abs(0.4 - row["ratio_best"]), abs=1e-6)
        assert abs(row["slope"] - expected / 0.4) < 5 * row["slope_se"]


def test_standard_errors_are_the_spread_over_noises():
    found = [measured(Injected(0.1, 0.15, seed=100 + seed), [300], seed=seed)[0].row for seed in range(12)]
    spread = torch.tensor([row["ratio_best"] for row in found]).std().item()
    assert 0.5 < spread / found[0]["ratio_best_se"] < 2


def test_standard_errors_are_over_images_however_many_noises_each_is_given():
    """A network that errs by the image, whatever its noise: more noises of it say nothing new."""

    def found(repeats):
        x0 = images(200, 1)
        tilt = 0.2 * torch.randn(len(x0), 1, 1, 1, generator=torch.Generator().manual_seed(3), dtype=x0.dtype)

        def network(x_t, t):
            level = SCHEDULE.scalars(int(t[0]))
            eps = (x_t - level.alpha * x0) / level.sigma
            return torch.cat([eps + tilt, x0 + tilt.flip(0), torch.zeros_like(eps)], 1)

        return next(iter(routes(dualout.Denoiser(network, dualout.Dual(), SCHEDULE), x0, [300], repeats=repeats))).row

    once, often = found(1), found(9)
    for name in ("ratio_best", "ratio_best_se", "slope", "slope_se"):
        assert often[name] == pytest.approx(once[name], rel=1e-6)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_best_ratio_of_routes_one_apart_is_a_mean_and_has_a_means_standard_error(count):
    # what the subtractive route lacks is one number an image, and the direct one is 1 above it
    x0, lacks = images(count, 1), torch.linspace(-0.3, 1.1, count, dtype=torch.float64) ** 2

    def network(x_t, t):
        level = SCHEDULE.scalars(int(t[0]))
        below = x0 - lacks.view(-1, 1, 1, 1)
        return torch.cat([(x_t - level.alpha * below) / level.sigma, below + 1, torch.zeros_like(x0)], 1)

    row = next(iter(routes(dualout.Denoiser(network, dualout.Dual(), SCHEDULE), x0, [300]))).row
    assert row["ratio_best"] == pytest.approx(float(lacks.mean()))
    assert row["ratio_best_se"] == pytest.approx(float(lacks.std()) / count**0.5)


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.05, 0), (0.95, 9), (1.0, 9)])
def test_ratios_of_0_and_1_are_in_the_outer_bins(ratio, expected):
    at = measured(Injected(0.1, 0.1, ratio=ratio), [300])[0]
    (row,) = at.reliability
    assert (row["bin"], row["share"], row["weight"]) == (expected, 1, 1)
    assert row["ratio_mean"] == pytest.approx(ratio)
    assert row["ratio_best"] == pytest.approx(at.row["ratio_best"])


@pytest.mark.parametrize(("off_eps", "off_x0", "best"), [(0.2, 0.0, 1.0), (0.0, 0.2, 0.0), (0.2, 0.2, None)])
def test_an_output_that_makes_no_error_correlates_with_none(off_eps, off_x0, best):
    x0 = images(50, 1)
    eps = dualout.noise(mix(0, 0, np.arange(50)), x0.shape[1:], dtype=x0.dtype)

    def network(x_t, t):
        return torch.cat([eps + off_eps * x0.sign(), x0 + off_x0 * x0.sign(), torch.zeros_like(x0)], 1)

    row = next(iter(routes(dualout.Denoiser(network, dualout.Dual(), SCHEDULE), x0, [300]))).row
    # too much noise in eps is too little image, by sigma / alpha: errors of one sign in both cancel in between
    gain = row["sigma"] / row["alpha"]
    assert row["ratio_best"] == pytest.approx(gain / (1 + gain) if best is None else best, abs=1e-6)
    assert row["heads_correlation"] == pytest.approx(1.0 if best is None else 0.0, abs=1e-6)


def test_errors_are_the_known_ones_in_every_scale():
    sd_eps, sd_x0, r = 0.1, 0.15, 0.3
    for row, *_ in measured(Injected(sd_eps, sd_x0, 0.0, r), [20, 300, 800]):
        alpha, sigma = SCHEDULE.scalars(row["t"])
        floor = VARIANCE * sigma**2 / (alpha**2 * VARIANCE + sigma**2)
        gain = sigma / alpha
        x0_error = floor + (r * sd_x0) ** 2 + ((1 - r) * gain * sd_eps) ** 2
        assert row["direct_x0_error"] == pytest.approx(floor + sd_x0**2, rel=0.02)
        assert row["subtractive_x0_error"] == pytest.approx(floor + (gain * sd_eps) ** 2, rel=0.02)
        assert row["x0_error"] == pytest.approx(x0_error, rel=0.02)
        assert row["eps_error"] == pytest.approx(row["x0_error"] / gain**2)
        assert row["v_error"] == pytest.approx(row["x0_error"] / sigma**2)
        assert row["best_x0_error"] <= min(row["x0_error"], row["velocity_x0_error"], row["direct_x0_error"])
        assert row["blend_over_best"] == pytest.approx(row["x0_error"] / row["best_x0_error"])


def test_the_velocity_error_is_that_of_the_velocity_route():
    network = Injected(0.2, 0.1)
    row = measured(network, [250])[0].row
    network.generator.manual_seed(5)
    view = dualout.Denoiser(network, dualout.Dual(), SCHEDULE).route("velocity")
    assert next(routes(view, images(), [250])).row["x0_error"] == pytest.approx(row["velocity_x0_error"])


def test_routes_cross_where_the_errors_are_equal():
    sd_eps, sd_x0 = 0.1, 0.15
    rows = [at.row for at in measured(Injected(sd_eps, sd_x0), grid(SCHEDULE, 40))]
    alpha, sigma = SCHEDULE.tables()
    expected = int((sigma / alpha < sd_x0 / sd_eps).sum())
    (crossing,) = crossings(rows)
    assert abs(crossing - expected) < 6


def test_a_gate_that_knows_its_pixels_is_calibrated_and_one_that_does_not_is_found_out():
    sd_eps, sd_x0 = (0.05, 0.2), (0.2, 0.05)

    def best(level):
        return tuple(optimal_ratio(level, x**2, e**2) for e, x in zip(sd_eps, sd_x0, strict=True))

    def swapped(level):
        return best(level)[::-1]

    good = measured(Injected(sd_eps, sd_x0, ratio=best), [250])[0]
    assert abs(good.row["slope"] - 1) < 5 * good.row["slope_se"] < 0.1
    assert good.row["blend_over_best"] < 1, "better than every constant"
    assert sum(b["share"] for b in good.reliability) == pytest.approx(1)
    for b in good.reliability:
        assert b["ratio_best"] == pytest.approx(b["ratio_mean"], abs=0.03)
    bad = measured(Injected(sd_eps, sd_x0, ratio=swapped), [250])[0]
    assert bad.row["slope"] < 0.9
    assert bad.row["blend_over_best"] > 1
    assert any(abs(b["ratio_best"] - b["ratio_mean"]) > 0.3 for b in bad.reliability)


def test_what_is_left_out_of_many_pixels_is_no_column(monkeypatch):
    monkeypatch.setattr("dualout.analysis.routes._MOST", 400 * 64 // 4)

    def network(x_t, t):
        logit = torch.full_like(x_t[:, :1], 0.2).logit()
        logit[..., ::4] = -logit[..., ::4]
        return torch.cat([x_t, torch.zeros_like(x_t), logit], 1)

    (at,) = measured(network, [500])
    assert at.row["ratio_mean"] == pytest.approx(float(at.ratio_map.mean()), abs=0.01)


def test_quantiles_are_of_the_pixels():
    row = measured(Injected(0.1, 0.1, ratio=(0.2, 0.7)), [500])[0].row
    assert (row["ratio_q25"], row["ratio_q75"]) == pytest.approx((0.2, 0.7), abs=1e-6)
    assert row["ratio_mean"] == pytest.approx(0.45, abs=1e-6)
    assert row["ratio_sd"] == pytest.approx(0.25, abs=1e-6)


def test_single_outputs_have_the_errors_and_nothing_else():
    def exact_eps(x_t, t):
        level = SCHEDULE.scalars(int(t[0]))
        return level.sigma / (level.alpha**2 * VARIANCE + level.sigma**2) * x_t

    for row, reliability, ratio_map in measured(exact_eps, [100, 600], dualout.Epsilon()):
        alpha, sigma = SCHEDULE.scalars(row["t"])
        floor = VARIANCE * sigma**2 / (alpha**2 * VARIANCE + sigma**2)
        assert row["x0_error"] == pytest.approx(floor, rel=0.02)
        assert not any(name.startswith(("ratio", "slope", "direct", "subtractive", "best")) for name in row)
        assert reliability == []
        assert ratio_map is None
        assert crossings([row]) == []


def test_a_fixed_ratio_has_routes_and_the_right_slope():
    row = measured(lambda x, t: torch.cat([x * 0.5, x * 0.1], 1), [300], dualout.Dual(ratio=0.25))[0].row
    assert row["ratio_mean"] == pytest.approx(0.25)
    assert row["slope"] == pytest.approx(row["ratio_best"] / 0.25)


def test_noise_is_the_same_for_every_batch_size_and_time():
    seen = {}

    def watching(x_t, t):
        level = SCHEDULE.scalars(int(t[0]))
        seen.setdefault(int(t[0]), []).append((x_t - level.alpha * images()[: len(x_t)]) / level.sigma)
        return x_t

    measured(watching, [100, 600], dualout.Epsilon(), batch_size=400)
    torch.testing.assert_close(seen[100][0], seen[600][0], rtol=0, atol=1e-9)
    whole = measured(lambda x, t: 0.3 * x, [100], dualout.Velocity(), batch_size=400)[0].row
    parts = measured(lambda x, t: 0.3 * x, [100], dualout.Velocity(), batch_size=37)[0].row
    assert whole == pytest.approx(parts, rel=1e-12)
    other = measured(lambda x, t: 0.3 * x, [100], dualout.Velocity(), seed=1)[0].row
    assert other["x0_error"] != whole["x0_error"]


def test_repeats_add_noises():
    rows = [measured(Injected(0.1, 0.15), [300], repeats=n)[0].row for n in (1, 4)]
    assert rows[1]["ratio_best_se"] == pytest.approx(rows[0]["ratio_best_se"] / 2, rel=0.2)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_the_grid_is_increasing_and_reaches_both_ends(steps):
    times = grid(dualout.schedules.Linear(steps=steps))
    assert times == sorted(set(times))
    assert (times[0], times[-1]) == (0, steps - 1)


def test_no_images_is_refused():
    with pytest.raises(InputError, match="got none"):
        next(routes(dualout.Denoiser(lambda x, t: x, dualout.Epsilon(), SCHEDULE), torch.zeros(0, 1, 4, 4)))


def test_a_grid_has_an_interval():
    assert grid(dualout.schedules.Linear(steps=1000), 1) == [0, 3, 10, 20, 999]
    with pytest.raises(InputError, match="1 or more intervals, got 0"):
        grid(SCHEDULE, 0)
