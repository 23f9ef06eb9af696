"""What schedulers of diffusers say of a training: held against the tables that they make themselves."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import dualout
from dualout.errors import InputError
from dualout.networks import build, foreign
from dualout.networks.trained import trained_by
from dualout.samplers import DDIM, DDPM, IPNDM, DPMSolver, FromDiffusers, Heun, UniPC
from dualout.training.closed_form import fit
from dualout.training.upgrade import upgrade

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ZERO: dict[str, Any] = {
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction",
    "clip_sample": False,
}  # fmt: skip
SHAPE = (1, 8, 8)


def arguments(name: str) -> Any:
    cls = getattr(diffusers, name)
    return {} if hasattr(cls, "_backends") else inspect.signature(cls).parameters


NAMES = [name for name in dir(diffusers) if name.endswith("Scheduler") and "num_train_timesteps" in arguments(name)]
TABLES: list[dict[str, Any]] = [
    *(
        {"beta_schedule": kind}
        for kind in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")
    ),
    {"beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.3, "num_train_timesteps": 50},
    {"trained_betas": [1e-3, 2e-3, 5e-2]},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"rescale_betas_zero_snr": True, "prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
    {"use_flow_sigmas": True},
    {},
]


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_is_the_schedulers_own_or_is_refused(name: str) -> None:
    for said in TABLES:
        known = said.keys() <= arguments(name).keys()
        try:
            scheduler = getattr(diffusers, name)(**said)
        except (TypeError, ValueError, NotImplementedError, IndexError):
            continue
        try:
            _, schedule = trained_by({"_class_name": name, **said})
        except InputError:
            # what has betas of a known kind is not
            kinds = ("linear", "scaled_linear", "squaredcos_cap_v2")
            others = name in ("LCMScheduler", "TCDScheduler") or "snr_shift_scale" in arguments(name)
            assert others or not (known and said.get("beta_schedule") in kinds)
            continue
        assert known
        table = getattr(scheduler, "alphas_cumprod", None)
        if table is not None and len(table) == schedule.steps:
            # where its last is 0, some have 2⁻²⁴ instead
            torch.testing.assert_close(schedule.levels.alpha**2, table.double(), rtol=1e-3, atol=7e-8)


def pipeline(path: Path, **settings: Any) -> Any:
    """A pipeline of a network of v, and the scheduler it has."""
    torch.manual_seed(0)
    network = build("tiny:width=8", 1, 8, 1).eval()
    scheduler = diffusers.DDIMScheduler(**(ZERO | settings))
    diffusers.DDIMPipeline(network, scheduler).save_pretrained(path)
    return network, scheduler


@torch.no_grad()
def native(network: Any, scheduler: Any, steps: int, x: Tensor) -> list[Tensor]:
    """The images that diffusers' own loop sees, and what it ends with."""
    scheduler.set_timesteps(steps)
    seen = [x]
    for t in scheduler.timesteps:
        seen.append(scheduler.step(network(seen[-1], t).sample, t, seen[-1]).prev_sample)
    return seen


