"""The configuration of an upgrade, and what of it may change when it is resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dualout.errors import InputError, unknown
from dualout.files import refuse_others
from dualout.training.config import TrainConfig

FREE = frozenset({"steps", "out", "device", "check_every", "cache", "workers"})
"""What may change when an upgrade goes on."""


@dataclass(kw_only=True)
class UpgradeConfig:
    """The configuration of an upgrade.

    Raises:
        InputError: for a value that cannot be used.
    """

    source: str = field(metadata={"positional": True})
    """What to upgrade: a checkpoint or run of dualout, a directory of diffusers (pipeline or model), a Hub repository
    of either, or a file of weights (.pt, .pth, .safetensors), for which --adapter names the layout. It is only read"""
    data: str | None = None
    """Images to learn the second output from: digits, photos, folder:PATH, arrays:FILE, idx:FOLDER or hub:NAME; by
    default what a checkpoint of dualout was trained on"""
    size: int | None = None
    """Height and width to crop and resize the images to; by default they are taken as they are. A rectangle is an
    option of the data, as in folder:PATH:size=48x64"""
    grey: bool | None = None
    """Convert images to greyscale (true) or colour (false); by default they are taken as they are"""
    cache: str | None = None
    """Folder where decoded images are kept and memory-mapped from; needed for more than 2 GiB of them"""
    flip: bool = False
    """Mirror every second image, at random, when fine-tuning"""
    adapter: str | None = None
    """For files: plain (with options, as in plain:network=small:size=28), starter-cnn, mnist-ddpm"""
    layer: str | None = None
    """Name of the network's output layer, where it is not found automatically"""
    parameterization: str | None = None
    """For a diffusers model without its scheduler: what it was trained to predict, eps, x0 or velocity"""
    schedule: str | None = None
    """For a diffusers model without its scheduler: linear, scaledlinear, cosine …"""
    scope: str = "closed"
    """What is trained: closed (the new rows, by least squares, in one pass), rows (the new rows, by gradients), last
    (the last block) or all"""
    start: str = "closed"
    """How the new rows are initialized: closed (by least squares) or zero"""
    images: int = 4000
    """Number of images for the least-squares fit"""
    pixels: int = 256
    """Number of pixel positions of each batch that the least-squares fit uses"""
    steps: int = 600
    """Number of weight updates, with --scope rows, last or all"""
    batch_size: int = 64
    """Images per update"""
    lr: float = 5e-4
    """Learning rate of AdamW, constant after the warm-up"""
    warmup: int = 50
    """Steps in which the learning rate rises to its value"""
    ema: float = 0.99
    """Decay per step of the exponential moving average of the weights"""
    precision: str = "auto"
    """Number format of the network in training: fp32, bf16, fp16, auto"""
    check_every: int = 100
    """Steps between checks on the held-out images, which decide where the blend uses the new output"""
    held_out: int = 128
    """Images that are not trained on, and decide where the blend uses the new output; at most a quarter of all"""
    bins: int = 20
    """Number of ranges of noise levels for which that is decided separately"""
    tolerance: float = 0.03
    """The share by which fine-tuning may raise the error at some noise level where it lowers it on the whole"""
    seed: int = 0
    """Seed of the order of the images, the time steps and the noise"""
    workers: int = 1
    """Threads that prepare batches ahead"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto"""
    out: str | None = None
    """A directory: new, empty, or of the same upgrade interrupted before; by default runs/upgraded"""

    def __post_init__(self) -> None:
        from dualout.training.opening import FEWEST
        from dualout.training.upgrade import SCOPES

        if self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)
        if self.start not in ("closed", "zero"):
            raise unknown("start", self.start, ("closed", "zero"))
        if self.scope == "closed" and self.start == "zero":
            raise InputError("--start zero leaves nothing to do with --scope closed; take --scope rows, last or all")
        least = {"images": FEWEST, "pixels": 1, "held_out": FEWEST, "bins": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"--{name} is {low} or more; got {getattr(self, name)}")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"--tolerance is a share from 0 to below 1, such as 0.01; got {self.tolerance}")
        self.training()

    @property
    def path(self) -> Path:
        """The directory."""
        return Path(self.out or "runs/upgraded").expanduser()

    def training(self, *, conditional: bool = False) -> TrainConfig:
        """The fine-tuning."""
        return TrainConfig(
            data=self.data or TrainConfig.data,
            size=self.size,
            grey=self.grey,
            cache=self.cache,
            flip=self.flip,
            conditional=conditional,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            warmup=self.warmup,
            ema=self.ema,
            # solved rows are good ones from the start: an average of few steps would only bring noise in
            ema_warmup=self.start == "zero",
            precision=self.precision,
            seed=self.seed,
            workers=self.workers,
            device=self.device,
            # the network is a stranger's, and may do another thing at each step
            graph=False,
            checkpoint_every=self.check_every,
            sample_every=0,
            out=str(self.path / "training"),
        )

    def asdict(self) -> dict[str, Any]:
        """Every field, as plain JSON values."""
        return {f.name: asdict(self)[f.name] for f in fields(UpgradeConfig)}


def refuse_changes(path: Path, known: dict[str, Any] | None, config: UpgradeConfig) -> None:
    """Refuse a directory of something else, or of another upgrade."""
    if known is None:
        refuse_others(path, "an upgrade goes to a new or empty directory")
        return
    now = config.asdict()
    # where images and source lie may change, if it is told which they are: that shows once they are loaded
    free = FREE | {name for name in ("data", "source") if known[name]}
    changed = [k for k, v in known["config"].items() if k not in free and now.get(k) != v]
    if changed:
        listed = ", ".join(f"{k} {known['config'][k]} → {now.get(k)}" for k in changed)
        raise InputError(f"--out {path} is an upgrade with other settings: {listed}; give another --out")
