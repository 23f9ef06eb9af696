"""The fit of a calibration finds what a trajectory lacks: where it begins, what decides, and what it leaves alone."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from dualout import CleanImage, Denoiser, Dual, Epsilon, InputError, noise, samplers
from dualout.calibrated import NEUTRAL, Calibrated
from dualout.networks.build import build
from dualout.randomness import mix
from dualout.training import activations, starts
from dualout.training import calibrate as calibrating
from dualout.training.calibrate import RACE, Fit, fit, parameters_of
from dualout.training.comparison import HELD_OUT, PLACES, UPDATES, Comparison
from dualout.training.distances import SlicedWasserstein
from dualout.training.starts import Start, coordinate_search
from gaussian import MEAN, SCHEDULE, SPREAD, exact


class Exact(torch.nn.Module):
    def forward(self, x_t, t):
        return exact(x_t, t)


def applied(start, denoiser, sampler):
    values = start.values(denoiser.schedule)
    return Calibrated(denoiser, start.times, values, sampler.clip), sampler.at(start.times)


def test_the_start_that_is_ahead_goes_on():
    """With the exact denoiser 2M is nearer than DDIM from the first; a fit may not begin behind it."""
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    data = MEAN + SPREAD * noise(range(1000), (1, 4, 4))
    how = Fit(iterations=1, batch=64, lr=1e-6, move_times=0, held_out=250)
    sampler, comparison = samplers.DDIM(steps=8, spacing="logsnr"), Comparison(denoiser, data, how)
    uncalibrated = Start(["x0_trend"], sampler.timesteps(SCHEDULE))
    plain, second = (
        comparison.held_out(*applied(s, denoiser, sampler)).distance for s in uncalibrated.alternatives(sampler)
    )
    assert second < 0.9 * plain
    *_, last = fit(denoiser, sampler, data, how, ["x0_trend"])
    assert last.calibration.protocol["begun_as"] == "2M"
    assert last.best == pytest.approx(second, rel=1e-3)
    # a solver of higher order follows the trend itself
    for sampler, followed in ((samplers.DPMSolver(steps=8), False), (samplers.DPMSolver(steps=8, order=1), True)):
        assert [start.second_order for start in uncalibrated.alternatives(sampler)] == [False, followed]


@pytest.mark.parametrize("better", [False, True])
def test_a_solver_of_higher_order_begins_with_its_time_steps_as_they_are_too(monkeypatch, better):
    denoiser, sampler = Denoiser(Exact(), CleanImage(), SCHEDULE), samplers.DPMSolver(steps=4)
    usual = sampler.timesteps(SCHEDULE)
    # the exact denoiser is good at a small last step, and not at a large one
    there = [999, 600, 150, 20] if better else [999, 998, 997, 996]
    calls = []
    monkeypatch.setattr(starts, "moved_times", lambda times, *_: calls.append("start") or there)
    monkeypatch.setattr(calibrating, "moved_times", lambda times, *_: calls.append("half") or times)
    data = MEAN + SPREAD * noise(range(600), (1, 4, 4))
    how = Fit(iterations=4, check_every=2, batch=16, lr=1e-3, held_out=150, own_features=False)
    *_, last = fit(denoiser, sampler, data, how, ["x0_scale"])
    assert list(last.calibration.times) == (there if better else usual)
    # what keeps its time steps keeps them to the end
    assert calls == ["start", *["half"] * better]
    # and nothing is moved where that is not wanted
    calls.clear()
    *_, last = fit(denoiser, sampler, data, dataclasses.replace(how, move_times=0), ["x0_scale"])
    assert (calls, list(last.calibration.times)) == ([], usual)


def test_time_steps_are_moved_once_more_when_the_numbers_are_half_fitted():
    denoiser, sampler = Denoiser(Exact(), CleanImage(), SCHEDULE), samplers.DDIM(steps=4, spacing="linspace")
    data = MEAN + SPREAD * noise(range(600), (1, 4, 4))
    # numbers that hardly change leave the time steps' two searches alone
    how = Fit(iterations=4, check_every=2, batch=16, lr=1e-9, move_times=1, held_out=150, own_features=False)
    *_, last = fit(denoiser, sampler, data, how, ["x0_scale"])
    comparison = Comparison(denoiser, data, how)
    begun = Start(["x0_scale"], sampler.timesteps(SCHEDULE))
    once = begun.moved(denoiser, sampler, comparison)
    twice = once.moved(denoiser, sampler, comparison)
    assert list(last.calibration.times) == twice.times != once.times
    far = [comparison.held_out(*applied(start, denoiser, sampler)).distance for start in (begun, once, twice)]
    assert last.best == pytest.approx(far[2], rel=1e-5)
    assert far == sorted(far, reverse=True)


def test_all_real_images_decide_and_only_those_of_the_fit_are_followed():
    denoiser, sampler = Denoiser(Exact(), CleanImage(), SCHEDULE), samplers.DDIM(steps=4)
    how = Fit(batch=64, held_out=64, own_features=False)
    data = MEAN + SPREAD * noise(range(200), (1, 4, 4))
    comparison = Comparison(denoiser, data, how)
    made = sampler.sample(denoiser, noise(mix(how.seed + HELD_OUT, np.arange(64)), (1, 4, 4)))
    every, followed = comparison.views.of(data), comparison.views.of(comparison.real)
    assert len(comparison.real) == 150
    for far, real in ((comparison.held_out(denoiser, sampler).distance, every), (comparison.far(made, 0), followed)):
        views = zip(comparison.views(made), real, strict=True)
        assert float(far) == pytest.approx(sum(float(SlicedWasserstein()(a, b, 0)) for a, b in views), rel=1e-5)


def test_what_is_held_out_does_not_depend_on_how_many_are_made_at_a_time():
    denoiser, sampler = Denoiser(Exact(), CleanImage(), SCHEDULE), samplers.DDPM(steps=3)
    data, found = MEAN + SPREAD * noise(range(200), (1, 4, 4)), []
    for batch in (100, 64, 7):
        how = Fit(batch=batch, held_out=100, own_features=False)
        found.append(Comparison(denoiser, data, how).held_out(denoiser, sampler))
    for far in found[1:]:
        assert far == pytest.approx(found[0], rel=1e-5)


def test_noises_that_decide_are_none_of_those_that_are_fitted_by_and_follow_the_seed():
    denoiser, sampler = Denoiser(Exact(), CleanImage(), SCHEDULE), samplers.DDIM(steps=2)
    data, made = MEAN + SPREAD * noise(range(64), (1, 4, 4)), []
    for seed in (0, 10):
        comparison = Comparison(denoiser, data, Fit(seed=seed, own_features=False))
        made += [comparison.made(denoiser, sampler, kind, range(50)) for kind in (HELD_OUT, UPDATES, PLACES)]
    assert len(torch.unique(torch.cat(made).flatten(1), dim=0)) == 6 * 50


def test_a_fit_makes_as_many_images_as_it_says(monkeypatch):
    monkeypatch.setattr(activations, "MOST_KEPT", -1)
    data, looks = MEAN + SPREAD * noise(range(80), (1, 2, 2)), 0

    class Counting(Exact):
        def forward(self, x_t, t):
            nonlocal looks
            looks += len(x_t)
            return super().forward(x_t, t)

    def made(**settings):
        nonlocal looks
        looks, how = 0, Fit(patience=9, own_features=False, distance="energy", **settings)
        list(fit(Denoiser(Counting(), CleanImage(), SCHEDULE), samplers.DDIM(steps=3), data, how))
        # one batch is a trial; an update makes its images, those steps that have a gradient twice, and that costs two
        return (looks - how.batch) / 3 + (2 + 1 / 3) * (1 + RACE) * how.iterations * how.batch, how.trajectories(3)

    for settings in ({"batch": 40, "held_out": 16, "check_every": 2}, {"batch": 2, "held_out": 50, "check_every": 1}):
        found, said = made(iterations=4, move_times=0, **settings)
        assert found == pytest.approx(said)
    settings = {"iterations": 2, "batch": 2, "held_out": 16, "check_every": 1}
    (unmoved, least), (moved, most) = (made(move_times=n, **settings) for n in (0, 1))
    assert 0.7 * (most - least) < moved - unmoved <= most - least


@pytest.mark.parametrize("sampler", [samplers.DDIM(steps=3), samplers.Heun(steps=3)])
def test_activations_that_need_little_memory_are_kept_and_the_numbers_are_the_same(sampler, monkeypatch):
    denoiser = Denoiser(build("tiny:width=8", 1, 8, 3), Dual(), SCHEDULE).eval()
    how, data = Fit(iterations=2, batch=4, held_out=16, move_times=0), noise(range(64), (1, 8, 8))
    looks, found, kept = 0, [], []

    def count(*_):
        nonlocal looks
        looks += 1

    denoiser.network.register_forward_pre_hook(count)
    for most in (-1, 100_000, 2**30):  # the network keeps some hundreds of kilobytes
        monkeypatch.setattr(activations, "MOST_KEPT", most)
        looks = 0
        found.append([p.calibration.values for p in fit(denoiser, sampler, data, how)][-1])
        kept.append(looks)
    assert found[0] == found[1] == found[2]
    # all looks of an update but the first have a gradient
    starts = 2 if sampler.order == 1 else 1
    assert kept[0] == kept[1] == kept[2] + starts * how.iterations * (sampler.evaluations - 1)


def test_moving_time_steps_looks_at_no_images_twice():
    denoiser, calls = Denoiser(Exact(), CleanImage(), SCHEDULE), []
    sampler, how = samplers.DDIM(steps=6), Fit(batch=8, move_times=2, held_out=16, own_features=False)
    comparison = Comparison(denoiser, MEAN + SPREAD * noise(range(64), (1, 4, 4)), how)

    class Counting:
        schedule = SCHEDULE

        def __call__(self, x_t, t):
            calls.append(t)
            return denoiser(x_t, t)

    start = Start(["x0_trend"], sampler.timesteps(SCHEDULE), second_order=True)
    found = start.moved(Counting(), sampler, comparison)
    looked = len(calls)

    def far(times):
        return comparison.placed(*applied(dataclasses.replace(start, times=times), Counting(), sampler))

    assert coordinate_search(start.times, 999, far, 2) == found.times
    assert looked < 0.65 * (len(calls) - looked)


def test_the_fit_restores_the_variance_that_few_steps_lose():
    """Five DDIM steps with the exact denoiser shrink Gaussian data; no better denoiser repairs that."""
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    data = MEAN + SPREAD * noise(range(2000), (1, 4, 4))
    sampler = samplers.DDIM(steps=5)
    *_, last = fit(denoiser, sampler, data, Fit(iterations=100, batch=128, lr=0.05, check_every=50))
    seeds = range(10_000, 12_000)
    before = sampler.sample(denoiser, noise(seeds, (1, 4, 4)))
    found = last.calibration
    after = sampler.at(found.times).sample(Calibrated.of(denoiser, found), noise(seeds, (1, 4, 4)))
    assert before.std() < 0.6 * SPREAD
    assert abs(after.std() / SPREAD - 1) < 0.05
    assert abs(after.mean() - MEAN) < 0.02
    assert last.calibration.protocol["held_out_after"] < last.calibration.protocol["held_out_before"]


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.DDPM(steps=4, variance="small"),
        samplers.UniPC(steps=4),
        samplers.IPNDM(steps=4),
        samplers.DPMSolver(steps=4, order=3),
    ],
)
def test_every_sampler_can_be_calibrated(sampler):
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    data = MEAN + SPREAD * noise(range(300), (1, 4, 4))
    *_, last = fit(denoiser, sampler, data, Fit(iterations=12, batch=64, check_every=6))
    assert last.calibration.protocol["held_out_after"] < last.calibration.protocol["held_out_before"]


def test_with_unipc_numbers_of_eps_count_in_the_first_step_alone():
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    data = MEAN + SPREAD * noise(range(64), (1, 4, 4))
    how = Fit(iterations=4, batch=16, check_every=1, move_times=0, held_out=16)
    *_, last = fit(denoiser, samplers.UniPC(steps=4), data, how)
    for name in ("eps_scale", "eps_fine"):
        first, *others = last.calibration.values[name]
        assert first != 1
        assert others == [1.0] * 3
    assert 1 not in last.calibration.values["x0_scale"]


def test_the_network_is_left_alone():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 3, 3, padding=1)
    denoiser = Denoiser(lambda x, t: network(x), Dual(), SCHEDULE)
    before = network.weight.clone()
    list(fit(denoiser, samplers.DDIM(steps=2), torch.randn(100, 1, 4, 4), Fit(iterations=3, batch=16)))
    torch.testing.assert_close(network.weight, before, rtol=0, atol=0)


def test_the_learning_rate_falls_by_a_cosine_from_its_value_to_nothing(monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def watched(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    how = Fit(iterations=8, batch=4, lr=0.02, move_times=0, held_out=16, own_features=False)
    list(
        fit(
            Denoiser(Exact(), CleanImage(), SCHEDULE),
            samplers.DDIM(steps=2),
            torch.randn(64, 1, 2, 2),
            how,
            ["x0_scale"],
        )
    )
    assert rates[0] == pytest.approx(how.lr)
    assert rates[4] == pytest.approx(how.lr / 2)
    assert all(a > b > 0 for a, b in pairwise(rates))
    assert [a + b for a, b in zip(rates[1:], rates[:0:-1], strict=True)] == pytest.approx([how.lr] * 7)


@pytest.mark.parametrize("parameterization", [Epsilon(), CleanImage(), Dual(ratio=0.5), Dual(ratio="velocity")])
def test_only_a_ratio_that_is_learned_has_numbers(parameterization):
    ratios = {"ratio_gain", "ratio_shift"}
    assert set(parameters_of(Denoiser(exact, parameterization, SCHEDULE))) == NEUTRAL.keys() - ratios
    assert set(parameters_of(Denoiser(exact, Dual(), SCHEDULE))) == NEUTRAL.keys()


def test_too_few_images():
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    with pytest.raises(InputError, match="64 images"):
        next(fit(denoiser, samplers.DDIM(steps=2), torch.zeros(20, 1, 4, 4), Fit()))


IMAGES = torch.zeros(80, 1, 4, 4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.to(torch.uint8), r"floats \(N, C, H, W\); got torch.uint8 \(80, 1, 4, 4\)"),
        (IMAGES[:, 0], r"got torch.float32 \(80, 4, 4\)"),
        (IMAGES.numpy(), "got ndarray"),
        (255 * torch.rand(80, 1, 4, 4), r"clip, \(-1.0, 1.0\), .*got 0.* to 25\d.*to_model is for 0 to 255"),
        (IMAGES / 0, "hold no NaN; got nan"),
    ],
)
def test_images_that_are_none_in_the_samplers_range(images, message):
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    with pytest.raises(InputError, match=message):
        next(fit(denoiser, samplers.DDIM(steps=2), images, Fit()))


def test_latents_have_no_range_but_are_numbers():
    denoiser, sampler = Denoiser(Exact(), CleanImage(), SCHEDULE), samplers.DDIM(steps=2, clip=None)
    how = Fit(iterations=1, batch=4, held_out=16, move_times=0, own_features=False)
    assert list(fit(denoiser, sampler, 30 * noise(range(64), (1, 4, 4)), how))
    with pytest.raises(InputError, match=r"no NaN; got -inf"):
        next(fit(denoiser, sampler, torch.full((64, 1, 4, 4), -torch.inf), how))


def test_a_fit_is_of_a_denoiser_by_a_sampler():
    for denoiser, sampler in ((Exact(), samplers.DDIM(steps=2)), (Denoiser(Exact(), Dual(), SCHEDULE), "ddim")):
        with pytest.raises(InputError, match=r"what is calibrated is a (denoiser; got Exact|sampler; got str)"):
            next(fit(denoiser, sampler, IMAGES, Fit()))


@pytest.mark.parametrize(("name", "value"), [("iterations", 2.5), ("batch", "96"), ("own_features", 1), ("lr", None)])
def test_settings_of_another_type(name, value):
    with pytest.raises(InputError, match=f"{name} of a calibration is .*; got {value!r}"):
        Fit(**{name: value})
    assert Fit(batch=np.int64(96)) == Fit(batch=96)


@pytest.mark.parametrize(("name", "least"), [("batch", 2), ("held_out", 16), ("move_times", 0)])
def test_settings_of_a_fit_that_cannot_be(name, least):
    Fit(**{name: least})
    with pytest.raises(InputError, match=f"{name} is {least} or more, got {least - 1}"):
        Fit(**{name: least - 1})


def test_time_steps_move_to_where_the_distance_is_least():
    best = [990, 700, 300, 60]
    visited = []

    def far(times):
        visited.append(list(times))
        return sum(abs(a - b) for a, b in zip(times, best, strict=True))

    found = coordinate_search([999, 749, 499, 249], 999, far, rounds=6)
    assert far(found) < 0.1 * far([999, 749, 499, 249])
    assert all(999 >= a > b >= 0 for times in visited for a, b in pairwise([*times, -1]) if b >= 0)
    assert coordinate_search([3, 2, 1, 0], 3, far, rounds=5) == [3, 2, 1, 0]  # there is no room


def test_moved_time_steps_are_those_that_are_sampled():
    denoiser = Denoiser(Exact(), CleanImage(), SCHEDULE)
    generator = torch.Generator().manual_seed(0)
    images = MEAN + SPREAD * torch.randn(512, 1, 4, 4, generator=generator)
    sampler = samplers.DDIM(steps=3, clip=None)
    *_, last = fit(denoiser, sampler, images, Fit(iterations=2, batch=64, move_times=1))
    found = last.calibration
    assert found.sampler == sampler.config()
    assert list(found.times) != sampler.timesteps(SCHEDULE)
    made = sampler.at(found.times).sample(Calibrated.of(denoiser, found), noise(range(2), (1, 4, 4)))
    assert made.isfinite().all()
    with pytest.raises(InputError, match="time steps"):
        sampler.sample(Calibrated.of(denoiser, found), noise(range(2), (1, 4, 4)))
