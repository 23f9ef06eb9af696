"""DualOutputPipeline with every scheduler of diffusers, against the package's samplers and data of one image."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from dualout import CleanImage, Dual, Epsilon, InputError, Karras, LearnedVariance, Velocity, samplers
from dualout.export import DualOutputPipeline
from dualout.schedules import Cosine, Linear, ScaledLinear, Schedule
from pipelines import CLOSE, SHAPE, denoiser_of, out, pipe, quiet, start

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SAME = [
    samplers.DDIM(5),
    samplers.DDIM(5, spacing="leading", clip=None),
    samplers.DPMSolver(5),
    samplers.DPMSolver(5, order=1),
    samplers.DPMSolver(5, order=3, published=True, clip=None),
    samplers.UniPC(5),
    samplers.UniPC(5, order=3, clip=(-0.5, 0.5)),
]


READINGS = [Dual(ratio="channel", gate="balanced"), Epsilon(), CleanImage(), Velocity(), Karras()]


@pytest.mark.parametrize(
    ("sampler", "parameterization"),
    [*((sampler, Dual()) for sampler in SAME), *((samplers.DPMSolver(5), reading) for reading in READINGS)],
    ids=lambda v: v.spec,
)
def test_the_same_noise_gives_the_same_images(sampler: samplers.Sampler, parameterization: Any) -> None:
    denoiser = denoiser_of(parameterization)
    pipeline = pipe(denoiser, sampler)
    torch.testing.assert_close(out(pipeline), sampler.sample(denoiser, start()), **CLOSE)
    assert pipeline.scheduler.timesteps.tolist() == sampler.timesteps(denoiser.schedule)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("make", [samplers.DDIM, samplers.DDPM, samplers.DPMSolver, samplers.UniPC])
def test_every_spacing_visits_what_the_sampler_visits(make: Any, spacing: str) -> None:
    denoiser, drawn_by = denoiser_of(), torch.Generator()
    for steps in (1, 4, 7):  # 7 does not divide T
        # DDIM draws what DDPM draws
        fields = {"eta": 0.5} if make is samplers.DDIM else {}
        sampler = make(steps, spacing=spacing, **fields)
        pipeline = pipe(denoiser, sampler)
        got = out(pipeline, latents=start(1), num_inference_steps=steps, generator=drawn_by.manual_seed(7), **fields)
        torch.testing.assert_close(got, sampler.sample(denoiser, start(1), drawn(7)), rtol=2e-4, atol=2e-4)
        assert pipeline.scheduler.timesteps.tolist() == sampler.timesteps(denoiser.schedule)


def test_a_scheduler_that_is_told_another_spacing_has_its_own_steps() -> None:
    denoiser = denoiser_of()
    pipeline = pipe(denoiser, samplers.DPMSolver(4, spacing="linspace"))
    for options in ({"timestep_spacing": "leading"}, {"use_karras_sigmas": True}, {"steps_offset": 1}):
        theirs = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **options)
        theirs.set_timesteps(4)
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(theirs.config)
        pipeline._set_steps(4, False, torch.device("cpu"))
        assert pipeline.scheduler.timesteps.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("schedule", [ScaledLinear(), Cosine(), Cosine(500, 0.01), Linear(200, 1e-3, 0.1)], ids=str)
def test_schedules(schedule: Schedule) -> None:
    denoiser = denoiser_of(schedule=schedule)
    for sampler in (samplers.DDIM(5), samplers.DPMSolver(5)):
        pipeline = pipe(denoiser, sampler)
        # ᾱ near 0 loses digits in float32 tables
        torch.testing.assert_close(out(pipeline), sampler.sample(denoiser, start()), rtol=1e-3, atol=1e-3)
        # the schedule can be read off the scheduler, too
        other = quiet(DualOutputPipeline(denoiser.network, pipeline.scheduler, parameterization=Dual()))
        torch.testing.assert_close(out(other), out(pipeline), rtol=2e-3, atol=2e-3)
        # in diffusers' own words, where it has them
        known = not isinstance(schedule, Cosine) or schedule.offset == 0.008
        assert (pipeline.scheduler.config.trained_betas is None) == (other.schedule == schedule) == known


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_every_prediction_type_is_answered(name: str, kind: str) -> None:
    denoiser = denoiser_of()
    scheduler = getattr(diffusers, name)(prediction_type=kind, timestep_spacing="trailing", beta_schedule="linear")
    if "final_sigmas_type" in scheduler.config:
        scheduler.register_to_config(final_sigmas_type="zero")
    sampler = {"DDIM": samplers.DDIM, "DPMS": samplers.DPMSolver, "UniP": samplers.UniPC}[name[:4]](5)
    torch.testing.assert_close(out(pipe(denoiser, scheduler)), sampler.sample(denoiser, start()), rtol=1e-3, atol=1e-3)


def drawn(seed: int) -> Any:
    """Fresh noise, one step's after the other's, as a scheduler draws it for one image."""
    generator = torch.Generator().manual_seed(seed)
    return lambda k: torch.randn(1, *SHAPE, generator=generator)


@pytest.mark.parametrize("clip", [(-1.0, 1.0), (-0.5, 0.5), None])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_sampling_draws_what_diffusers_draws(variance: str, clip: Any) -> None:
    denoiser, sampler = denoiser_of(), samplers.DDPM(5, spacing="leading", variance=variance, clip=clip)
    got = out(pipe(denoiser, sampler), latents=start(1), generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(got, sampler.sample(denoiser, start(1), drawn(7)), **CLOSE)


@pytest.mark.parametrize("order", [1, 2])
def test_sde_dpmsolver_draws_what_diffusers_draws(order: int) -> None:
    denoiser, sampler = denoiser_of(), samplers.DPMSolver(5, order=order, eta=1.0)
    got = out(pipe(denoiser, sampler), latents=start(1), generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(got, sampler.sample(denoiser, start(1), drawn(7)), **CLOSE)


def test_learned_variance_is_sampled_with() -> None:
    denoiser = denoiser_of(LearnedVariance(Dual()))
    sampler = samplers.DDPM(5, spacing="leading", variance="learned")
    pipeline = pipe(denoiser, sampler)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    expected = sampler.sample(denoiser, start(1), drawn(7))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = out(pipeline, latents=start(1), generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(got, expected, **CLOSE)
    with pytest.warns(UserWarning, match="learned a variance, which DDIMScheduler does not use"):
        out(pipe(denoiser))
    with pytest.raises(InputError, match="learned its variance"):
        out(pipe(denoiser_of(), sampler))


class OneImage(ModelMixin, ConfigMixin):
    """Predicts one image, whatever it sees."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 1) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.seen: list[float] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(float(t.flatten()[0]))
        return torch.linspace(-0.8, 0.8, 64).view(SHAPE).expand_as(x)


