"""The samplers against diffusers' schedulers, and the schedulers as samplers against diffusers' own loop.

The loop is written here as diffusers' pipelines write it, with none of the package's code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.parameterizations import Dual, Epsilon, Parameterization
from dualout.randomness import SeededDraw, noise
from dualout.samplers import DDIM, DDPM, IPNDM, DPMSolver, FromDiffusers, Heun, Sampler, UniPC
from dualout.samplers.diffusers import named_scheduler
from dualout.schedules import Cosine, Linear, RectifiedFlow, Schedule
from oracles import toy_output

# of its own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHAPE, SEEDS = (2, 4, 4), range(3)
LINEAR = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
# their tables are float32
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def eps_network(x: Tensor, t: Tensor, schedule: Schedule | None = None) -> Tensor:
    level = (schedule or Linear()).level(t)
    alpha, sigma = level.like(x)[:2]
    x0 = 0.3 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - alpha * 0.3) + 0.2 * torch.tanh(x)
    return (x - alpha * x0) / sigma


def start() -> Tensor:
    return noise(SEEDS, SHAPE, dtype=torch.float64)


def native(scheduler: Any, steps: int | list[int], x: Tensor, **arguments: Any) -> Tensor:
    """diffusers' own sampling loop with a network that predicts eps, over K time steps or these."""
    scheduler.set_timesteps(**({"num_inference_steps": steps} if isinstance(steps, int) else {"timesteps": steps}))
    each = arguments.pop("each", None)
    for k, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        output = eps_network(seen, torch.full((len(x),), int(t)))
        x = scheduler.step(output, t, x, **arguments, **({} if each is None else each(k))).prev_sample
    return x


def ours(sampler: Sampler, draw: Any = None) -> Tensor:
    return sampler.sample(Denoiser(eps_network, Epsilon(), Linear()), start(), draw)


# numbers of steps that divide T: its DDIM and DDPM go to t − T // K, which else is not the next step it looks at
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(steps: int, spacing: str, clip: tuple[float, float] | None, eta: float) -> None:
    theirs = diffusers.DDIMScheduler(**LINEAR, timestep_spacing=spacing, clip_sample=clip is not None)
    draw = SeededDraw(SEEDS, SHAPE, dtype=torch.float64)
    expected = native(theirs, steps, start(), eta=eta, each=lambda k: {"variance_noise": draw(k)} if eta else {})
    got = ours(DDIM(steps=steps, spacing=spacing, clip=clip, eta=eta), draw)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
@pytest.mark.parametrize(("variance", "spacing"), [("small", "leading"), ("small", "trailing"), ("large", "leading")])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)], ids=["unclipped", "clipped"])
def test_ddpm(steps: int, variance: str, spacing: str, clip: tuple[float, float] | None) -> None:
    # with large variance and trailing steps theirs adds noise to the result
    theirs = diffusers.DDPMScheduler(
        **LINEAR, timestep_spacing=spacing, clip_sample=clip is not None, variance_type=f"fixed_{variance}"
    )
    draw = SeededDraw(SEEDS, SHAPE)

    def each(k: int) -> dict[str, Any]:
        return {"generator": [torch.Generator().manual_seed(int(seed)) for seed in draw.at(k)]}

    expected = native(theirs, steps, start().float(), each=each)
    sampler = DDPM(steps=steps, variance=variance, spacing=spacing, clip=clip)
    got = sampler.sample(Denoiser(eps_network, Epsilon(), Linear()), start().float(), draw)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmsolver(order: int, steps: int) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler(
        **LINEAR, timestep_spacing="trailing", solver_order=order, final_sigmas_type="zero"
    )
    sampler = DPMSolver(steps=steps, order=order, published=order == 3, clip=None)
    torch.testing.assert_close(ours(sampler).float(), native(theirs, steps, start()).float(), **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 20])
@pytest.mark.parametrize("order", [1, 2])
def test_sde_dpmsolver(order: int, steps: int) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler(
        **LINEAR,
        timestep_spacing="trailing",
        solver_order=order,
        final_sigmas_type="zero",
        algorithm_type="sde-dpmsolver++",
    )
    draw = SeededDraw(SEEDS, SHAPE, dtype=torch.float64)
    expected = native(theirs, steps, start(), each=lambda k: {"variance_noise": draw(k)})
    sampler = DPMSolver(steps=steps, order=order, eta=1.0, clip=None)
    torch.testing.assert_close(ours(sampler, draw).float(), expected.float(), **CLOSE)


