"""IDDPM's learned variance, against the paper's formulas written once more, and diffusers' sampler."""

from __future__ import annotations

import math
import warnings

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from dualout import Denoiser, Dual, Epsilon, InputError, LearnedVariance, Parameterization, Prediction, Velocity
from dualout.guidance import ClassifierFree
from dualout.parameterizations.learned_variance import log_likelihood
from dualout.randomness import SeededDraw, noise
from dualout.samplers import DDIM, DDPM, FromDiffusers
from dualout.schedules import Cosine, Linear, RectifiedFlow, Schedule

SHAPE = (2, 4, 4)
BASES = [Epsilon(), Velocity(), Dual(), Dual(ratio="step"), Dual(ratio="channel", gate="balanced")]


class Net(nn.Module):
    def __init__(self, channels: int, image_channels: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(image_channels, 8, 3, padding=1)
        self.last = nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        shift = 0 if label is None else label.view(-1, 1, 1, 1) / 3
        return self.last(torch.tanh(self.first(x) + t.to(x.dtype).view(-1, 1, 1, 1) / 40 + shift))


def denoiser_of(base: Parameterization, schedule: Schedule) -> Denoiser:
    learned = LearnedVariance(base)
    return Denoiser(Net(learned.channels(2)), learned, schedule).double()


def betas_of(schedule: Schedule, times: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """ᾱ, β and β̃ of the process that visits only these times, from the noisy end: IDDPM, equation 19."""
    signal = torch.tensor([schedule.scalars(t).alpha ** 2 for t in times], dtype=torch.float64)
    before = torch.cat([signal[1:], torch.ones(1, dtype=torch.float64)])
    beta = 1 - signal / before
    return signal, beta, (1 - before) / (1 - signal) * beta


def surprise(x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """−log of the probability of x0's bin, with as many digits as it takes."""
    with mpmath.workdps(60):
        low, high = (mpmath.mpf(x0.item()) + side / 255 - mean.item() for side in (-1, 1))
        low, high = -mpmath.inf if x0 == -1 else low / std.item(), mpmath.inf if x0 == 1 else high / std.item()
        # the right tail is the left one
        low, high = (-high, -low) if low + high > 0 else (low, high)
        return torch.tensor(-float(mpmath.log(mpmath.ncdf(high) - mpmath.ncdf(low))), dtype=torch.float64)


@pytest.mark.parametrize("base", BASES, ids=lambda b: b.spec)
@pytest.mark.parametrize("schedule", [Linear(50), Cosine(50)], ids=lambda s: s.name)
def test_the_bound_is_the_papers(base: Parameterization, schedule: Schedule) -> None:
    denoiser = denoiser_of(base, schedule)
    t = torch.tensor([0, 1, 17, 49])
    x0 = (torch.rand(4, *SHAPE, dtype=torch.float64) * 255).round() / 127.5 - 1
    x0[:, 0, 0, 0], x0[:, 1, 2, 2] = -1, 1  # the outermost bins
    eps = torch.randn_like(x0)
    loss = denoiser.loss(x0, t, eps)

    signal, beta, small = (v.flip(0) for v in betas_of(schedule, list(range(49, -1, -1))))
    for b, time in enumerate(t.tolist()):
        x_t = signal[time].sqrt() * x0[b] + (1 - signal[time]).sqrt() * eps[b]
        raw = denoiser.network(x_t[None], t[b : b + 1])[0]
        v = (raw[-2:] + 1) / 2
        log_variance = v * beta[time].log() + (1 - v) * small[max(time, 1)].log()
        predicted = denoiser(x_t[None], time).x0[0]
        before = signal[time - 1] if time else torch.tensor(1.0, dtype=torch.float64)

        def mean(x: Tensor, time: int = time, before: Tensor = before, x_t: Tensor = x_t) -> Tensor:
            on_x0 = before.sqrt() * beta[time] / (1 - signal[time])
            on_x_t = (1 - beta[time]).sqrt() * (1 - before) / (1 - signal[time])
            return on_x0 * x + on_x_t * x_t

        model = Normal(mean(predicted), (0.5 * log_variance).exp())
        if time:
            nats = kl_divergence(Normal(mean(x0[b]), small[time].sqrt()), model)
        else:
            pixels = zip(x0[b].flatten(), model.loc.flatten(), model.scale.flatten(), strict=True)
            nats = torch.stack([surprise(*pixel) for pixel in pixels])
        torch.testing.assert_close(loss.parts["vlb"][b], nats.mean() / math.log(2), rtol=1e-7, atol=1e-9)


def test_the_probabilities_of_all_bins_add_up_to_one() -> None:
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.1, 0.02), (-0.99, 0.001), (2.0, 0.3), (0.0, 5.0)):
        log_p = log_likelihood(bins, torch.tensor(mean).double(), torch.tensor(2 * math.log(std)).double())
        assert log_p.exp().sum() == pytest.approx(1, abs=1e-12)


def test_likelihoods_and_their_gradients_are_finite_however_wrong_the_mean() -> None:
    mean = torch.tensor([0.0, 0.5, 3.0, -40.0, 1e4])
    for x0 in (-1.0, -0.2, 1.0):
        log_sigma2 = torch.full((5,), -9.0, requires_grad=True)
        log_p = log_likelihood(torch.full((5,), x0), mean, log_sigma2)
        (slope,) = torch.autograd.grad(log_p.sum(), log_sigma2)
        assert log_p.isfinite().all()
        assert slope.isfinite().all()
        assert (log_p <= 0).all()


@pytest.mark.parametrize("base", BASES, ids=lambda b: b.spec)
def test_the_bound_teaches_the_variance_only(base: Parameterization) -> None:
    learned = LearnedVariance(base)
    raw = torch.randn(4, learned.channels(2), 4, 4, requires_grad=True)
    denoiser = Denoiser(lambda x, t: raw, learned, Cosine(50))
    losses = denoiser.loss(torch.rand(4, *SHAPE) * 2 - 1, torch.tensor([0, 1, 17, 49]), torch.randn(4, *SHAPE)).parts
    (slope,) = torch.autograd.grad(losses["vlb"].sum(), raw, retain_graph=True)
    assert (slope[:, :-2] == 0).all()
    assert (slope[:, -2:] != 0).flatten(1).any(1).all()
    for name in losses.keys() - {"vlb", "mu"}:
        (slope,) = torch.autograd.grad(losses[name].sum(), raw, retain_graph=True)
        assert (slope[:, -2:] == 0).all()
        assert slope[:, :-2].abs().sum() > 0


def test_the_sum_of_losses_is_the_hybrid() -> None:
    x0, eps, t = torch.rand(3, *SHAPE).double(), torch.randn(3, *SHAPE).double(), torch.tensor([0, 5, 70])
    for steps in (100, 4000):
        denoiser = denoiser_of(Epsilon(), Linear(steps))
        loss = denoiser.loss(x0, t, eps)
        # the sum over all t is T times the mean over drawn t
        hybrid = loss.parts["eps"].mean() + 0.001 * steps * loss.parts["vlb"].mean()
        torch.testing.assert_close(loss.total, hybrid)
    plain = Denoiser(lambda x, t: denoiser.network(x, t)[:, :2], Epsilon(), Linear(4000))
    torch.testing.assert_close(plain.loss(x0, t, eps).total, loss.parts["eps"].mean())


def test_the_bound_is_least_where_the_variance_is_the_posteriors() -> None:
    # with the true x0, KL = 0 at v = 0, and what is learned stays below the largest variance
    schedule = Linear(50)
    x0, eps = torch.rand(1, *SHAPE).double(), torch.randn(1, *SHAPE).double()

    def bound(v: float, t: int) -> float:
        def network(x: Tensor, time: Tensor) -> Tensor:
            return torch.cat([eps, torch.full_like(eps, 2 * v - 1)], 1)

        loss = Denoiser(network, LearnedVariance(), schedule).loss(x0, torch.tensor([t]), eps)
        return float(loss.parts["vlb"])

    for t in (1, 20, 49):
        assert bound(0.0, t) == pytest.approx(0, abs=1e-12)
        assert bound(1.0, t) > bound(0.5, t) > bound(0.1, t) > 1e-8


@pytest.mark.parametrize("base", BASES, ids=lambda b: b.spec)
def test_it_can_be_written_and_read(base: Parameterization) -> None:
    learned = LearnedVariance(base, weight=0.01)
    assert Parameterization.parse(learned.spec) == learned
    assert Parameterization.from_config(learned.config()) == learned
    assert learned.channels(3) == base.channels(3) + 3


def test_specs() -> None:
    assert Parameterization.parse("learned") == LearnedVariance(Epsilon())
    assert Parameterization.parse("learned:base=dual") == LearnedVariance(Dual())
    nested = Parameterization.parse("learned:base=(dual:ratio=channel:gate=balanced):weight=0.01")
    assert nested == LearnedVariance(Dual(ratio="channel", gate="balanced"), weight=0.01)
    assert LearnedVariance(Dual()).channels(3) == 10
    for wrong in ("learned:base=learned", "learned:base=dul", "learned:base=(dual:ratoi=step)", "learned:base=3"):
        with pytest.raises(InputError):
            Parameterization.parse(wrong)
    with pytest.raises(InputError, match="0 or more"):
        LearnedVariance(weight=-1)


def test_a_checkpoint_remembers_it(tmp_path) -> None:
    from diffusers import UNet2DModel

    learned = LearnedVariance(Dual(ratio="step"))
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=learned.channels(1), block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    denoiser = Denoiser(unet, learned, Linear(50)).eval()
    with torch.no_grad():
        denoiser.head.base.logit.normal_()  # type: ignore[union-attr]
    denoiser.save_pretrained(tmp_path)
    again = Denoiser.from_pretrained(tmp_path)
    assert again.parameterization == learned
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for name, part in denoiser(x, 20).parts.items():
            assert torch.equal(part, again(x, 20).parts[name])


def test_a_wrong_number_of_channels_is_named() -> None:
    denoiser = Denoiser(lambda x, t: torch.zeros(2, 7, 4, 4), LearnedVariance(Dual()), Linear(50))
    with pytest.raises(InputError, match=r"'learned' of 3-channel images needs .*\(2, 10, 4, 4\), got \(2, 7, 4, 4\)"):
        denoiser(torch.zeros(2, 3, 4, 4), 3)


def test_routes_are_the_bases() -> None:
    denoiser = denoiser_of(Dual(), Linear(50))
    x = torch.randn(2, *SHAPE).double()
    raw = denoiser.network(x, torch.full((2,), 30))
    plain = Denoiser(lambda x, t: raw[:, :-2], Dual(), Linear(50))
    for route in ("mix", "eps", "x0", "velocity", 0.3):
        torch.testing.assert_close(denoiser.route(route)(x, 30).x0, plain.route(route)(x, 30).x0)
        torch.testing.assert_close(denoiser.route(route)(x, 30).parts["variance"], (raw[:, -2:] + 1) / 2)
    with pytest.raises(InputError, match="one route"):
        denoiser_of(Epsilon(), Linear(50)).route("x0")


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddpm_samples_with_the_respaced_variance(spacing: str, steps: int) -> None:
    # IDDPM's p_sample of a respaced process, in the paper's letters
    denoiser, schedule = denoiser_of(Dual(), Cosine(50)), Cosine(50)
    sampler = DDPM(steps=steps, spacing=spacing, variance="learned")
    start, draw = noise(range(2), SHAPE, dtype=torch.float64), SeededDraw(range(2), SHAPE, dtype=torch.float64)
    times = sampler.timesteps(schedule)
    signal, beta, small = betas_of(schedule, times)
    x = start
    for k, t in enumerate(times):
        with torch.no_grad():
            p = denoiser(x, t)
            v = (denoiser.network(x, torch.full((2,), t))[:, -2:] + 1) / 2
        before = signal[k + 1] if k + 1 < steps else torch.tensor(1.0, dtype=torch.float64)
        mean = before.sqrt() * beta[k] / (1 - signal[k]) * p.x0.clamp(-1, 1)
        mean = mean + (1 - beta[k]).sqrt() * (1 - before) / (1 - signal[k]) * x
        last = k + 1 == steps
        x = mean if last else mean + (0.5 * (v * beta[k].log() + (1 - v) * small[k].log())).exp() * draw(k)
    torch.testing.assert_close(sampler.sample(denoiser, start, draw), x, rtol=1e-9, atol=1e-9)


def test_the_ends_of_the_range_are_the_fixed_variances() -> None:
    start, draw = noise(range(2), SHAPE, dtype=torch.float64), SeededDraw(range(2), SHAPE, dtype=torch.float64)
    for raw, variance in ((1.0, "large"), (-1.0, "small")):

        def network(x: Tensor, t: Tensor, raw: float = raw) -> Tensor:
            return torch.cat([torch.tanh(x), torch.full_like(x, raw)], 1)

        learned = Denoiser(network, LearnedVariance(), Linear(50))
        plain = Denoiser(lambda x, t: torch.tanh(x), Epsilon(), Linear(50))
        a = DDPM(steps=7, variance="learned").sample(learned, start, draw)
        torch.testing.assert_close(a, DDPM(steps=7, variance=variance).sample(plain, start, draw))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_diffusers_learned_range_is_the_same(prediction_type: str) -> None:
    from diffusers import DDPMScheduler

    schedule = Linear(100)
    scheduler = DDPMScheduler(
        num_train_timesteps=100, trained_betas=schedule.variances().tolist(), variance_type="learned_range",
        prediction_type=prediction_type, timestep_spacing="leading",
    )  # fmt: skip
    denoiser = denoiser_of(Dual(), schedule).float()
    start, draw = noise(range(3), SHAPE), SeededDraw(range(3), SHAPE)
    theirs = FromDiffusers(scheduler, steps=10)
    assert theirs.reads_variance
    # what each draws is its own: the same draws through a scheduler that takes them as one seed an image
    ours = DDPM(steps=10, spacing="leading", variance="learned")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(
            theirs.sample(denoiser, start, draw), ours.sample(denoiser, start, draw), rtol=1e-4, atol=1e-4
        )
    plain = Denoiser(lambda x, t: denoiser.network(x, t)[:, :-2], Dual(), schedule)
    with pytest.raises(InputError, match="learned its variance"):
        theirs.sample(plain, start, draw)
    scheduler.register_to_config(variance_type="learned")
    with pytest.raises(InputError, match="learned_range"):
        FromDiffusers(scheduler, steps=10).sample(denoiser, start, draw)


def test_samplers_that_do_not_use_it_say_so_once() -> None:
    denoiser = denoiser_of(Dual(), Linear(50))
    for sampler in (DDIM(steps=5), DDPM(steps=5), FromDiffusers("DDPMScheduler", steps=5)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sampler.sample(denoiser, torch.randn(1, *SHAPE).double())
        (warning,) = [w for w in caught if "learned a variance" in str(w.message)]
        assert "ddpm:variance=learned" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDPM(steps=5, variance="learned").sample(denoiser, torch.randn(1, *SHAPE).double())
        DDIM(steps=5).sample(Denoiser(lambda x, t: x, Epsilon(), Linear(50)), torch.randn(1, *SHAPE))


@pytest.mark.parametrize("steps", [1, 5])
def test_a_network_without_one_is_refused(steps: int) -> None:
    with pytest.raises(InputError, match="did not; take 'large' or 'small'"):
        DDPM(steps=steps, variance="learned").sample(
            Denoiser(lambda x, t: x, Epsilon(), Linear(50)), torch.randn(1, *SHAPE)
        )


def test_guidance_keeps_it_and_the_levels_of_its_half() -> None:
    learned = LearnedVariance(Dual())
    denoiser = Denoiser(Net(learned.channels(2)), learned, Linear(50))
    guided = ClassifierFree(denoiser, 2.0, label=0)
    x, label, t = torch.randn(3, *SHAPE), torch.tensor([1, 2, 3]), torch.tensor([0, 7, 30])
    p: Prediction = guided(x, t, label=label)
    torch.testing.assert_close(p.parts["variance"], denoiser(x, t, label=label).parts["variance"])
    assert p.level.posterior is not None
    assert all(v.shape == (3, 1, 1, 1) for v in p.level.posterior)
    DDPM(steps=4, variance="learned").sample(guided, x, label=label)


def test_levels_know_the_step_before_them() -> None:
    for schedule in (Linear(50), Cosine(50)):
        _, beta, small = (v.flip(0) for v in betas_of(schedule, list(range(49, -1, -1))))
        q = schedule.level(torch.arange(50)).posterior
        assert q is not None
        torch.testing.assert_close(q.large, beta, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(q.small[1:], small[1:], rtol=1e-9, atol=1e-14)
        assert q.small[0] == q.small[1]
        assert (q.gain == 1).tolist() == [True] + 49 * [False]
    one = Linear(1).scalars(0).posterior
    assert one is not None
    assert one.small == one.large > 0


def test_other_schedules_have_a_bound_too() -> None:
    denoiser = denoiser_of(Dual(), RectifiedFlow(50))
    x0 = torch.rand(4, *SHAPE).double()
    parts = denoiser.loss(x0, torch.tensor([0, 1, 20, 49]), torch.randn_like(x0)).parts
    assert (parts["vlb"] > 0).all()
    assert parts["vlb"].isfinite().all()
