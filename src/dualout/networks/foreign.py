"""Models that other programs trained: diffusers' directories, and files of weights.

A file (.pt, .pth, .ckpt, .bin, .safetensors) holds weights and no network, so that an adapter, one class a layout, says
which network they fit and how it was trained. Files are read as data: no code in them is run (``weights_only``).
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from dualout import bounded, checkpoint, hub
from dualout.card import DECODER, LATENTS
from dualout.denoiser import Denoiser
from dualout.errors import InputError
from dualout.files import held, read_json
from dualout.networks.backbones import Backbone
from dualout.networks.build import build
from dualout.networks.outside import ScaledInput, StarterCNN, TimeUNet
from dualout.networks.scaled import ScaledTime
from dualout.networks.trained import bounded_otherwise, of_signal, trained_by, with_defaults
from dualout.networks.weights import FILES, LORA, find_weights, read_weights
from dualout.parameterizations import Epsilon, LearnedVariance, Parameterization
from dualout.registry import Registered
from dualout.schedules import Linear, Schedule

CODERS = ("vae", "vqvae", "movq", "vqgan")
"""What pipelines call that part."""
_WEIGHTS = re.compile(
    r"diffusion_pytorch_model(-\d+-of-\d+)?(\.(?P<variant>\w+?))?(-\d+-of-\d+)?\.(?P<kind>safetensors|bin)"
)
_SAFE = (
    ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-?????-of-?????.safetensors"),
    ("diffusion_pytorch_model*fp16*.safetensors", "diffusion_pytorch_model*bf16*.safetensors"),
)
"""What is downloaded of a network's weights, and what where that is not there: their variants."""
_LORAS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_config.json")
"""What diffusers and PEFT call the files of a LoRA."""


def load(
    source: str | Path, adapter: str | None = None, parameterization: str | None = None, schedule: str | None = None
) -> Denoiser:
    """A denoiser from what somebody trained, wherever it lies; the source is only read.

    Arguments and errors are those of `find`.
    """
    return find(source, adapter, parameterization, schedule)()


def find(
    source: str | Path, adapter: str | None = None, parameterization: str | None = None, schedule: str | None = None
) -> Callable[[], Denoiser]:
    """What reads a denoiser's weights, and of the Hub downloads them, once its configurations have been judged.

    Args:
        source: a dualout checkpoint or run; a directory of diffusers, a pipeline's or a model's; a Hub repository of
            either; or a file of weights.
        adapter: for files: which layout the weights have, as ``plain:network=small:size=28``.
        parameterization: for models that lie without their scheduler: what they were trained to predict.
        schedule: likewise: the noise levels.

    Raises:
        InputError: for anything that is missing, damaged, not understood, or told twice.
    """
    path = Path(source).expanduser()
    if path.is_file():
        _untold(source, parameterization=parameterization, schedule=schedule)
        return partial(_from_file, path, _layout(path, adapter))
    if adapter is not None:
        raise InputError(f"--adapter is for files of weights; {str(source)!r} is no file{_files_in(path)}")
    if not path.is_dir() and not hub.is_name(str(source)):
        raise InputError(f"there is no file or directory {str(source)!r}")
    repository = None if path.is_dir() else str(source)
    directory = path if repository is None else hub.download(repository, ["*.json"])
    if (directory / checkpoint.INDEX).is_file():
        _untold(source, parameterization=parameterization, schedule=schedule)
        if own_pipeline(directory):
            raise InputError(
                f"{source} was exported by dualout: dualout export --format dualout makes a checkpoint of a directory "
                f"again, and DualOutputPipeline.from_pretrained(…).denoiser.save_pretrained(…) of the Hub's"
            )
        found = _of_pipeline(directory, str(source))
    elif "_class_name" in _json(directory / checkpoint.CONFIG):
        found = _of_model(directory, parameterization, schedule)
    else:
        _untold(source, parameterization=parameterization, schedule=schedule)
        return partial(Denoiser.from_pretrained, source)
    return partial(_read, found, repository, directory)


def trained_on(source: str | Path) -> str | None:
    """The images that a checkpoint of dualout in a directory was trained on, as --data names them; else None."""
    path = Path(source).expanduser() / checkpoint.CONFIG
    name = checkpoint.entry(_json(path), "data").get("name") if path.is_file() else None
    return name if isinstance(name, str) else None