@pytest.mark.parametrize("steps", [10, 16])
def test_published_3m_follows_x0_over_long_steps_too(steps: int) -> None:
    # with even steps in t the last but one, to t = 0, is longer in λ than the two before it together
    theirs = diffusers.DPMSolverMultistepScheduler(**LINEAR, solver_order=3, final_sigmas_type="zero")
    sampler = DPMSolver(steps=steps, order=3, published=True, spacing="linspace", clip=None)
    expected = native(theirs, sampler.timesteps(Linear()), start())
    torch.testing.assert_close(ours(sampler).float(), expected.float(), **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order: int, steps: int) -> None:
    theirs = diffusers.UniPCMultistepScheduler(
        **LINEAR, timestep_spacing="trailing", solver_order=order, final_sigmas_type="zero"
    )
    got = ours(UniPC(steps=steps, order=order, clip=None))
    torch.testing.assert_close(got.float(), native(theirs, steps, start()).float(), **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_heun(steps: int) -> None:
    theirs = diffusers.HeunDiscreteScheduler(**LINEAR, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    # it keeps x0 + (sigma/alpha)·eps
    level = Linear().scalars(999)
    expected = native(theirs, steps, start() / level.alpha)
    torch.testing.assert_close(ours(Heun(steps=steps, clip=None)), expected, **CLOSE)
    assert len(theirs.timesteps) == Heun(steps=steps).evaluations


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_first_orders_are_euler_and_deis(steps: int) -> None:
    euler = diffusers.EulerDiscreteScheduler(**LINEAR, timestep_spacing="trailing")
    deis = diffusers.DEISMultistepScheduler(**LINEAR, timestep_spacing="trailing", solver_order=1)
    expected = native(euler, steps, start() / Linear().scalars(999).alpha)
    for sampler in (IPNDM(steps=steps, order=1, clip=None), DDIM(steps=steps, clip=None)):
        torch.testing.assert_close(ours(sampler), expected, **CLOSE)
        # DEIS ends at the level of t = 0, not at the clean one
        further = dataclasses.replace(sampler, steps=steps + 1, spacing=(*sampler.timesteps(Linear()), 0))
        *_, last = further.trajectory(Denoiser(eps_network, Epsilon(), Linear()), start())
        torch.testing.assert_close(native(deis, steps, start()), last.x_t, **CLOSE)


SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
    ("DDIMScheduler", {"clip_sample": True}),
    ("DDIMScheduler", {"clip_sample": False, "prediction_type": "sample"}),
    ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("DDPMScheduler", {"clip_sample": True}),
    ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing", "variance_type": "fixed_large"}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": False}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("DEISMultistepScheduler", {}),
    ("SASolverScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("LMSDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("LCMScheduler", {}),
]


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_a_scheduler_as_a_sampler_is_its_own_loop(name: str, settings: dict[str, Any], steps: int) -> None:
    scheduler = getattr(diffusers, name)(**LINEAR, **settings)
    sampler = FromDiffusers(scheduler, steps=steps, clip=None)
    times = sampler.timesteps(Linear())
    # one image, so that its generator draws what a list of generators would
    x, draw = start()[:1].float(), SeededDraw([0], SHAPE)
    got = sampler.sample(Denoiser(eps_network, Epsilon(), Linear()), x, draw)

    theirs = getattr(diffusers, name)(**LINEAR, **settings)
    theirs.set_timesteps(steps)
    scaled = float(theirs.init_noise_sigma) != 1
    state = x / Linear().scalars(times[0]).alpha if scaled else x
    for k, t in enumerate(theirs.timesteps):
        seen = theirs.scale_model_input(state, t)
        time = t.long().view(1)
        level = Linear().level(time).like(x)
        eps = eps_network(seen, time)
        x0 = (seen - level.sigma * eps) / level.alpha
        output = {"epsilon": eps, "sample": x0, "v_prediction": level.alpha * eps - level.sigma * x0}
        generator = [torch.Generator().manual_seed(int(seed)) for seed in draw.at(k)]
        extra = {"generator": generator} if "generator" in theirs.step.__code__.co_varnames else {}
        state = theirs.step(output[theirs.config.prediction_type], t, state, **extra).prev_sample
    torch.testing.assert_close(got, state, rtol=1e-3, atol=1e-3)
    assert times == theirs.timesteps.tolist()


@pytest.mark.parametrize(
    ("name", "own"),
    [("DDIMScheduler", DDIM), ("DPMSolverMultistepScheduler", DPMSolver), ("UniPCMultistepScheduler", UniPC)],
)
@pytest.mark.parametrize("schedule", [Linear(50, 2e-3, 0.4), Cosine(50)], ids=lambda s: s.name)
def test_a_name_is_built_with_the_denoisers_schedule(name: str, own: type[Sampler], schedule: Schedule) -> None:
    sampler = FromDiffusers(name, steps=5, clip=None)
    same = own(steps=5, spacing=tuple(sampler.timesteps(schedule)), clip=None)
    denoiser = Denoiser(lambda x, t: toy_output(x, schedule.level(t)), Dual(), schedule)
    a, b = (some.sample(denoiser, start()).float() for some in (sampler, same))
    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("parameterization", [Dual(), Dual(ratio="velocity")])
def test_any_parameterization_reaches_any_scheduler(parameterization: Parameterization) -> None:
    schedule = Linear()
    denoiser = Denoiser(lambda x, t: toy_output(x, schedule.level(t)), parameterization, schedule)
    expected = DDIM(steps=5, clip=None).sample(denoiser, start())
    for kind in ("epsilon", "sample", "v_prediction"):
        theirs = diffusers.DDIMScheduler(**LINEAR, timestep_spacing="trailing", clip_sample=False, prediction_type=kind)
        got = FromDiffusers(theirs, steps=5).sample(denoiser, start())
        torch.testing.assert_close(got, expected, **CLOSE)


def test_the_scheduler_is_not_changed_and_serves_twice() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**LINEAR)
    before = dict(scheduler.config), scheduler.num_inference_steps
    sampler = FromDiffusers(scheduler, steps=5)
    first = ours(sampler)
    assert torch.equal(first, ours(sampler))
    assert (dict(scheduler.config), scheduler.num_inference_steps) == before
    # two trajectories at once do not disturb each other
    a, b = (sampler.trajectory(Denoiser(eps_network, Epsilon(), Linear()), start()) for _ in range(2))
    for m, n in zip(a, b, strict=True):
        assert torch.equal(m.x_next, n.x_next)


