"""The checkpoint directory: config.json, model.safetensors, README.md.

Reading one never runs code from it. Weights are safetensors; the network's class comes from an allow-list: modules of
`dualout.networks` and model classes of diffusers. Writing is whole or not at all: every file is written aside,
flushed to disk and renamed.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualout import hub
from dualout.card import render as card_text
from dualout.errors import InputError
from dualout.files import as_json, atomically, explained, read_json, text_path, write_text
from dualout.version import __version__

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
INDEX = "model_index.json"
"""Of a pipeline of diffusers."""
FORMAT = 1
COUNT = "out_channels"
"""What widening changes of a network beside its layers."""


def describe(network: Any) -> dict[str, Any]:
    """The class and constructor arguments of a network, as plain JSON values.

    Networks among the arguments (an adapter's) are described in turn, and so are layers that stand in for the class's
    own (`dualout.networks.wide`).

    Raises:
        InputError: when a class is not on the allow-list, or the arguments do not make a network of the same weights,
            and a checkpoint of it could not be rebuilt.
    """
    description = _described(network)
    problems = _mismatch(_rebuilt(description).state_dict(), tensors_of(network))
    if problems:
        raise InputError(
            f"this {type(network).__name__} was changed after it was made, and its configuration does not tell how: a "
            f"checkpoint of it could not be loaded; {problems}"
        )
    return description


def described_now(description: dict[str, Any]) -> dict[str, Any]:
    """What `describe` would write today of what it wrote before: arguments that came since are at their defaults."""
    return _described(_rebuilt(description))


def image_of(network: Any) -> dict[str, Any]:
    """What a network says of its images' shape, {"channels": C, "size": [H, W]}; empty where it does not say."""
    found = getattr(network, "image", None)
    if isinstance(found, dict):
        return found
    inner = getattr(network, "_orig_mod", None) or getattr(network, "network", None)
    return {} if inner is None else image_of(inner)


def _rebuilt(description: dict[str, Any]) -> nn.Module:
    try:
        with torch.device("meta"):
            return construct(description)
    except InputError:
        # some constructors compute with their tensors, which have no values there
        return construct(description)


def _described(network: Any) -> dict[str, Any]:
    network = getattr(network, "_orig_mod", network)
    cls = type(network)
    if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputError(
            f"a network in {cls.__name__} cannot be saved: save a denoiser around the one inside, "
            "Denoiser(network.module, …)"
        )
    name = (
        f"{cls.__module__.split('.')[0]}.{cls.__name__}" if _is_diffusers(cls) else f"{cls.__module__}.{cls.__name__}"
    )
    if _allowed_class(name) is not cls:
        raise InputError(
            f"a network of class {cls.__module__}.{cls.__qualname__} cannot be saved: a checkpoint names only classes "
            "of diffusers and of dualout.networks, so that loading one never runs foreign code. Save its state_dict "
            "with safetensors, and load that into a network that you build."
        )
    arguments = dict(network.config) if hasattr(network, "config") else {}
    if _is_diffusers(cls):
        # diffusers keeps more in its config than the constructor takes
        known = inspect.signature(cls.__init__).parameters
        arguments = {k: v for k, v in arguments.items() if k in known}
    within = {inner for v in arguments.values() if isinstance(v, nn.Module) for inner in v.modules()}
    layers = {
        n: _described(m) for n, m in network.named_modules() if n and m not in within and getattr(m, "stands_in", False)
    }
    described = {"class": name, "arguments": {k: _plain(v) for k, v in arguments.items()}}
    if layers and isinstance(count := vars(network).get(COUNT), int) and COUNT not in arguments:
        # the constructor counts by itself, and knows of no more than it makes
        described[COUNT] = count
    return described | ({"layers": layers} if layers else {})


def construct(description: Any) -> nn.Module:
    """Build the network that `describe` wrote down, with fresh weights.

    Raises:
        InputError: when a class is not on the allow-list or refuses its arguments.
    """
    if not isinstance(description, dict) or not isinstance(description.get("class"), str):
        raise InputError(f"a network is written {{'class': …, 'arguments': {{…}}}}, got {description!r}")
    cls = allowed(description["class"])
    arguments, layers = description.get("arguments", {}), description.get("layers", {})
    unread = description.keys() - {"class", "arguments", "layers", COUNT}
    if unread or not isinstance(arguments, dict) or not isinstance(layers, dict):
        raise InputError(f"a network is written {{'class': …, 'arguments': {{…}}}}, got {description!r}")
    try:
        inner = {k: construct(v) for k, v in arguments.items() if isinstance(v, dict) and "class" in v}
        network = cls(**(arguments | inner))
        for name, layer in layers.items():
            network.set_submodule(name, construct(layer), strict=True)
        if isinstance(count := description.get(COUNT), int):
            setattr(network, COUNT, count)
    except InputError:
        raise
    except Exception as error:  # constructors raise whatever damaged arguments lead them to
        raise InputError(f"{description['class']} cannot be built: {error}. Its arguments: {arguments!r}") from error
    return network


def allowed(name: str) -> type[nn.Module]:
    """The network class of that name.

    Raises:
        InputError: when it is not on the allow-list.
    """
    cls = _allowed_class(name)
    if cls is None:
        raise InputError(
            f"the network class {name!r} is not on the allow-list: diffusers' model classes (diffusers.UNet2DModel …) "
            "and those of dualout.networks. Build the network yourself, and pass it as network=…"
        )
    return cls


def _is_diffusers(cls: type) -> bool:
    return cls.__module__.startswith("diffusers.")


def _allowed_class(name: str) -> type[nn.Module] | None:
    module, _, attribute = name.rpartition(".")
    if module != "diffusers" and not f"{module}.".startswith("dualout.networks."):
        return None
    try:
        package = importlib.import_module(module)
        cls = getattr(package, attribute, None)
    except ImportError:
        return None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return None
    if module == "diffusers":
        return cls if issubclass(cls, package.ModelMixin) else None
    # not what such a module imports
    return cls if cls.__module__.startswith("dualout.networks.") else None


def _plain(value: Any) -> Any:
    if callable(value):
        return _described(value)
    return list(value) if isinstance(value, tuple) else value


def locate(path: str | Path) -> Path:
    """The directory of a checkpoint: itself, or the download of a Hub repository.

    Raises:
        InputError: when there is neither.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    text = str(path)
    if directory.exists() or not hub.is_name(text):
        raise InputError(f"no checkpoint directory at {text!r}")
    return hub.download(text, [CONFIG, WEIGHTS, CARD, "calibration/*.json"])


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, checked for the entries that every checkpoint has."""
    path = directory / CONFIG
    if not path.exists():
        present = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{directory} is no checkpoint: {CONFIG} is missing (it holds {present}){_hint(directory / INDEX)}"
        )
    config = read_json(path, object)
    entries = config if isinstance(config, dict) else {}
    missing = [k for k in ("schedule", "parameterization", "network") if k not in entries]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}: it is not a dualout checkpoint, or it is damaged{_hint(path)}"
        )
    if not isinstance(config.get("format", FORMAT), int) or config.get("format", FORMAT) > FORMAT:
        raise InputError(f"{path} has format {config['format']}, this version reads up to {FORMAT}; update dualout")
    return config


