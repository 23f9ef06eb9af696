import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import dualout
from dualout.analysis.trajectories import Gaussian, drift, exact_variances, film
from dualout.levels import CLEAN
from dualout.parameterizations.dual import blend
from dualout.samplers import DDIM, DDPM, DPMSolver, FromDiffusers

SCHEDULE = dualout.schedules.Linear()


def exact(mean, covariance):
    """The exact ε network of Gaussian data, by a solve in pixel space: independent of the code under test."""

    def network(x_t, t):
        level = SCHEDULE.scalars(int(t[0]))
        flat = (x_t - level.alpha * mean).flatten(1).double()
        power = level.alpha**2 * covariance + level.sigma**2 * torch.eye(len(covariance), dtype=torch.float64)
        return (level.sigma * torch.linalg.solve(power, flat.T).T).view(x_t.shape).to(x_t.dtype)

    return dualout.Denoiser(network, dualout.Epsilon(), SCHEDULE)


def gaussian_images(n=4000, shape=(2, 3, 3)):
    generator = torch.Generator().manual_seed(0)
    d = math.prod(shape)
    root = 0.12 * torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5 * torch.arange(1, d + 1) ** 0.5
    mean = torch.tensor([0.3, -0.2], dtype=torch.float64).view(2, 1, 1).expand(shape)
    x = mean + (torch.randn(n, d, generator=generator, dtype=torch.float64) @ root.T).view(n, *shape)
    return x, mean, root @ root.T


def test_ddim_shrinks_data_as_the_product_of_its_gains():
    """Step by step by hand; and the published numbers for data of sd 0.30."""
    final = []
    for steps in (5, 10, 20, 50):
        sampler, variance, expected = DDIM(steps=steps), 0.09, []
        levels = [*(SCHEDULE.scalars(t) for t in sampler.timesteps(SCHEDULE)), CLEAN]
        gain = 1.0
        for t, s in pairwise(levels):
            w = t.alpha * variance / (t.alpha**2 * variance + t.sigma**2)
            gain *= s.alpha * w + s.sigma / t.sigma * (1 - t.alpha * w)
            expected.append(gain**2)
        found = exact_variances(sampler, SCHEDULE, torch.tensor([variance], dtype=torch.float64))
        assert found == pytest.approx(expected, rel=1e-9)
        final.append(found[-1] ** 0.5)
    assert final == pytest.approx([0.11, 0.18, 0.24, 0.27], abs=0.01)


@pytest.mark.parametrize("sampler", [DDIM(7), DDIM(7, eta=0.6), DDPM(6), DDPM(6, variance="small"), DPMSolver(6)])
def test_the_exact_curve_is_what_an_exact_denoiser_does(sampler):
    images, mean, covariance = gaussian_images()
    data = Gaussian.of(images)
    sampler = type(sampler)(**(sampler.fields() | {"clip": None}))
    rows = drift(exact(mean, covariance), sampler, data, range(1500), (2, 3, 3))
    levels = [*(SCHEDULE.scalars(t) for t in sampler.timesteps(SCHEDULE)[1:]), CLEAN]
    pixel = float(images.flatten(1).var(0).mean())
    for row, level in zip(rows, levels, strict=True):
        assert row["sd_data"] == pytest.approx((level.alpha**2 * pixel + level.sigma**2) ** 0.5)
        assert row["sd"] == pytest.approx(row["sd_exact"], rel=0.03)
        assert abs(row["drift"]) < 0.03
    assert rows[-1]["t_next"] == -1
    assert [row["t"] for row in rows] == sampler.timesteps(SCHEDULE)


def test_the_gaussian_of_a_set_also_with_fewer_images_than_pixels():
    images, mean, covariance = gaussian_images(20000)
    data = Gaussian.of(images)
    torch.testing.assert_close(data.mean, mean[:, 0, 0], atol=0.02, rtol=0)
    torch.testing.assert_close(data.spectrum, torch.linalg.eigvalsh(covariance), atol=0.01, rtol=0.05)
    few = images[:7]
    expected = torch.from_numpy(np.linalg.eigvalsh(np.cov(few.flatten(1).numpy().T)))
    torch.testing.assert_close(Gaussian.of(few).spectrum.sort().values, expected.clamp(min=0), atol=1e-12, rtol=1e-9)
    # rounding leaves the zero eigenvalue of the mean on either side
    assert all((Gaussian.of(images[:n]).spectrum >= 0).all() for n in range(2, 20))


