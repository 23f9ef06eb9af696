"""What runs on a GPU is what runs on a processor, and is never waited for.

Convolutions are computed in float32 proper here, without TF32, so that the two can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dualout
from dualout import Denoiser, Dual, data
from dualout.calibrated import NEUTRAL, Calibrated
from dualout.cli.main import main
from dualout.data.pixels import to_model
from dualout.errors import InputError
from dualout.evaluation.features import Features
from dualout.evaluation.model import Model
from dualout.evaluation.reference import Reference
from dualout.evaluation.sampling import Sampling
from dualout.evaluation.scoring import Scoring
from dualout.export import DualOutputPipeline
from dualout.guidance import ClassifierFree
from dualout.networks.build import build
from dualout.networks.precision import choose
from dualout.parameterizations import Epsilon, Karras, LearnedVariance, Parameterization
from dualout.randomness import SeededDraw, noise
from dualout.samplers import DDIM, DDPM, DPMSolver, FromDiffusers, Heun, Sampler
from dualout.schedules import Linear
from dualout.training import Learner, Run, TrainConfig, train
from dualout.training.calibrate import Fit, fit
from dualout.training.checkpoint import read_state
from dualout.training.setup import first_weights
from variants import parameterizations, samplers, short

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = (2, 4, 4)
DIGIT = (1, 8, 8)
SMALL: dict[str, Any] = {"data": "digits", "network": "tiny:width=8", "batch_size": 16, "warmup": 3, "log_every": 2}


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def unwaited() -> Iterator[None]:
    """Fails where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Conv(nn.Module):
    """A small smooth network with weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + (t / 50).to(x.dtype).view(-1, 1, 1, 1)))


def denoiser_of(parameterization: Parameterization, place: torch.device) -> Denoiser:
    return Denoiser(Conv(parameterization.channels(2)), parameterization, short()).to(place)


def near(there: Tensor, here: Tensor, share: float = 5e-4) -> bool:
    """Whether a tensor of the GPU is that of the processor, to a share of its largest number."""
    assert there.device == GPU
    return bool((there.cpu() - here).abs().max() <= share * here.abs().max())


def sampled(sampler: Sampler, parameterization: Parameterization, place: torch.device) -> Tensor:
    seeds = range(4)
    draw = SeededDraw(seeds, SHAPE, device=place)
    return sampler.sample(denoiser_of(parameterization, place), noise(seeds, SHAPE, device=place), draw)


@pytest.mark.parametrize("sampler", samplers())
def test_every_sampler_makes_the_images_of_the_processor(sampler: Sampler) -> None:
    assert near(sampled(sampler, Dual(), GPU), sampled(sampler, Dual(), CPU))


@pytest.mark.filterwarnings("ignore:this network learned a variance")
@pytest.mark.parametrize("parameterization", parameterizations())
def test_every_parameterization_is_read_and_learnt_as_on_the_processor(parameterization: Parameterization) -> None:
    for sampler in (DDIM(steps=4), DPMSolver(steps=4), DDPM(steps=4)):
        assert near(sampled(sampler, parameterization, GPU), sampled(sampler, parameterization, CPU))
    found = {}
    for place in (CPU, GPU):
        denoiser = denoiser_of(parameterization, place)
        x0, eps = noise(range(6), SHAPE, device=place).clamp(-1, 1), noise(range(6, 12), SHAPE, device=place)
        loss = denoiser.loss(x0, torch.tensor([0, 1, 10, 25, 40, 49], device=place), eps)
        loss.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None])
        found[place] = [loss.total.detach(), gradient, *(part.detach() for part in loss.parts.values())]
    assert all(near(there, here, 1e-3) for there, here in zip(found[GPU], found[CPU], strict=True))


@pytest.mark.parametrize("parameterization", [Epsilon(), Dual(), Dual(ratio=0.3), Dual(ratio="step"), Karras()])
def test_no_step_of_sampling_waits_for_the_gpu(parameterization: Parameterization) -> None:
    channels = parameterization.channels(1)
    denoiser = Denoiser(build("tiny:width=8", 1, 8, channels), parameterization, Linear()).eval().to(GPU)
    x = noise(range(3), DIGIT, device=GPU)
    every: list[Sampler] = [case.values[0] for case in samplers(steps=3)]
    # diffusers' schedulers ask for the values of their coefficients
    own = [sampler for sampler in every if not isinstance(sampler, FromDiffusers)]
    for sampler in own if parameterization == Dual() else (DDIM(steps=3), DPMSolver(steps=3), DDPM(steps=3)):
        sampler.sample(denoiser, x, lambda k: x)
        with unwaited():
            sampler.sample(denoiser, x, lambda k: x)


def test_guidance_routes_and_calibrations_do_not_wait() -> None:
    denoiser = Denoiser(build("tiny:width=8", 1, 8, 3, classes=3), Dual(), Linear()).eval().to(GPU)
    x, label, sampler = noise(range(3), DIGIT, device=GPU), torch.arange(3, device=GPU), Heun(steps=3)
    values = {name: [value + 0.1] * 3 for name, value in NEUTRAL.items()}
    calibrated = Calibrated(denoiser, sampler.timesteps(denoiser.schedule), values)
    views = [*map(denoiser.route, ("eps", "x0", "velocity", 0.4)), calibrated]
    for view in [
        *views,
        ClassifierFree(denoiser, 2.0, class_labels=3),
        ClassifierFree(calibrated, 2.0, class_labels=3),
    ]:
        sampler.sample(view, x, class_labels=label)
        with unwaited():
            sampler.sample(view, x, class_labels=label)


def learnt(place: torch.device, precision: str = "fp32", **fields: Any) -> tuple[Learner, list[float]]:
    config = TrainConfig(
        **(SMALL | {"steps": 20, "precision": precision, "channels_last": place.type == "cuda"} | fields)
    )
    dataset = data.load("digits")
    denoiser = first_weights(config, dataset).to(place)
    denoiser.network.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    learner = Learner(denoiser, config, scaled=precision == "fp16")
    return learner, [float(step.loss) for step in train(learner, dataset)]


def test_training_follows_the_processor_in_every_precision() -> None:
    _, expected = learnt(CPU)
    for precision, share in {"fp32": 1e-3, "bf16": 0.02, "fp16": 0.05}.items():
        learner, losses = learnt(GPU, precision)
        assert np.abs(np.subtract(losses, expected)).max() < share * max(expected), precision
        assert {p.device for p in (*learner.denoiser.parameters(), *learner.ema.parameters())} == {GPU}
        assert learner.finite()
    _, dropped = learnt(GPU, network="tiny:width=8:dropout=0.5")
    torch.manual_seed(99)
    assert learnt(GPU, network="tiny:width=8:dropout=0.5")[1] == pytest.approx(dropped, rel=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"accumulate": 2},
        {"conditional": True, "parameterization": "velocity"},
        {"network": "tiny:width=8:dropout=0.5"},
        {"compile": True},
    ],
    ids=str,
)
def test_training_is_the_same_when_it_is_recorded(fields: dict[str, Any]) -> None:
    for precision, share in {"fp32": 1e-4, "bf16": 0.02, "fp16": 0.02}.items():
        launched, expected = learnt(GPU, precision, **fields)
        recorded, losses = learnt(GPU, precision, graph=True, **fields)
        assert losses == pytest.approx(expected, rel=share), precision
        assert recorded.scaler.state_dict() == launched.scaler.state_dict()


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_of_training_waits_for_the_gpu(precision: str, recorded: bool) -> None:
    fields = {"steps": 40, "log_every": 1000, "precision": precision, "conditional": True, "graph": recorded}
    config = TrainConfig(**(SMALL | fields))
    dataset = data.load("digits")
    learner = Learner(first_weights(config, dataset).to(GPU), config, scaled=precision == "fp16")
    steps = train(learner, dataset)
    list(islice(steps, 5))
    with unwaited():
        done = [step.index for step in islice(steps, 20)]
    assert done == list(range(6, 26))
    steps.close()


def test_a_loss_that_is_no_number_is_noticed_when_metrics_are_read() -> None:
    config = TrainConfig(**(SMALL | {"steps": 10, "log_every": 4, "precision": "fp32"}))
    dataset = data.load("digits")
    learner = Learner(first_weights(config, dataset).to(GPU), config)
    steps = train(learner, dataset)
    next(steps)
    with torch.no_grad():
        next(iter(learner.denoiser.parameters())).fill_(float("nan"))
    with pytest.raises(InputError, match="not finite at step 2"):
        list(steps)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_is_gone_on_with_from_the_bits_that_were_saved(precision: str, tmp_path: Path) -> None:
    def go(name: str, until: int | None = None) -> list[float]:
        fields: dict[str, Any] = {"steps": 9, "checkpoint_every": 4, "device": "cuda", "precision": precision}
        saved = read_state(tmp_path / name)
        with Run(TrainConfig(**(SMALL | fields | {"out": str(tmp_path / name)}))) as run:
            assert run.job.device.type == "cuda"
            assert run.job.config.channels_last
            if saved is not None:
                assert run.started == 4
                there = run.learner.tensors()
                for file, tensors in saved[0].items():
                    assert all(torch.equal(there[file][key].cpu(), v) for key, v in tensors.items())
                assert run.learner.numbers()["scaler"] == saved[1]["scaler"]
            for step in run:
                if step.index == until:
                    break
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]

    go("parts", until=6)
    # the order in which a GPU adds up is not always the same: what follows is, but for rounding
    assert go("parts") == pytest.approx(go("whole"), rel=2e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of digits, trained a little on the GPU."""
    out = tmp_path_factory.mktemp("gpu") / "run"
    fields = {"steps": 200, "lr": 3e-3, "ema": 0.9, "device": "cuda", "parameterization": "dual", "out": str(out)}
    with Run(TrainConfig(**(SMALL | fields))) as run:
        list(run)
    return out