def own_pipeline(source: str | Path) -> bool:
    """Whether a directory holds an export to diffusers, of which the scheduler does not say how it was trained."""
    index = Path(source).expanduser() / checkpoint.INDEX
    return index.is_file() and _json(index).get("_class_name") == "DualOutputPipeline"


class _Found(NamedTuple):
    """What configurations say of a model of diffusers."""

    place: Path
    """The directory of the network."""
    parameterization: Parameterization
    schedule: Schedule
    card: dict[str, Any]


def _read(found: _Found, repository: str | None, directory: Path) -> Denoiser:
    """The network, which of a repository of the Hub is downloaded, without what encodes texts and images."""
    if repository is not None:
        _download(repository, found.place.relative_to(directory), directory)
    denoiser = Denoiser(diffusers_model(found.place), found.parameterization, found.schedule).eval()
    denoiser.card |= found.card
    return denoiser


def _download(repository: str, below: Path, directory: Path) -> None:
    """Get the weights in safetensors that `diffusers_model` will read, and no other variants of them."""
    for names in _SAFE:
        wanted = [(below / name).as_posix() for name in names]
        hub.download(repository, wanted)
        if any(any(directory.glob(name)) for name in wanted):
            return
    raise InputError(
        f"{repository} has no weights in safetensors by the names of diffusers ({_SAFE[0][0]}), and others are not "
        f"downloaded: get it by hf download {repository} --local-dir DIRECTORY, and name that directory; its .bin "
        "files are read as data"
    )


def _untold(source: str | Path, **told: str | None) -> None:
    for name, value in told.items():
        if value is not None:
            raise InputError(f"{source} says itself how it was trained: leave out --{name} {value}")


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        present = ", ".join(held(path.parent)[:8]) or "nothing"
        if any((path.parent / name).is_file() for name in _LORAS):
            raise InputError(LORA.format(path.parent))
        raise InputError(
            f"{path.parent} is no checkpoint of dualout and no model or pipeline of diffusers: {path.name} is missing "
            f"(it holds {present}){_files_in(path.parent)}"
        )
    return read_json(path)


def _files_in(directory: Path) -> str:
    """What to do with files of weights in a directory that does not say of what network they are."""
    files = [p.name for p in sorted(directory.glob("*")) if p.suffix in FILES] if directory.is_dir() else []
    return f"; of a file of weights, as {files[0]}, name the file itself, with --adapter" if files else ""


def _parts(directory: Path) -> tuple[list[str], str]:
    """What a pipeline of diffusers is made of, and which of it is the network."""
    index = _json(directory / checkpoint.INDEX)
    # settings lie beside, and parts that are left out are [null, null]
    parts = [k for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and v[:1] != [None]]
    name = next((k for k in ("unet", "transformer", "model") if k in parts), None)
    if name is None or "scheduler" not in parts:
        raise InputError(
            f"the pipeline {directory} has no network and scheduler to upgrade; it has {', '.join(parts) or 'nothing'}"
        )
    return parts, name


def _place(directory: Path, part: str) -> Path:
    """Where a part of a pipeline lies: those of diffusers' first versions have all of them in one directory."""
    return directory / part if (directory / part).is_dir() else directory


def _of_pipeline(directory: Path, named: str) -> _Found:
    """A diffusers pipeline: its network, and its scheduler, which says how it was trained."""
    parts, name = _parts(directory)
    config = _json(_place(directory, "scheduler") / "scheduler_config.json")
    parameterization, schedule = trained_by(config)
    place = _place(directory, name)
    read = _with_variance(place, parameterization)
    if isinstance(read, LearnedVariance) and config.get("variance_type") == "learned":
        raise InputError(
            f"the scheduler of {named} has variance_type 'learned': networks here learn a place between the smallest "
            "and the largest variance, which is variance_type 'learned_range'"
        )
    if how := bounded_otherwise(config):
        warnings.warn(
            f"the scheduler of {named} {how}. Samplers here clip pictures to [−1, 1], and with --clip false nothing",
            stacklevel=4,
        )
    coder = next((k for k in CODERS if k in parts), None)
    return _Found(place, read, schedule, {} if coder is None else {LATENTS: coder, DECODER: named})