def test_a_denoiser_that_is_off_drifts_and_clips():
    images, mean, covariance = gaussian_images()
    right = exact(mean, covariance)

    def brighter(x_t, t):
        level = SCHEDULE.scalars(int(t[0]))
        return right.network(x_t, t) - 0.9 * level.alpha / level.sigma

    denoiser = dualout.Denoiser(brighter, dualout.Epsilon(), SCHEDULE)
    rows = drift(denoiser, DDIM(5), Gaussian.of(images), range(64), (2, 3, 3))
    assert rows[-1]["drift"] > 0.3
    assert rows[-1]["drift"] == pytest.approx((rows[-1]["drift_0"] + rows[-1]["drift_1"]) / 2)
    assert rows[-1]["clipped"] > 0.1
    for row, m in zip(rows, DDIM(5).trajectory(denoiser, dualout.noise(range(64), (2, 3, 3))), strict=True):
        assert row["clipped"] == pytest.approx(float((m.prediction.x0.abs() > 1).double().mean()))
    assert "ratio_mean" not in rows[0]


def test_data_of_one_image_leave_nothing_to_vary():
    image = torch.full((2, 3, 3), 0.3, dtype=torch.float64)
    denoiser = dualout.Denoiser(lambda x, t: image.to(x).expand_as(x), dualout.CleanImage(), SCHEDULE)
    *_, last = drift(denoiser, DDIM(3), Gaussian.of(image.expand(5, 2, 3, 3)), range(4), (2, 3, 3))
    assert (last["sd_exact"], last["sd_data"]) == (0, 0)
    assert (last["sd"], last["drift"]) == pytest.approx((0, 0), abs=1e-6)


def test_batches_do_not_matter():
    images, mean, covariance = gaussian_images()
    data, denoiser = Gaussian.of(images), exact(mean, covariance)
    whole, parts = (drift(denoiser, DDPM(3), data, range(40), (2, 3, 3), batch_size=b) for b in (40, 7))
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


def test_a_film_shows_the_steps_the_routes_and_the_ratio():
    def network(x_t, t):
        return torch.cat([0.9 * x_t, 3 * x_t, x_t.mean(1, keepdim=True)], 1)

    denoiser, sampler = dualout.Denoiser(network, dualout.Dual(), SCHEDULE), DDIM(4)
    frames = list(film(denoiser, sampler, [3, 8], (2, 4, 4)))
    assert [f.k for f in frames] == [0, 1, 2, 3]
    assert [f.t for f in frames] == sampler.timesteps(SCHEDULE)
    torch.testing.assert_close(frames[-1].x_next, sampler.sample(denoiser, dualout.noise([3, 8], (2, 4, 4))))
    for f in frames:
        level = SCHEDULE.scalars(f.t)
        subtractive, direct = (f.x_t - level.sigma * 0.9 * f.x_t) / level.alpha, 3 * f.x_t
        torch.testing.assert_close(f.subtractive, subtractive.clamp(-1, 1))
        torch.testing.assert_close(f.direct, direct.clamp(-1, 1))
        torch.testing.assert_close(f.ratio, f.x_t.mean(1, keepdim=True).sigmoid())
        torch.testing.assert_close(f.x0, blend(f.ratio, direct, subtractive).clamp(-1, 1))


def test_a_film_of_a_single_output_has_no_ratio():
    frame = next(film(dualout.Denoiser(lambda x, t: x, dualout.Velocity(), SCHEDULE), DDIM(2), [0], (1, 4, 4)))
    assert frame.ratio is None
    assert frame.direct is None
    assert frame.subtractive is None


def test_schedulers_of_diffusers_have_no_exact_curve():
    assert exact_variances(FromDiffusers(steps=3), SCHEDULE, torch.ones(4)) is None
