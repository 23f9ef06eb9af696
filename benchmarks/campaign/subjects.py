"""What the faults are put into: the smallest run there is, its command lines, and pictures."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np

TRAIN = [
    "train", "--data", "digits", "--network", "tiny:width=8", "--batch_size", "4", "--log_every", "2",
    "--checkpoint_every", "2", "--sample_every", "0", "--device", "cpu", "--precision", "fp32",
]  # fmt: skip


def training(out: Path, steps: int, *more: str) -> list[str]:
    """The command of a training of a few steps."""
    return [*TRAIN, "--steps", str(steps), "--out", str(out), *more]


def sampling(run: Path, out: Path, images: int, *more: str) -> list[str]:
    """The command that makes a few images in two steps."""
    return [
        "sample", str(run), "--images", str(images), "--steps", "2", "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


@functools.cache
def trained(parameterization: str | None = None) -> Path:
    """A run of four steps, made once; it also loads every library before a process is forked."""
    # its list of fonts is made by asking a program, once on a machine
    from matplotlib import font_manager  # noqa: F401

    from dualout import data
    from dualout.evaluation import generate, sampling  # noqa: F401
    from dualout.evaluation.model import Model
    from dualout.training import TrainConfig
    from dualout.training.run import Run

    place = _place()
    data.load("digits")
    config = TrainConfig(
        data="digits", network="tiny:width=8", parameterization=parameterization, batch_size=4, steps=4, log_every=2, checkpoint_every=2,
        sample_every=0, device="cpu", precision="fp32", out=str(place / "run"),
    )  # fmt: skip
    with Run(config) as run:
        for _ in run:
            pass
    Model.load(place / "run")
    return place / "run"


@functools.cache
def cheap() -> Path:
    """A model of 3×32×32 images whose network costs almost nothing."""
    from diffusers.models import UNet2DModel

    from dualout import Denoiser, Dual, schedules

    trained()
    network = UNet2DModel(
        32, 3, 7, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(4,),
        layers_per_block=1, norm_num_groups=2, add_attention=False,
    )  # fmt: skip
    place = _place() / "run"
    Denoiser(network, Dual(), schedules.Linear()).save_pretrained(place, image={"channels": 3, "size": [32, 32]})
    return place


def _place() -> Path:
    """A directory that goes when this process ends."""
    import atexit

    place = Path(tempfile.mkdtemp(prefix="campaign-run-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def copied(run: Path, to: Path) -> Path:
    """A run to break."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("lock"))
    return to


def made(out: Path, images: int, shape: tuple[int, ...] = (8, 8)) -> str | None:
    """What is wrong with a finished directory of PNGs, or None."""
    from PIL import Image

    for i in range(images):
        path = out / f"{i:06d}.png"
        if not path.exists():
            return f"said it had made {path.name}, which is not there"
        with Image.open(path) as image:
            if np.asarray(image).shape != shape:
                return f"{path.name} has the shape {np.asarray(image).shape}"
    return None


def of_a_run(out: Path) -> str | None:
    """What is wrong with a run that says it is finished, or None."""
    from dualout import Denoiser
    from dualout.errors import InputError

    try:
        Denoiser.from_pretrained(out)
    except InputError as error:
        return f"the run cannot be loaded: {error}"
    return None
