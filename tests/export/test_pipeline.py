"""DualOutputPipeline: what it writes and reads, its arguments, and what comes out."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import dualout
from dualout import CleanImage, Denoiser, Dual, Epsilon, InputError, Karras, LearnedVariance, Velocity, samplers
from dualout.calibrated import Calibrated, Calibration
from dualout.denoiser import tensor_of
from dualout.export import DualOutputPipeline
from dualout.guidance import ClassifierFree
from dualout.networks import Positional, widen
from dualout.parameterizations import Upgraded
from dualout.schedules import Cosine, Linear, RectifiedFlow
from pipelines import CLOSE, SHAPE, denoiser_of, out, pipe, quiet, start, unet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def loaded(path: Path, **options: Any) -> DualOutputPipeline:
    return quiet(DualOutputPipeline.from_pretrained(path, **options))


def test_saved_loaded_and_used_by_diffusers_alone(tmp_path: Path) -> None:
    denoiser = denoiser_of()
    denoiser.card = {"training": {"images": 60000}}
    first = pipe(denoiser, samplers.DPMSolver(5))
    first.save_pretrained(tmp_path / "it")
    assert {p.name for p in (tmp_path / "it").iterdir()} == {
        "model_index.json", "unet", "scheduler", "README.md", "pipeline.py",
    }  # fmt: skip
    again = loaded(tmp_path / "it")
    assert torch.equal(out(again), out(first))
    assert again.denoiser.card == denoiser.card
    # without dualout, or with diffusers' own loader
    model = diffusers.UNet2DModel.from_pretrained(tmp_path / "it", subfolder="unet")
    assert model.config.out_channels == 3
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path / "it", subfolder="scheduler")
    assert scheduler.config.solver_order == 2
    here = str(tmp_path / "it")
    other = quiet(diffusers.DiffusionPipeline.from_pretrained(here, custom_pipeline=here, trust_remote_code=True))
    assert isinstance(other, DualOutputPipeline)
    assert torch.equal(out(other), out(first))
    card = (tmp_path / "it" / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "| images | 60000 |" in card
    assert "DualOutputPipeline.from_pretrained" in card


@pytest.mark.parametrize(
    ("parameterization", "kind"), [(Epsilon(), "epsilon"), (CleanImage(), "sample"), (Velocity(), "v_prediction")]
)
def test_diffusers_own_pipeline_reads_a_network_of_one_output(parameterization: Any, kind: str, tmp_path: Path) -> None:
    pipeline = pipe(denoiser_of(parameterization), samplers.DDIM(5))
    assert pipeline.scheduler.config.prediction_type == kind
    pipeline.save_pretrained(tmp_path)
    theirs = quiet(diffusers.DDIMPipeline.from_pretrained(tmp_path))
    expected = theirs(batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np")
    got = pipeline(batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np")
    torch.testing.assert_close(torch.from_numpy(got.images), torch.from_numpy(expected.images), **CLOSE)


@pytest.mark.parametrize(
    "parameterization",
    [Dual(ratio="step"), LearnedVariance(Dual(ratio="step")), Upgraded(ratio="pixel"), Karras(), Dual(ratio=0.3)],
    ids=lambda p: p.spec,
)
def test_there_and_back(parameterization: Any, tmp_path: Path) -> None:
    denoiser = denoiser_of(parameterization, Cosine(100))
    if denoiser.head is not None:
        for tensor in denoiser.head.state_dict().values():
            tensor.normal_()
    pipeline = pipe(denoiser)
    pipeline.save_pretrained(tmp_path)
    x = start()
    for other in (pipeline.denoiser, loaded(tmp_path).denoiser):
        assert other.parameterization == parameterization
        assert other.schedule == denoiser.schedule
        with torch.no_grad():
            a, b = denoiser(x, 60), other(x, 60)
        assert torch.equal(a.x0, b.x0)
        assert all(torch.equal(part, b.parts[name]) for name, part in a.parts.items())
    # and on into a checkpoint of the package
    pipeline.denoiser.save_pretrained(tmp_path / "own")
    assert torch.equal(Denoiser.from_pretrained(tmp_path / "own")(x, 60).x0, denoiser(x, 60).x0)


def test_a_pipeline_of_diffusers_own_is_read_with_a_parameterization(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    quiet(diffusers.DDIMPipeline(unet(1), scheduler)).save_pretrained(tmp_path)
    pipeline = loaded(tmp_path, parameterization="eps")
    denoiser = Denoiser(pipeline.unet, Epsilon(), Linear()).eval()
    torch.testing.assert_close(out(pipeline), samplers.DDIM(5).sample(denoiser, start()), **CLOSE)
    assert pipeline.schedule == Linear()
    with pytest.raises(InputError, match="'dual' of 1-channel images needs a network output of shape"):
        out(loaded(tmp_path))


def test_a_widened_network_is_an_ordinary_one_afterwards(tmp_path: Path) -> None:
    network = widen(unet(1), channels=3)
    denoiser = Denoiser(network, Dual(), Linear()).route("eps")
    pipe(denoiser, samplers.DDIM(5)).save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert type(again.unet.conv_out) is nn.Conv2d
    torch.testing.assert_close(tensor_of(again.unet(start(), 5)), tensor_of(network(start(), 5)), **CLOSE)
    # one convolution in place of two rounds otherwise, which eps' route multiplies by sigma / alpha, 157 at first
    sampled = samplers.DDIM(5).sample(denoiser, start())
    torch.testing.assert_close(out(again), sampled, rtol=1e-3, atol=1e-3)


CALIBRATION = Calibration(
    samplers.DDIM(4).config(),
    [999, 749, 499, 249],
    {
        "x0_scale": [1.1, 1.0, 0.9, 1.05],
        "eps_scale": [1.0, 1.2, 1.1, 0.9],
        "ratio_gain": [1.0, 2.0, 0.5, 1.0],
        "ratio_shift": [0.1, 0.2, -0.4, 0.0],
        "x0_trend": [0.0, 0.3, -0.2, 0.5],
    },
)


@pytest.mark.parametrize("sampler", [samplers.DDIM(4), samplers.DPMSolver(4), samplers.UniPC(4)], ids=lambda s: s.spec)
def test_a_calibration_goes_with_the_pipeline(sampler: samplers.Sampler, tmp_path: Path) -> None:
    denoiser = denoiser_of()
    calibration = Calibration(sampler.config(), CALIBRATION.times, CALIBRATION.values)
    pipe(denoiser, calibration=calibration).save_pretrained(tmp_path)
    again = loaded(tmp_path)
    expected = sampler.sample(Calibrated.of(denoiser, calibration), start())
    torch.testing.assert_close(out(again, num_inference_steps=None, calibrated=True), expected, **CLOSE)
    plain = out(again, num_inference_steps=4)
    torch.testing.assert_close(plain, sampler.sample(denoiser, start()), **CLOSE)
    assert (plain - expected).abs().max() > 0.05
    assert again.calibration is not None
    assert again.calibration.sampler == json.loads(json.dumps(sampler.config()))
    assert "calibrated for" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("sampler", [samplers.DDIM(4), samplers.DPMSolver(4), samplers.UniPC(4)], ids=lambda s: s.spec)
def test_a_calibration_may_have_moved_the_time_steps(sampler: samplers.Sampler) -> None:
    denoiser, times = denoiser_of(), [990, 610, 480, 75]
    calibration = Calibration(sampler.config(), times, CALIBRATION.values)
    expected = sampler.at(times).sample(Calibrated.of(denoiser, calibration), start())
    got = out(pipe(denoiser, calibration=calibration), calibrated=True, num_inference_steps=None)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("sampler", [samplers.DDIM(4), samplers.UniPC(4)], ids=lambda s: s.spec)
def test_a_calibrated_pipeline_is_guided_as_the_command_line_guides(sampler: samplers.Sampler) -> None:
    denoiser, labels = denoiser_of(classes=4), torch.tensor([0, 2, 1])
    calibration = Calibration(sampler.config(), CALIBRATION.times, CALIBRATION.values)
    pipeline = pipe(denoiser, calibration=calibration)
    guided = ClassifierFree(Calibrated.of(denoiser, calibration), 3.0, class_labels=3)
    options: dict[str, Any] = {"calibrated": True, "num_inference_steps": None, "class_labels": labels}
    got = out(pipeline, guidance_scale=3.0, **options)
    torch.testing.assert_close(got, sampler.sample(guided, start(), class_labels=labels), rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="fitted to the trained blend, route 'mix'; got route 'x0'"):
        out(pipeline, route="x0", **options)


def test_a_calibration_is_for_its_time_steps() -> None:
    pipeline = pipe(denoiser_of(), calibration=CALIBRATION)
    with pytest.raises(InputError, match="is for 4 steps, got num_inference_steps=5"):
        out(pipeline, calibrated=True)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, beta_schedule="linear")
    says = r"time steps \[999, 749, 499, 249\], and DPMSolverMultistepScheduler takes \[999, 7"
    with pytest.raises(InputError, match=says):
        out(pipeline, calibrated=True, num_inference_steps=4)
    with pytest.raises(InputError, match="calibration is damaged"):
        DualOutputPipeline(unet(3), diffusers.DDIMScheduler(), calibration={"times": [1], "value": 3})
    with pytest.raises(InputError, match="needs a pipeline with a calibration"):
        out(pipe(denoiser_of()), calibrated=True)
    # a scheduler whose images are x0 + σ·eps, told the time steps
    denoiser = denoiser_of()
    euler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", prediction_type="sample")
    got = out(pipe(denoiser, euler, calibration=CALIBRATION, clip=None), calibrated=True, num_inference_steps=None)
    expected = samplers.DDIM(4, clip=None).sample(Calibrated.of(denoiser, CALIBRATION), start())
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_routes() -> None:
    denoiser = denoiser_of()
    pipeline = pipe(denoiser, samplers.DDIM(5))
    for route in ("eps", "x0", "velocity", 0.25):
        expected = samplers.DDIM(5).sample(denoiser.route(route), start())
        torch.testing.assert_close(out(pipeline, route=route), expected, **CLOSE)
    with pytest.raises(InputError, match="unknown route 'esp'"):
        out(pipeline, route="esp")


def test_classes_and_guidance() -> None:
    denoiser = denoiser_of(classes=4)
    pipeline, labels = pipe(denoiser, samplers.DDIM(5)), torch.tensor([0, 2, 1])
    expected = samplers.DDIM(5).sample(denoiser, start(), class_labels=labels)
    torch.testing.assert_close(out(pipeline, class_labels=[0, 2, 1]), expected, **CLOSE)
    guided = ClassifierFree(denoiser, 3.0, class_labels=3)
    expected = samplers.DDIM(5).sample(guided, start(), class_labels=labels)
    got = out(pipeline, class_labels=labels, guidance_scale=3.0)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    within = ClassifierFree(denoiser, 3.0, interval=(0.5, 5.0), class_labels=3)
    expected = samplers.DDIM(5).sample(within, start(), class_labels=labels)
    given = out(pipeline, class_labels=labels, guidance_scale=3.0, guidance_interval=(0.5, 5.0))
    torch.testing.assert_close(given, expected, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(given, got, rtol=2e-4, atol=2e-4)
    with pytest.raises(InputError, match="guidance_scale how much"):
        out(pipeline, class_labels=labels, guidance_interval=(0.5, 5.0))
    one = samplers.DDIM(5).sample(denoiser, start(), class_labels=torch.tensor([2, 2, 2]))
    torch.testing.assert_close(out(pipeline, class_labels=2), one, **CLOSE)
    torch.testing.assert_close(out(pipeline, conditions={"class_labels": labels}), out(pipeline, class_labels=labels))
    with pytest.raises(InputError, match="2 class_labels for 3 images"):
        out(pipeline, class_labels=[1, 2])
    with pytest.raises(InputError, match="guidance_scale needs"):
        out(pipe(denoiser_of()), guidance_scale=2.0)


def test_a_list_of_generators_makes_images_that_do_not_depend_on_the_batch() -> None:
    pipeline = pipe(denoiser_of(), samplers.DDPM(5, variance="small"))

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = out(pipeline, batch_size=3, generator=generators(5, 6, 7))
    for i, seed in enumerate((5, 6, 7)):
        torch.testing.assert_close(out(pipeline, generator=generators(seed)), together[i : i + 1], **CLOSE)
    once, twice = (out(pipeline, batch_size=2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(once, twice)
    with pytest.raises(InputError, match="2 generators for 3 images"):
        out(pipeline, batch_size=3, generator=generators(1, 2))


def test_callbacks_see_and_may_change_what_happens() -> None:
    pipeline, seen = pipe(denoiser_of(), samplers.DDIM(5)), []

    def watch(caller: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        assert caller is pipeline
        seen.append((step, int(t), {k: v.shape for k, v in given.items()}))
        return {"latents": torch.zeros_like(given["latents"])} if step == 4 else {}

    names = ["latents", "x0", "eps", "ratio"]
    made = out(pipeline, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert [s[:2] for s in seen] == list(enumerate([999, 799, 599, 399, 199]))
    assert all(s[2] == dict.fromkeys(names, (3, 1, 8, 8)) for s in seen)
    assert torch.equal(made, torch.zeros(3, *SHAPE))
    with pytest.raises(InputError, match="unknown tensor for callback_on_step_end: 'x_0'"):
        out(pipeline, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["x_0"])
    silent = out(pipeline, callback_on_step_end=lambda *_: None)
    assert torch.equal(silent, out(pipeline))


def test_what_comes_out() -> None:
    pipeline = pipe(denoiser_of(), samplers.DDIM(5))
    plain = (out(pipeline) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(out(pipeline, output_type="pt"), plain)
    array = out(pipeline, output_type="np")
    assert torch.equal(torch.from_numpy(array), plain.permute(0, 2, 3, 1))
    images = out(pipeline, output_type="pil")
    assert [i.size for i in images] == [(8, 8)] * 3
    assert images[0].mode == "L"
    (first,) = pipeline(latents=start(), num_inference_steps=5, output_type="pt", return_dict=False)
    assert torch.equal(first, plain)
    assert out(pipeline, latents=start(2)).shape == (2, *SHAPE)
    with pytest.raises(InputError, match="unknown output_type 'pill'; did you mean 'pil'"):
        out(pipeline, output_type="pill")


def test_half_precision_networks_are_sampled_in_float32() -> None:
    pipeline = pipe(denoiser_of(), samplers.DDIM(5))
    full = out(pipeline)
    half = out(pipeline.to(torch.bfloat16))
    assert half.dtype == torch.float32
    assert 0 < (half - full).square().mean().sqrt() < 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"eta": 1.5}, "eta is from 0"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"latents are \(B, 1, H, W\)"),
        ({"latents": torch.zeros(2, 1)}, r"latents are \(B, 1, H, W\)"),
        ({"latents": torch.zeros(2, 1, 8, 8, 8), "output_type": "np"}, "'np' is for images"),
        ({"batch_size": 2}, "batch_size 2"),
        ({"batch_size": 0, "generator": None}, "1 or more"),
    ],
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        out(pipe(denoiser_of()), **options)


def test_latents_are_no_pictures() -> None:
    denoiser = denoiser_of()
    denoiser.card = {"latents of": "vae"}
    pipeline = pipe(denoiser, samplers.DDIM(5, clip=None))
    assert out(pipeline).shape == (3, *SHAPE)
    for kind in ("pil", "np", "pt"):
        with pytest.raises(InputError, match='output_type="latent", and decode'):
            out(pipeline, output_type=kind)


@pytest.mark.parametrize(
    ("labels", "says"), [(["cat"] * 3, "numbers of classes"), ([0, 1, 3], "from 0 to 2"), (-1, "from 0 to 2")]
)
def test_class_labels_are_numbers_of_classes(labels: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        out(pipe(denoiser_of(classes=3)), class_labels=labels)


def test_signals_are_made_from_their_noise() -> None:
    network = diffusers.UNet1DModel(
        sample_size=16, in_channels=2, out_channels=5, block_out_channels=(32, 32), extra_in_channels=32,
        time_embedding_type="positional", norm_num_groups=4, down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
    ).eval()  # fmt: skip
    denoiser = dualout.Denoiser(network, dualout.Dual(), dualout.schedules.Linear())
    noise = dualout.noise(range(2), (2, 16))
    got = out(pipe(denoiser), latents=noise, batch_size=2)
    torch.testing.assert_close(got, samplers.DDIM(5).sample(denoiser, noise), **CLOSE)
    with pytest.raises(InputError, match="a UNet1DModel makes no images: give latents"):
        out(pipe(denoiser), latents=None)


def test_networks_and_schedules_that_diffusers_has_not() -> None:
    with pytest.raises(InputError, match=r"networks\.positional\.Positional; ONNX takes any network"):
        pipe(Denoiser(Positional(unet(3)), Dual(), Linear()))
    with pytest.raises(InputError, match="alpha² \\+ sigma² = 1"):
        pipe(denoiser_of(schedule=RectifiedFlow()))
    with pytest.raises(InputError, match="has no table of alphas_cumprod to read a schedule from; give schedule="):
        DualOutputPipeline(unet(3), diffusers.FlowMatchEulerDiscreteScheduler(), parameterization=Dual())
    headless = DualOutputPipeline(unet(2), diffusers.DDIMScheduler(), parameterization="dual:ratio=step")
    with pytest.raises(InputError, match="a head, which is missing"):
        out(headless)


def test_a_directory_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipe(denoiser_of())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(pipeline.scheduler), "save_pretrained", full)
    with pytest.raises(InputError, match="the disk is full"):
        pipeline.save_pretrained(tmp_path / "it")
    assert not any((tmp_path / "it").iterdir())
    with pytest.raises(InputError, match="push_to_hub"):
        pipeline.save_pretrained(tmp_path / "it", push_to_hub=True)
    pipeline.unet.conv_out.bias.data[0] = float("inf")
    with pytest.raises(InputError, match=r"NaN or infinite are not written: .*; in conv_out\.bias$"):
        pipeline.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_loading_takes_no_pickles(tmp_path: Path) -> None:
    pipe(denoiser_of()).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(OSError, match="safetensors"):
        loaded(tmp_path)