def test_scores_are_those_of_the_processor(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for place in (CPU, GPU):
        # either device looks at the real images itself
        monkeypatch.setenv("DUALOUT_CACHE", str(tmp_path / place.type))
        looks = [Features.parse(spec) for spec in ("digits", "pixels", "random")]
        references = [Reference.of(data.load("digits", split="test"), look, device=place) for look in looks]
        scoring = Scoring(Sampling(Model.load(model, place), DDIM(steps=5)), 256, references)
        list(scoring.run())
        found[place] = [row["fd"] for row in scoring.rows()]
    assert found[GPU] == pytest.approx(found[CPU], rel=1e-3)


def test_a_calibration_is_found(model: Path) -> None:
    images = to_model(data.load("digits").batch(range(512))).to(GPU)
    how = Fit(iterations=10, batch=48, check_every=5, held_out=64, move_times=1)
    *_, last = fit(Model.load(model, GPU).denoiser, DDIM(steps=4), images, how)
    assert set(last.calibration.values) == set(NEUTRAL)
    assert last.best < last.calibration.protocol["held_out_before"]


def test_a_widened_network_gives_what_it_gave_bit_for_bit() -> None:
    network = build("tiny:width=8", 1, 8, 1).eval().to(GPU, memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.2)
    x, t = noise(range(4), DIGIT, device=GPU), torch.arange(4, device=GPU) * 300
    with torch.no_grad():
        assert torch.equal(dualout.widen(network, 3)(x, t).sample[:, :1], network(x, t).sample)


@pytest.mark.parametrize("scope", ["closed", "rows"])
def test_an_upgrade(scope: str, tmp_path: Path) -> None:
    small = ["--data", "digits", "--device", "cuda"]
    trained = ["--network", "tiny:width=8", "--batch_size", "16", "--steps", "20", "--sample_every", "0"]
    source, out = tmp_path / "source", tmp_path / "out"
    assert main(["train", *small, *trained, "--parameterization", "eps", "--out", str(source)]) == 0
    few = ["--bins", "4", "--held_out", "32", "--images", "128", "--batch_size", "8", "--scope", scope, "--steps", "4"]
    assert main(["upgrade", str(source), *small, *few, "--out", str(out)]) == 0
    before, after = (Model.load(path, GPU).denoiser for path in (source, out))
    x = noise(range(3), DIGIT, device=GPU)
    if scope == "closed":
        torch.testing.assert_close(
            DDIM(steps=3).sample(after.route("eps"), x), DDIM(steps=3).sample(before, x), rtol=1e-3, atol=1e-3
        )
    assert json.loads((out / "upgrade.json").read_text())["checks"]


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--images", "6", "--steps", "3", "--precision", "auto", "--sampler", "ddpm:variance=small"],
        ["evaluate", "--images", "16", "--steps", "2", "--features", "digits,pixels", "--precision", "bf16"],
        ["analyze", "--data", "digits", "--images", "24", "--points", "3", "--steps", "2", "--samples", "6"],
        ["evaluate", "--images", "16", "--dry_run"],
        ["train", "--data", "digits", "--dry_run"],
    ],
    ids=lambda command: " ".join(command[:1] + command[-1:]),
)
def test_commands(command: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALOUT_CACHE", str(tmp_path / "cache"))
    name, *options = command
    run = [] if name == "train" else [str(model)]
    assert main([name, *run, *options, "--device", "cuda", "--out", str(tmp_path / "out")]) == 0


def test_a_pipeline_of_diffusers_goes_where_it_is_put(model: Path) -> None:
    for route in ("mix", "eps", 0.4):
        found = {}
        for place in (CPU, GPU):
            pipeline = DualOutputPipeline.from_denoiser(Denoiser.from_pretrained(model), DDIM(steps=4)).to(place)
            pipeline.set_progress_bar_config(disable=True)
            given = {"latents": noise(range(3), DIGIT), "num_inference_steps": 4, "output_type": "latent"}
            found[place] = pipeline(**given, route=route).images
            assert pipeline.unet.device == place
        assert near(found[GPU], found[CPU], 1e-3)


def test_learned_variances_are_sampled_there() -> None:
    sampler, learned = DDPM(steps=4, variance="learned"), LearnedVariance(Dual())
    assert near(sampled(sampler, learned, GPU), sampled(sampler, learned, CPU))


def test_precisions() -> None:
    assert choose("auto", GPU).name in ("bf16", "fp16")
    with choose("bf16", GPU).autocast():
        assert (torch.ones(2, 2, device=GPU) @ torch.ones(2, 2, device=GPU)).dtype == torch.bfloat16


def test_a_table_of_times_that_is_too_short_leaves_the_gpu_usable(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    tiny = build("tiny:width=8", *DIGIT[:2], 1)
    learned = UNet2DModel.from_config(tiny.config, time_embedding_type="learned", num_train_timesteps=50)
    Denoiser(learned, Epsilon(), Linear(60)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="table of 50 rows, 0 … 49, was asked for 59"):
        Model.load(tmp_path, GPU)
    assert float(torch.ones(3, device=GPU).sum()) == 3