def _of_model(directory: Path, parameterization: str | None, schedule: str | None) -> _Found:
    if parameterization is None or schedule is None:
        raise InputError(
            f"{directory} is a model without its scheduler, which would tell how it was trained: say "
            "--parameterization eps (or x0, velocity) and --schedule linear (or scaledlinear, cosine, …)"
        )
    read = _with_variance(directory, Parameterization.parse(parameterization))
    return _Found(directory, read, Schedule.parse(schedule), {})


def _class_of(config: Mapping[str, Any]) -> Any:
    """The class of a network of diffusers."""
    return checkpoint.allowed(f"diffusers.{config.get('_class_name')}")


def _with_variance(directory: Path, parameterization: Parameterization) -> Parameterization:
    """A network with twice as many channels out as in learned its variance too (IDDPM)."""
    config = _json(directory / checkpoint.CONFIG)
    _class_of(config)
    config = with_defaults(config)
    takes, gives = config.get("in_channels"), config.get("out_channels")
    learned = parameterization.channels(3) == 3 and isinstance(takes, int) and gives == 2 * takes > 0
    return LearnedVariance(parameterization) if learned else parameterization


def diffusers_model(directory: Path, **options: Any) -> Any:
    """A model of diffusers from its directory, all of it or nothing; options are those of its `from_pretrained`.

    Raises:
        InputError: for what is missing, damaged, or of a class that is not on the allow-list.
    """
    config = _json(directory / checkpoint.CONFIG)
    cls = _class_of(config)
    weights = [p for p in directory.iterdir() if p.suffix in FILES]
    named = [found for p in weights if (found := _WEIGHTS.fullmatch(p.name))]
    # of other weights, as non_ema, what they are is not known
    variants = {found["variant"] for found in named} & {None, "fp16", "bf16"}
    if len(variants) != 1 and None not in variants:
        present = ", ".join(sorted(p.name for p in weights)[:8]) or "no weights"
        raise InputError(
            f"{directory} is to hold the weights of its {cls.__name__} as diffusion_pytorch_model.safetensors, or as "
            f"one variant of that, .fp16.safetensors; it holds {present}"
        )
    variant = None if None in variants else variants.pop()
    # or else diffusers logs an error where it then reads a .bin
    safe = any(found["variant"] == variant and found["kind"] == "safetensors" for found in named)
    # diffusers insists on it for classes of which a part is float32 always
    meta = getattr(cls, "_keep_in_fp32_modules", None) is not None
    options = {"use_safetensors": safe, "variant": variant, "low_cpu_mem_usage": meta} | options
    try:
        # a number takes a byte or more
        with bounded.no_more_than(sum(p.stat().st_size for p in weights), str(directory)):
            network, told = cls.from_pretrained(
                str(directory), output_loading_info=True, local_files_only=True, **options
            )
    except InputError:
        raise
    except Exception as error:  # constructors and parsers raise whatever damaged files lead them to
        said = f"{str(error).strip()[:600]} (it holds {', '.join(sorted(p.name for p in weights)[:8])})"
        raise InputError(f"{directory} cannot be loaded as a {cls.__name__}: {said}") from error
    wrong = {k.replace("_", " "): v for k, v in told.items() if k.endswith("_keys") and v}
    if wrong:
        listed = "; ".join(f"{k}: {', '.join(map(str, list(v)[:6]))}" for k, v in wrong.items())
        raise InputError(f"the weights in {directory} do not fit its {cls.__name__}, nothing was loaded; {listed}")
    return network.eval()


def _layout(path: Path, adapter: str | None) -> Layout:
    """How a file of weights is laid out."""
    if path.suffix not in FILES:
        raise InputError(f"{path} is no file of weights: these end with {', '.join(FILES)}")
    known = ", ".join(Layout.kinds())
    if adapter is None:
        raise InputError(f"{path} holds weights and no network: say which with --adapter; there are {known}")
    return Layout.parse(adapter)


def _from_file(path: Path, layout: Layout) -> Denoiser:
    return layout.read(find_weights(read_weights(path), str(path), layout.entry), str(path)).eval()