BETAS: list[dict[str, Any]] = [
    {"beta_schedule": "linear"}, {"beta_schedule": "scaled_linear"}, {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": torch.linspace(1e-3, 5e-2, 200).tolist(), "num_train_timesteps": 200},
]  # fmt: skip


@pytest.mark.parametrize("betas", BETAS, ids=lambda b: b.get("beta_schedule", "a table"))
def test_zero_terminal_snr_is_sampled_as_by_diffusers_step_for_step(betas: dict[str, Any], tmp_path: Path) -> None:
    network, scheduler = pipeline(tmp_path, **betas)
    original = foreign.load(tmp_path)
    noise = dualout.noise(range(3), SHAPE)
    for steps in (1, 4, 20):
        expected = native(network, scheduler, steps, noise)
        for model in (original, upgrade(original)):
            sampler = DDIM(steps=steps, clip=None)
            moments = list(sampler.trajectory(model, noise))
            assert [m.t for m in moments[:steps]] == scheduler.timesteps.tolist()
            for moment, x in zip(moments, expected, strict=False):
                torch.testing.assert_close(moment.x_t, x, rtol=2e-4, atol=2e-4)
            torch.testing.assert_close(sampler.sample(model, noise), expected[-1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_upgraded_it_is_finite_with_every_sampler_or_says_why_not(kind: str, tmp_path: Path) -> None:
    pipeline(tmp_path, prediction_type=kind)
    images = dualout.noise(range(96), SHAPE).tanh()
    fitted = fit(upgrade(foreign.load(tmp_path)), images.split(16), held_out=32, bins=4)
    assert all(row["after"] < (1 + 1e-6) * row["before"] < 10 for row in fitted.table)
    noise, draw = dualout.noise(range(2), SHAPE), dualout.SeededDraw(range(2), SHAPE)
    for sampler in (DDIM(steps=5), DDIM(steps=5, eta=1.0), DDPM(steps=5), DPMSolver(steps=5), UniPC(steps=5)):
        assert sampler.sample(fitted.denoiser, noise, draw).abs().max() < 10
    for sampler in (Heun(steps=5), IPNDM(steps=5)):
        with pytest.raises(InputError, match=r"cannot begin where alpha is 1e-06 .*take ddim, dpmsolver or unipc"):
            sampler.sample(fitted.denoiser, noise)
    fitted.denoiser.save_pretrained(tmp_path / "out")
    again = dualout.Denoiser.from_pretrained(tmp_path / "out")
    assert torch.equal(DDIM(steps=3).sample(again, noise), DDIM(steps=3).sample(fitted.denoiser, noise))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_of_zero_terminal_snr_is_its_own_loop(name: str, tmp_path: Path) -> None:
    from dualout.export import DualOutputPipeline

    network, first = pipeline(tmp_path, beta_schedule="linear")
    scheduler = getattr(diffusers, name).from_config(first.config)
    noise = dualout.noise(range(2), SHAPE)
    expected = native(network, scheduler, 5, noise)[-1]
    got = FromDiffusers(scheduler, steps=5, clip=None).sample(foreign.load(tmp_path), noise)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    made = DualOutputPipeline(network, scheduler, "velocity", clip=None)
    made.set_progress_bar_config(disable=True)
    got = made(2, latents=noise, num_inference_steps=5, output_type="latent").images
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def test_a_scheduler_of_zero_terminal_snr_that_takes_noise_is_refused(tmp_path: Path) -> None:
    from dualout.export import DualOutputPipeline

    network, _ = pipeline(tmp_path)
    scheduler = diffusers.DDIMScheduler(**(ZERO | {"prediction_type": "epsilon"}))
    says = 'takes noise, of which no image follows at its last time step: make it with prediction_type="v_prediction"'
    with pytest.raises(InputError, match=says):
        FromDiffusers(scheduler, steps=5).sample(foreign.load(tmp_path), dualout.noise(range(2), SHAPE))
    with pytest.raises(InputError, match=says):
        DualOutputPipeline(network, scheduler, "velocity")
    # one that is named is made of what it can be read by
    named = FromDiffusers("DDIMScheduler", steps=5, spacing="trailing", clip=None)
    model, noise = foreign.load(tmp_path), dualout.noise(range(2), SHAPE)
    expected = DDIM(steps=5, clip=None).sample(model, noise)
    torch.testing.assert_close(named.sample(model, noise), expected, rtol=2e-4, atol=2e-4)
    # what one of another class keeps of the setting and does not use, changes nothing
    kept = diffusers.DEISMultistepScheduler.from_config(scheduler.config)
    linear = dualout.Denoiser(network, dualout.Epsilon(), dualout.schedules.Linear())
    assert FromDiffusers(kept, steps=5).sample(linear, dualout.noise(range(2), SHAPE)).isfinite().all()


def test_epsilon_with_zero_terminal_snr_is_refused_with_what_to_do() -> None:
    config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
    with pytest.raises(InputError, match=r"'epsilon' and rescale_betas_zero_snr.*false in scheduler_config.json"):
        trained_by(config)


def test_what_a_scheduler_keeps_of_another_and_does_not_use_is_not_believed() -> None:
    ddim = diffusers.DDIMScheduler()
    for name in ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "IPNDMScheduler"):
        made = getattr(diffusers, name).from_config(ddim.config)
        with pytest.raises(InputError, match=f"{name} has no beta_schedule.*Flow.*Karras"):
            trained_by(dict(made.config) | {"_class_name": name})


@pytest.mark.parametrize("said", [{"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}])
def test_rectified_flow_by_a_scheduler_of_betas_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"UniPC\w+ is of rectified flow.*Denoiser\(network, Flow"):
        trained_by({"_class_name": "UniPCMultistepScheduler", **said})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"thresholding": True, "sample_max_value": 3.0}, r"thresholding .*0.995, sample_max_value 3.0.*--clip false"),
        ({"clip_sample": True, "clip_sample_range": 2.0}, r"clips x0 to ±2.0 .*--clip false"),
    ],
)
def test_bounds_of_x0_that_are_not_kept_are_told(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    pipeline(tmp_path, **settings)
    with pytest.warns(UserWarning, match=says):
        foreign.load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipeline(tmp_path / "usual", clip_sample=True)
        foreign.load(tmp_path / "usual")


def test_a_variance_that_is_said_itself_is_refused(tmp_path: Path) -> None:
    for kind in ("learned_range", "learned"):
        scheduler = diffusers.DDPMScheduler(variance_type=kind)
        diffusers.DDPMPipeline(build("tiny:width=8", 1, 8, 2), scheduler).save_pretrained(tmp_path / kind)
    assert foreign.load(tmp_path / "learned_range").parameterization.spec == "learned"
    with pytest.raises(InputError, match=r"variance_type 'learned': .* which is variance_type 'learned_range'"):
        foreign.load(tmp_path / "learned")


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_a_distilled_network_is_no_epsilon_network(name: str, tmp_path: Path) -> None:
    _, scheduler = pipeline(tmp_path, prediction_type="epsilon", rescale_betas_zero_snr=False)
    distilled = getattr(diffusers, name).from_config(scheduler.config)
    distilled.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(InputError, match=rf"{name} samples networks that were distilled into consistency models"):
        foreign.load(tmp_path)
    # what the message says to do for a network that was not
    diffusers.DDPMScheduler.from_config(distilled.config).save_pretrained(tmp_path / "scheduler")
    assert isinstance(foreign.load(tmp_path).parameterization, dualout.Epsilon)


def test_a_network_of_which_a_part_is_always_float32_is_read(tmp_path: Path) -> None:
    network = diffusers.WanTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, text_dim=12,
        freq_dim=8, ffn_dim=16, rope_max_seq_len=32,
    )  # fmt: skip
    network.save_pretrained(tmp_path)
    read = foreign.diffusers_model(tmp_path)
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in network.state_dict().items())
    assert {tensor.device.type for tensor in (*read.parameters(), *read.buffers())} == {"cpu"}


def test_a_scheduler_is_refused_before_its_network_is_read(tmp_path: Path) -> None:
    pipeline(tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler has no beta_schedule"):
        foreign.load(tmp_path)