def _hint(path: Path) -> str:
    """What to do with models of diffusers, which say their class in this file."""
    config = read_json(path, object) if path.is_file() else None
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name == "DualOutputPipeline":
        return "; dualout exported it: dualout export --format dualout makes a checkpoint of it again"
    made = "dualout export --format dualout makes a checkpoint of it, dualout upgrade one with a second output"
    return "" if name is None else f"; it is diffusers' {name}: {made}"


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's state, by the names that it has where torch.compile wraps nothing."""
    return {k.replace("_orig_mod.", ""): v for k, v in module.state_dict().items()}


def content_hash(said: str, tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of tensors by name, and of what is said of them."""
    state = hashlib.sha256(said.encode())
    for name, tensor in tensors.items():
        state.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        InputError: when it is missing, truncated or no such file.
    """
    import safetensors.torch

    with reading(path):
        return safetensors.torch.load_file(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what reading a safetensors file raises into an error that says which file it is."""
    import safetensors

    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} is missing {path.name}") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or is no safetensors file: {error}") from error


def load_weights(directory: Path, module: nn.Module, *, as_saved: bool = False) -> None:
    """Load model.safetensors into a module, all of it or nothing; `as_saved` in the precision that the file is in."""
    path = directory / WEIGHTS
    tensors = read_tensors(path)
    if as_saved:
        _take_precision(module, tensors)
    load_strictly(module, tensors, str(path))


_PRECISIONS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def _take_precision(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    found = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    # layers of several precisions do not take each other's output
    if len(found) == 1 and found <= _PRECISIONS:
        # what is not in the file, such as tables of noise levels, stays as precise as it is
        for own in module.state_dict(keep_vars=True).values():
            if own.is_floating_point():
                own.data = own.data.to(*found)


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a module whose names and shapes they must match; nothing is copied when they do not."""
    problems = _mismatch(module.state_dict(), tensors)
    if problems:
        raise InputError(f"{source} does not fit this architecture, nothing was loaded; {problems}")
    if bad := _not_finite(tensors):
        raise InputError(f"{source} holds NaN or infinite weights, nothing was loaded; in {_some(bad)}")
    module.load_state_dict(tensors)


def _mismatch(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """What keeps tensors from being loaded in the place of one's own, in words; nothing when they fit."""
    names = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "of another shape": [
            f"{k} {tuple(tensors[k].shape)} for {tuple(v.shape)}"
            for k, v in own.items()
            if k in tensors and tensors[k].shape != v.shape
        ],
    }
    return "; ".join(f"{what}: {_some(which)}" for what, which in names.items() if which)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those with a value that is NaN or infinite."""
    floats = {k: v for k, v in tensors.items() if v.is_floating_point() and v.numel()}
    if not floats:
        return []
    # of 8-bit floats torch computes nothing
    extents = [torch.aminmax(v.detach() if v.element_size() > 1 else v.detach().float()) for v in floats.values()]
    finite = [torch.stack(extent).isfinite().all() for extent in extents]
    # a GPU is waited for once, not for each
    told = torch.stack([each.to(finite[0].device) for each in finite]).tolist()
    return [name for name, good in zip(floats, told, strict=True) if not good]


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that cannot be written, since no one could load them.

    Raises:
        InputError: for those without values (on the meta device), or with NaN or infinite ones.
    """
    if nowhere := [name for name, x in tensors.items() if x.is_meta]:
        raise InputError(f"weights on the meta device have no values to write, such as {nowhere[0]}")
    if bad := _not_finite(tensors):
        raise InputError(f"weights that are NaN or infinite are not written: none could load them; in {_some(bad)}")


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def entry(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An entry of a configuration that has entries itself; empty where it is not there, or is damaged."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


_CARD = {"training": dict, "data": dict, "metrics": list}


def read_card(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card says, from the configuration it was made from; what is damaged of it is left out."""
    card = {k: v for k, v in entry(config, "card").items() if isinstance(v, _CARD.get(k, object))}
    rows = {"metrics": [row for row in card["metrics"] if isinstance(row, dict)]} if "metrics" in card else {}
    return card | rows


def write(path: str | Path, config: dict[str, Any], tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write a checkpoint directory.

    Raises:
        InputError: for what cannot be written, before anything is.
    """
    directory = Path(path).expanduser()
    config = {"format": FORMAT, "dualout": __version__, **config, "card": card}
    check_values(tensors)
    try:
        told = as_json(config)
    except (TypeError, ValueError) as error:
        raise InputError(f"config.json takes JSON values alone, in what is said besides too: {error}") from error
    about = card_text(config)
    text_path(directory)
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
    # the configuration comes last: a directory that has one has all
    write_tensors(directory / WEIGHTS, tensors)
    write_text(directory / CARD, about)
    write_text(directory / CONFIG, told)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    import safetensors.torch

    # clones: tied weights share memory, which safetensors refuses
    plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    with atomically(path) as aside:
        safetensors.torch.save_file(plain, aside)