def test_clipping_is_the_schedulers_where_it_has_it() -> None:
    def far(x: Tensor, t: Tensor) -> Tensor:
        return x - 5

    denoiser = Denoiser(far, Epsilon(), Linear())
    for name in ("DDIMScheduler", "UniPCMultistepScheduler"):
        half = FromDiffusers(name, steps=4, clip=(-0.5, 0.5)).sample(denoiser, start())
        assert half.abs().max() <= 0.5 + 1e-5
        assert FromDiffusers(name, steps=4, clip=None).sample(denoiser, start()).abs().max() > 1
    with pytest.raises(InputError, match="symmetric range"):
        FromDiffusers("DDIMScheduler", steps=4, clip=(0.0, 1.0)).sample(denoiser, start())
    # which has the settings, and reads neither
    for settings in ({}, {"clip_sample": True}, {"thresholding": True}):
        scheduler = diffusers.TCDScheduler(**LINEAR, **settings)
        assert FromDiffusers(scheduler, steps=4, clip=(-0.5, 0.5)).sample(denoiser, start()).abs().max() <= 0.55
        assert FromDiffusers(scheduler, steps=4, clip=None).sample(denoiser, start()).abs().max() > 1


def test_dynamic_thresholding_is_the_schedulers() -> None:
    def far(x: Tensor, t: Tensor) -> Tensor:
        return 3 * x

    scheduler = diffusers.DPMSolverMultistepScheduler(**LINEAR, thresholding=True, sample_max_value=4.0)
    got = FromDiffusers(scheduler, steps=4).sample(Denoiser(far, Epsilon(), Linear()), start().float())
    scheduler.set_timesteps(4)
    x = start().float()
    for t in scheduler.timesteps:
        x = scheduler.step(3 * x, t, x).prev_sample
    torch.testing.assert_close(got, x, **CLOSE)


def test_time_steps_may_be_told_where_the_class_takes_them() -> None:
    sampler = FromDiffusers("DDPMScheduler", steps=3, spacing=(900, 400, 20))
    assert sampler.timesteps(Linear()) == [900, 400, 20]
    same = DDPM(steps=3, spacing=(900, 400, 20), variance="small")
    draw = SeededDraw(SEEDS, SHAPE)
    denoiser = Denoiser(eps_network, Epsilon(), Linear())
    a, b = (s.sample(denoiser, start().float(), draw) for s in (sampler, same))
    assert a.shape == b.shape
    with pytest.raises(InputError, match="cannot be told its time steps"):
        ours(FromDiffusers("DDIMScheduler", steps=3, spacing=(900, 400, 20)))


@pytest.mark.parametrize("steps", [1, 3, 7, 10])
@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_a_spacing_by_name_is_the_setting_of_a_class_that_takes_no_time_steps(name: str, steps: int) -> None:
    told = FromDiffusers(name, steps=steps, spacing="trailing")
    theirs = named_scheduler(name, Linear(), timestep_spacing="trailing")
    assert told.timesteps(Linear()) == DDIM(steps=steps).timesteps(Linear())
    torch.testing.assert_close(ours(told), ours(FromDiffusers(theirs, steps=steps)), rtol=0, atol=0)
    leading = getattr(diffusers, name)(**LINEAR, timestep_spacing="leading")
    ours(FromDiffusers(leading, steps=steps, spacing="trailing"))
    assert leading.config.timestep_spacing == "leading"  # it is a copy that is set