NO_TABLE = "no scheduler with a table of alphas_cumprod"
DETERMINISTIC = (
    "DDIM", "PNDM", "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete", "DPMSolverMultistep",
    "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep",
)  # fmt: skip
STOCHASTIC = ("DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "LCM", "SASolver", "TCD", "UnCLIP")


def test_no_scheduler_of_diffusers_is_forgotten() -> None:
    # but those that go towards noise, that need more than a prediction, or copies for several devices
    known = {*DETERMINISTIC, *STOCHASTIC, "DDIMInverse", "DPMSolverMultistepInverse", "RePaint", "DDIMParallel",
             "DDPMParallel", "CogVideoXDDIM", "CogVideoXDPM", "DPMSolverSDE"}  # fmt: skip
    for name in dir(diffusers):
        cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if isinstance(cls, type) and issubclass(cls, SchedulerMixin) and not getattr(cls, "_is_dummy", False):
            try:
                has_table = hasattr(cls(), "alphas_cumprod")
            except (ImportError, TypeError, ValueError):
                continue
            assert not has_table or name.removesuffix("Scheduler") in known, name


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_every_scheduler_ends_at_the_only_image(name: str, kind: str) -> None:
    # with its defaults, of which some look between the discrete time steps, and some twice a step
    cls, eps = getattr(diffusers, f"{name}Scheduler"), []
    try:
        scheduler = cls(prediction_type=kind)
        pipeline = quiet(DualOutputPipeline(OneImage(), scheduler, parameterization=CleanImage()))
        made = out(
            pipeline,
            num_inference_steps=10,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=lambda _, __, ___, given: eps.append(given["eps"]),
            callback_on_step_end_tensor_inputs=["eps"],
        )
    except (NotImplementedError, ValueError) as error:
        # which types a class knows, it says itself; when it is made, or at its first step, which is told with a remedy
        refused = "takes no prediction_type" if isinstance(error, InputError) else "prediction_type"
        if kind == "epsilon" or refused not in str(error):
            raise
        return
    assert len(pipeline.unet.seen) == len(scheduler.timesteps) >= 10
    # some end at the level of t = 0, with its noise
    last = float(1 - scheduler.alphas_cumprod[0]) ** 0.5
    assert (made - pipeline.unet(made, torch.zeros(1))).abs().max() < 4.5 * last
    # on the way from any noise to one image, eps stays what it was, whatever the order; PNDM averages v as it is
    exact = name in DETERMINISTIC and (name, kind) != ("PNDM", "v_prediction")
    for later in eps[1:] if exact else []:
        torch.testing.assert_close(later, eps[0], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_between_the_levels_the_network_is_told_the_fraction(name: str) -> None:
    scheduler, eps = getattr(diffusers, name)(use_karras_sigmas=True), []
    pipeline = quiet(DualOutputPipeline(OneImage(), scheduler, parameterization=CleanImage()))
    out(
        pipeline,
        num_inference_steps=7,
        callback_on_step_end=lambda _, __, ___, given: eps.append(given["eps"]),
        callback_on_step_end_tensor_inputs=["eps"],
    )
    assert pipeline.unet.seen == pipeline.scheduler.timesteps.tolist()
    for later in eps[1:]:
        torch.testing.assert_close(later, eps[0], rtol=5e-3, atol=5e-3)
    guided = pipe(denoiser_of(classes=4, schedule=pipeline.schedule), scheduler)
    with pytest.raises(InputError, match="between the schedule's levels"):
        out(guided, class_labels=1, guidance_scale=2.0)


def test_schedulers_may_be_exchanged_afterwards() -> None:
    denoiser = denoiser_of()
    pipeline = pipe(denoiser)
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    torch.testing.assert_close(out(pipeline), samplers.UniPC(5).sample(denoiser, start()), **CLOSE)
    pipeline.scheduler = diffusers.DDIMScheduler(beta_start=0.01)
    with pytest.raises(InputError, match="another noise schedule"):
        out(pipeline)


def test_eta_is_for_schedulers_that_take_it() -> None:
    denoiser = denoiser_of()
    got = out(pipe(denoiser, samplers.DDIM(5)), latents=start(1), eta=0.7, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(got, samplers.DDIM(5, eta=0.7).sample(denoiser, start(1), drawn(2)), **CLOSE)
    with pytest.raises(InputError, match="UniPCMultistepScheduler takes no eta"):
        out(pipe(denoiser, samplers.UniPC(5)), eta=0.5)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "type 'flow_prediction'"),
        (lambda: diffusers.DDIMScheduler(prediction_type="score"), "type 'score'; a prediction can be given"),
        (lambda: diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas"),
        (lambda: diffusers.EulerDiscreteScheduler(timestep_type="continuous"), 'timestep_type "continuous"'),
        (lambda: diffusers.DDIMScheduler(beta_end=0.03), "another noise schedule"),
        (lambda: diffusers.DDPMScheduler(variance_type="learned"), "variance_type 'learned_range'"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), NO_TABLE),
        (lambda: diffusers.EDMEulerScheduler(), NO_TABLE),
        (lambda: diffusers.CogVideoXDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02,
                                                 snr_shift_scale=1.0), "needs old_pred_original_sample"),
        (lambda: "DDIMSheduler", "did you mean 'DDIMScheduler'"),
        (lambda: samplers.Heun(5), "has no counterpart"),
        (lambda: samplers.DPMSolver(5, eta=0.5), "eta 0, or 1 with"),
        (lambda: samplers.DPMSolver(5, order=3, eta=1.0), "order 1 or 2"),
        (lambda: samplers.DPMSolver(5, reach=2.0), "without reach"),
        (lambda: samplers.DDIM(5, spacing="quadratic"), "have the spacings"),
        (lambda: samplers.DDIM(5, clip=(0.0, 1.0)), "symmetric range"),
    ],
)  # fmt: skip
def test_schedulers_that_cannot_be_used_are_refused_by_name(scheduler: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        out(pipe(denoiser_of(), scheduler()))


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_scheduler_that_takes_no_clean_images_is_told_what_to_do(name: str) -> None:
    pipeline = pipe(denoiser_of(Dual()), samplers.DDIM(5))
    kind = getattr(diffusers, name)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, prediction_type="sample")
    with pytest.raises(InputError, match=f"{name}.from_config.*prediction_type='epsilon'"):
        pipeline(num_inference_steps=5)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, prediction_type="epsilon")
    assert len(pipeline(num_inference_steps=5).images) == 1