@dataclass(frozen=True, kw_only=True)
class Layout(Registered, ABC):
    """How somebody's file of weights is laid out.

    Attributes:
        entry: where the weights lie in the file, when it holds more than weights; names are separated by dots.
    """

    kind: ClassVar[str] = "adapter"
    entry: str | None = None

    @abstractmethod
    def read(self, tensors: dict[str, Tensor], source: str) -> Denoiser:
        """The denoiser that weights make; `source` is for messages.

        Raises:
            InputError: when they do not fit; missing and unexpected names are listed.
        """


@dataclass(frozen=True, kw_only=True)
class PlainLayout(Layout):
    """The weights of one of this project's networks, by their own names.

    Attributes:
        network: which.
        size: height and width of its images.
        channels: of the images, C.
        classes: how many classes it is told.
        parameterization: what it was trained to predict.
        schedule: the noise levels.
        prefix: what the names of its weights begin with; others are left out.
    """

    name = "plain"

    network: Backbone
    size: int
    channels: int = 1
    classes: int | None = None
    parameterization: Parameterization = field(default_factory=Epsilon)
    schedule: Schedule = field(default_factory=Linear)
    prefix: str = ""

    def read(self, tensors: dict[str, Tensor], source: str) -> Denoiser:
        """Build the network, and load it strictly."""
        outputs = self.parameterization.channels(self.channels)
        network = build(self.network, self.channels, self.size, outputs, self.classes)
        if any(name.startswith(self.prefix) for name in tensors):
            tensors = {k.removeprefix(self.prefix): v for k, v in tensors.items() if k.startswith(self.prefix)}
        if before := _before(tensors, network.state_dict()):
            raise InputError(f"the weights of this network begin with {before!r} in {source}: say prefix={before}")
        checkpoint.load_strictly(network, tensors, source)
        return Denoiser(network, self.parameterization, self.schedule)


def _before(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What all of a network's names have before them among a file's; nothing where they do not have it all."""
    first = next(iter(own))
    ends = (name.removesuffix(first) for name in tensors if name.endswith(f".{first}"))
    return next((before for before in ends if all(f"{before}{name}" in tensors for name in own)), "")


@dataclass(frozen=True, kw_only=True)
class StarterLayout(Layout):
    """A plain convolutional network over images in [−0.5, 0.5], with its own schedule in the file (`alpha_t` is ᾱ)."""

    name = "starter-cnn"

    def read(self, tensors: dict[str, Tensor], source: str) -> Denoiser:
        """All sizes follow from the weights."""
        if "alpha_t" not in tensors:
            raise InputError(f"{source} has no table 'alpha_t': it is of another layout than {self.name}")
        weights = {k.removeprefix("gt."): v for k, v in tensors.items() if k.startswith("gt.")}
        network = StarterCNN(**StarterCNN.sizes(weights, source))
        checkpoint.load_strictly(network, weights, source)
        # images twice as large: x_t is scaled so that alpha² + sigma² = 1 again
        signal = tensors["alpha_t"].double()[1:] / 4
        signal = signal / (signal + 1 - 4 * signal)
        schedule = of_signal(signal)
        steps = schedule.steps
        timed = ScaledTime(network, 1 / steps, 1 / steps)
        return Denoiser(ScaledInput(timed, schedule.config(), 0.5), Epsilon(), schedule)


@dataclass(frozen=True, kw_only=True)
class TimeUNetLayout(Layout):
    """A UNet for 28×28 images whose blocks are told the time by an added channel; β from 1e-4 to 0.02, linear."""

    name = "mnist-ddpm"

    def read(self, tensors: dict[str, Tensor], source: str) -> Denoiser:
        """The tables of the noise schedule may lie beside the weights."""
        weights = {k.removeprefix("network."): v for k, v in tensors.items()}
        table = weights.get("time_embed.weight")
        if table is None or table.ndim != 2:
            raise InputError(f"{source} has no table 'time_embed.weight': it is of another layout than {self.name}")
        network = TimeUNet(len(table), table.shape[1])
        checkpoint.load_strictly(network, weights, source)
        return Denoiser(network, Epsilon(), Linear(len(table)))
