"""The configuration of a training: the flags and the YAML keys of ``dualout train``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dualout.errors import InputError, unknown
from dualout.registry import Registered, as_python

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
TRACKERS = ("tensorboard", "trackio", "wandb")

FREE = frozenset(
    {"steps", "out", "log_every", "checkpoint_every", "keep", "sample_every", "samples", "sampler", "decode", "track"}
    | {"accumulate", "device", "compile", "graph", "channels_last", "fsdp", "workers", "cache", "strict"}
)
"""What may change when a run goes on: how long, how it is shown, where it runs. None of it changes what is drawn, but
that `accumulate` and the number of processes change a network's own dropout, which is drawn a part at a time. Of `data`
the place may change, not the images."""


@dataclass(kw_only=True)
class TrainConfig:
    """The configuration of a training.

    Raises:
        InputError: for a value that cannot be used.
    """

    data: str = "digits"
    """Images to learn from: digits, photos, folder:PATH, arrays:FILE, idx:FOLDER or hub:NAME"""
    size: int | None = None
    """Height and width to crop and resize the images to; by default they are taken as they are. A rectangle is an
    option of the data, as in folder:PATH:size=48x64"""
    grey: bool | None = None
    """Convert images to greyscale (true) or colour (false); by default they are taken as they are"""
    cache: str | None = None
    """Folder where decoded images are kept and memory-mapped from; needed for more than 2 GiB of them"""
    strict: float = 0.01
    """Share of the image files that may be unreadable; they are left out"""
    flip: bool = False
    """Mirror every second image, at random; not for digits and letters"""
    network: str | dict[str, Any] | None = None
    """A backbone's name (tiny, small, ddpm-cifar10 …), or in YAML its class and arguments; by default tiny, or that of
    --init"""
    parameterization: str | None = None
    """What the network learns to predict: dual (as published), dual-blend (our variant), eps, x0, velocity, flow or
    karras (EDM), perhaps with options, as in dual:ratio=channel; by default dual, or that of --init"""
    schedule: str | None = None
    """Noise schedule: linear, cosine, scaledlinear, rectifiedflow …; by default linear, or that of --init"""
    conditional: bool = False
    """Condition the network on the classes of the data, for classifier-free guidance"""
    label_dropout: float = 0.1
    """Share of the images whose class is withheld, with --conditional"""
    steps: int = 3000
    """Number of weight updates; a finished run is trained further when this is raised"""
    batch_size: int = 128
    """Images per update, over all processes"""
    accumulate: int = 1
    """Number of parts that a batch is processed in, to save memory"""
    lr: float = 1e-3
    """Learning rate of AdamW, constant after the warm-up, so that a run can always be made longer"""
    warmup: int = 100
    """Steps in which the learning rate rises to its value"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moment averages"""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off"""
    ema: float = 0.999
    """Decay per step of the exponential moving average of the weights; sampling uses the averaged weights"""
    ema_warmup: bool = True
    """Let --ema rise to its value as (1 + n) / (10 + n) at step n, so that the initial weights are forgotten early;
    false for a short training from good weights (--init), to average over as many steps as --ema says"""
    precision: str = "auto"
    """Number format of the network: fp32, bf16 or fp16; auto takes the fastest on this machine (see dualout info). The
    loss, the weights and their averages are always fp32"""
    channels_last: bool | None = None
    """Memory layout of the images; by default on GPUs only, where it is faster"""
    compile: bool = False
    """Compile the network with torch.compile: minutes at first, then up to 1.2 times faster on CPU and more on GPU"""
    graph: bool | None = None
    """Replay forward and backward passes as a CUDA graph, which saves launching their kernels one by one; by default on
    one GPU. A network whose operations differ from step to step needs false"""
    fsdp: bool = False
    """Shard the weights, their average and the optimizer state over the processes (FSDP2), for networks too large for
    one GPU; with torchrun or accelerate launch"""
    seed: int = 0
    """Seed of the initial weights, the order of the data, the time steps and the noise"""
    init: str | None = None
    """Checkpoint, a directory or Hub id, whose weights to start from"""
    out: str | None = None
    """Directory of the run, which is resumed if it exists; by default runs/DATA-PARAMETERIZATION"""
    checkpoint_every: int = 500
    """Steps between checkpoints"""
    keep: int = 1
    """How many resumable states to keep"""
    sample_every: int = 1000
    """Steps between grids of samples; 0 makes none"""
    samples: int = 64
    """Images in a grid"""
    sampler: str = "ddim:steps=20"
    """How the grid is sampled"""
    decode: str | None = None
    """For latents: the autoencoder of diffusers that decodes the grids, a directory or the name of a Hugging Face Hub
    repository, its own or a pipeline's; what is sampled from the checkpoint later is decoded by it too. By default that
    of --init; none decodes nothing"""
    log_every: int = 50
    """Steps between lines of metrics.jsonl, which are means over these steps"""
    workers: int = 1
    """Threads that prepare batches ahead"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""
    track: str | None = None
    """Also send the metrics to tensorboard, trackio or wandb (extra track)"""

    def __post_init__(self) -> None:
        for f in fields(self):
            # what Python has at hand, as it is written in train.yaml
            value = getattr(self, f.name)
            setattr(self, f.name, value.spec if isinstance(value, Registered) else as_python(value))
        self.betas = tuple(self.betas)  # type: ignore[assignment]
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"--{name} is a whole number, {least} or more; got {value!r}")
        for name, (low, high, what) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
                raise InputError(f"--{name} is {what}; got {value!r}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise InputError(f"--betas are two numbers from 0 to 1; got {list(self.betas)}")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"--batch_size {self.batch_size} cannot be taken in --accumulate {self.accumulate} equal parts"
            )
        if self.fsdp and (self.compile or self.precision == "fp16"):
            raise InputError("--fsdp goes with neither --compile nor --precision fp16; take bf16 or fp32")
        if self.fsdp and self.graph:
            raise InputError("--fsdp does not go with --graph, which is for one process")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.track is not None and self.track not in TRACKERS:
            raise unknown("tracker", self.track, TRACKERS)
        # --help and a flag that cannot be read do not wait for torch
        from dualout.parameterizations import Parameterization
        from dualout.randomness import check_seed
        from dualout.samplers import Sampler
        from dualout.schedules import Schedule

        check_seed(self.seed)
        # a spec that cannot be read is told before any work
        if self.parameterization is not None:
            self.parameterization = Parameterization.parse(self.parameterization).spec
        if self.schedule is not None:
            self.schedule = Schedule.parse(self.schedule).spec
        Sampler.parse(self.sampler)

    def asdict(self) -> dict[str, Any]:
        """Every field, as plain JSON values."""
        own = {f.name for f in fields(TrainConfig)}
        return {k: v for k, v in asdict(self).items() if k in own} | {"betas": list(self.betas)}

    @staticmethod
    def fromdict(values: Mapping[str, Any]) -> TrainConfig:
        """Rebuild from `asdict`; fields that are not written have their defaults.

        Raises:
            InputError: for a field that is not known, or a value that cannot be used.
        """
        known = [f.name for f in fields(TrainConfig)]
        for name in values:
            if name not in known:
                raise unknown("option of a training:", name, known)
        try:
            return TrainConfig(**values)
        except TypeError as error:
            raise InputError(f"a training's options have values of the wrong type: {error}") from error

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """The fields that a run cannot change as it goes on, with this value and the other's."""
        mine, theirs = self.asdict(), other.asdict()
        return {k: (mine[k], theirs[k]) for k in mine if k not in FREE and mine[k] != theirs[k]}

    def learning_rate(self, step: int) -> float:
        """Of the update that makes step number `step`, counted from 1."""
        return self.lr * min(1.0, step / max(self.warmup, 1))

    def default_out(self) -> str:
        """runs/DATA-PARAMETERIZATION."""
        data = re.split(r"[/\\]", self.data.replace(":", "-").rstrip("/\\"))[-1]
        parts = (data, self.parameterization or "dual")
        return "runs/" + re.sub(r"[^\w.=-]+", "-", "-".join(parts)).strip("-")


_LEAST = {
    "steps": 1, "batch_size": 1, "accumulate": 1, "warmup": 0, "seed": 0, "checkpoint_every": 1, "keep": 1,
    "sample_every": 0, "samples": 1, "log_every": 1, "workers": 1,
}  # fmt: skip
_RANGES = {
    "lr": (1e-12, 10.0, "a number above 0 and below 10"),
    "weight_decay": (0.0, float("inf"), "a number, 0 or more"),
    "grad_clip": (0.0, float("inf"), "a number, 0 or more"),
    "ema": (0.0, 1.0, "a number from 0 up to, not including, 1"),
    "label_dropout": (0.0, 1.0 + 1e-9, "a share, from 0 to 1"),
    "strict": (0.0, 1.0 + 1e-9, "a share, from 0 to 1"),
}