@pytest.mark.parametrize(
    ("name", "spacing", "says"),
    [
        ("DDIMScheduler", "quadratic", "only a spacing: trailing, leading, linspace"),
        ("UniPCMultistepScheduler", "leading", r"leading spacing are others .* say trailing"),
        ("PNDMScheduler", "trailing", "looks 14 times in 5 steps"),
        ("RePaintScheduler", "trailing", "cannot follow the denoiser's schedule"),
    ],
)
def test_a_spacing_that_a_class_has_not_is_refused(name: str, spacing: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        FromDiffusers(name, steps=5, spacing=spacing).sample(Denoiser(eps_network, Epsilon(), Linear()), start())


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        ("DDIMSheduler", "did you mean 'DDIMScheduler'"),
        ("UNet2DModel", "unknown scheduler of diffusers"),
        ("FlowMatchEulerDiscreteScheduler", "takes no table of betas"),
        ("HeunDiscreteScheduler", "those that look once a step"),
        ("PNDMScheduler", "those that look once a step"),
        ("KDPM2DiscreteScheduler", "those that look once a step"),
        (diffusers.DDIMScheduler(beta_start=1e-3), "another noise schedule than the denoiser"),
        (diffusers.DDIMScheduler(num_train_timesteps=500), "another noise schedule than the denoiser"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "no scheduler with a table of alphas_cumprod"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), 'timestep_type "continuous"'),
        (
            diffusers.DPMSolverMultistepScheduler(**LINEAR, use_flow_sigmas=True),
            "use_flow_sigmas, another noise schedule",
        ),
        (object(), "no scheduler with a table of alphas_cumprod"),
        (diffusers.EulerDiscreteScheduler(timestep_spacing="linspace"), "between the discrete ones"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_cannot_be_used_is_refused(scheduler: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        ours(FromDiffusers(scheduler, steps=7))
    assert says in str(error.value)


@pytest.mark.parametrize(("scheduler", "steps"), [("PNDMScheduler", 1), ("LCMScheduler", 60)])
def test_steps_that_a_scheduler_cannot_take_are_refused(scheduler: str, steps: int) -> None:
    with pytest.raises(InputError, match=f"{scheduler} cannot take these {steps} steps: "):
        ours(FromDiffusers(scheduler, steps=steps))


def test_schedules_that_do_not_preserve_variance_are_refused() -> None:
    denoiser = Denoiser(lambda x, t: x, Epsilon(), RectifiedFlow(50))
    with pytest.raises(InputError, match="need alpha² \\+ sigma² = 1"):
        FromDiffusers(steps=3).sample(denoiser, start())


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_scheduler_that_draws_by_itself_is_given_the_noise(spacing: str) -> None:
    theirs = diffusers.DDPMScheduler(**LINEAR, timestep_spacing=spacing)
    fresh = torch.randn(5, *start().shape, dtype=torch.float64)
    asked = []

    def draw(k: int) -> Tensor:
        asked.append(k)
        return fresh[k]

    got = ours(FromDiffusers(theirs, steps=5), draw)
    assert asked == ([0, 1, 2, 3, 4] if spacing == "trailing" else [0, 1, 2, 3])
    torch.testing.assert_close(got, ours(DDPM(5, spacing=spacing, variance="small"), lambda k: fresh[k]), **CLOSE)


@pytest.mark.parametrize(
    "name", ["EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler", "SASolverScheduler"]
)
def test_noise_given_by_hand_is_that_of_the_seeds(name: str) -> None:
    sampler = FromDiffusers(getattr(diffusers, name)(**LINEAR, timestep_spacing="trailing"), steps=4)
    draw = SeededDraw(SEEDS, SHAPE, dtype=torch.float64)
    seeded = ours(sampler, draw)
    assert torch.equal(ours(sampler, lambda k: draw(k)), seeded)
    assert not torch.equal(ours(sampler, lambda k: draw(k + 1)), seeded)


def test_a_scheduler_that_draws_twice_a_step_needs_seeds() -> None:
    class Twice(diffusers.DDPMScheduler):
        def step(self, output: Tensor, t: int, x: Tensor, generator: Any = None) -> Any:  # type: ignore[override]
            return super().step(output, t, super().step(output, t, x, generator).prev_sample, generator)

    sampler = FromDiffusers(Twice(**LINEAR), steps=3)
    assert ours(sampler, SeededDraw(SEEDS, SHAPE)).isfinite().all()
    with pytest.raises(InputError, match=r"draws more than once a step: give draw=dualout\.SeededDraw"):
        ours(sampler, lambda k: start())


def test_noise_of_another_shape_is_refused_where_a_scheduler_draws() -> None:
    with pytest.raises(InputError, match=r"draw\(k\) gives noise for each image"):
        ours(FromDiffusers("DDPMScheduler", steps=3), lambda k: start()[:1])
