"""How many images a second a GPU makes, by backend, number format and batch, beside diffusers' pipeline."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from report import Goal, Section, table
from subjects import GPU, PLACE
from timing import Times, digits, interleaved, ratio, told
from torch import Tensor

import dualout
from dualout.errors import InputError
from dualout.evaluation.model import Model
from dualout.evaluation.sampling import Sampling
from dualout.networks import build

STEPS = 10
BATCHES = (1, 64, 256)
PRECISIONS = ("fp32", "bf16")
BACKENDS = ("eager", "graph", "compile")
OUTPUTS = {"single": (dualout.Epsilon(), 3), "dual": (dualout.Dual(), 7)}
PEER = "DDIMPipeline, single"

QUESTION = f"""## Throughput on a GPU: images a second

M, DDPM's CIFAR-10 UNet with random weights, makes 3×32×32 images in {STEPS} steps of DDIM. Ours is what
`dualout sample --backend …` does, from the seeds of the images to bytes on the host, with the noise of each image drawn
from its own seed; the peer is diffusers' DDIMPipeline, from its own noise to the same bytes, with its weights in bf16
where ours is computed in bf16. The ratios are of throughput, in the same round. `compile` is with `--full`, of
dual output in bf16 for 64 and 256 images; preparing a backend is not counted."""


def measure(full: bool, peers: list[ModuleType]) -> Section | None:
    if not GPU:
        print("this question is asked of a GPU, and there is none here", flush=True)
        return None
    section, rates = Section(QUESTION), {}
    with tempfile.TemporaryDirectory() as folder:
        models = {output: _model(Path(folder) / output, output) for output in OUTPUTS}
    for precision in PRECISIONS:
        for batch in BATCHES:
            what = f"{precision}, batch {batch}"
            with told(f"{what}: preparing"):
                cases = _cases(models, precision, batch, compiled=full and precision == "bf16" and batch > 1)
            with told(what):
                times = interleaved(cases, rounds=4 if full else 3, calls=4 if batch == 1 else 1)
            section.times[f"{what}, seconds a batch"] = times
            section.goals += _goals(what, times)
            rates[what] = {name: batch / statistics.median(values) for name, values in times.items()}
    names = list(dict.fromkeys(name for rate in rates.values() for name in rate))
    rows = [[name, *(digits(rate[name]) if name in rate else "" for rate in rates.values())] for name in names]
    section.tables.append(table(["images a second", *rates], rows))
    return section


def _goals(what: str, times: Times) -> list[Goal]:
    """Ours against the peer."""
    return [
        Goal(f"{name} / {PEER}, {what}", ratio(times, PEER, name), 1, least=True)
        for name in times
        if name.startswith("ours")
    ]


def _model(directory: Path, output: str) -> Model:
    """M with random weights, read from a checkpoint as `dualout sample` does."""
    parameterization, channels = OUTPUTS[output]
    torch.manual_seed(0)
    network = build("ddpm-cifar10:dropout=0.0", 3, 32, channels)
    dualout.Denoiser(network, parameterization, dualout.schedules.Linear()).save_pretrained(directory)
    return Model.load(directory, PLACE)


def _cases(models: dict[str, Model], precision: str, batch: int, compiled: bool) -> dict[str, Callable[[], Any]]:
    found = {PEER: _pipeline(models["single"], precision, batch)}
    for backend in BACKENDS:
        for output, model in models.items():
            if backend == "compile" and not (compiled and output == "dual"):
                continue
            name = f"ours, {output}, {backend}"
            try:
                with told(f"{precision}, batch {batch}, {name}: preparing"):
                    found[name] = _ours(model, precision, batch, backend)
            except InputError as error:
                print(f"{name}: {error}", flush=True)
    return found


def _ours(model: Model, precision: str, batch: int, backend: str) -> Callable[[], Tensor]:
    sampler = dualout.samplers.DDIM(steps=STEPS)
    sampling = Sampling(model, sampler, precision=precision, backend=backend)
    # more calls than any preparation needs to be repaid
    sampling.prepare(batch, 10**6)
    print(sampling.computed()["computed_by"], flush=True)
    return partial(sampling.images, range(batch))


def _pipeline(model: Model, precision: str, batch: int) -> Callable[[], Tensor]:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    # as a pipeline of diffusers is loaded, which leaves weights contiguous
    unet: Any = copy.deepcopy(model.denoiser.network).to(memory_format=torch.contiguous_format)  # type: ignore[union-attr]
    pipeline = DDIMPipeline(unet.to(dtype), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> Tensor:
        images: Any = pipeline(batch_size=batch, num_inference_steps=STEPS, output_type="pt").images  # type: ignore[union-attr]
        return (images * 255).round().to(torch.uint8).cpu()

    return sample
