"""Files of weights: what is in them is read as data, and which of it are the weights, the averaged before others."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualout import checkpoint
from dualout.errors import InputError

FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_WRAPPINGS = re.compile(r"^(module\.|_orig_mod\.)+")
_NESTS = ("state_dict", "model_state_dict", "model", "net", "unet")
_AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)
"""What names of averages have in them: ema, ema_model, model_ema, ema_state_dict, params_ema, ema_0.9999."""
_COUNTS = ("n_averaged", "decay", "num_updates", "initted", "step")
"""What averages keep beside their weights."""
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.\w+")
_LORA = re.compile(r"(?<![a-z])lora(?![a-z])")
LORA = (
    "{} holds a LoRA, which changes weights that lie elsewhere: merge it in diffusers, pipeline.fuse_lora() and "
    "pipeline.unload_lora_weights(), and upgrade what pipeline.save_pretrained writes"
)


def read_weights(path: Path) -> dict[str, Any]:
    """What a file of weights holds, or all of them where it is one of several; tensors and plain values only.

    Raises:
        InputError: when it is damaged, or could only be read by running code that it brings.
    """
    shard = _SHARD.fullmatch(path.name)
    if shard is None:
        return _read(path)
    names = [f"{shard[1]}-{number:05}-of-{shard[2]}{path.suffix}" for number in range(1, int(shard[2]) + 1)]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise InputError(f"{path} is one of {len(names)} files, of which {_some(missing)} is missing")
    return {key: value for name in names for key, value in _read(path.parent / name).items()}


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return dict(checkpoint.read_tensors(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        detail = next((f" ({line.strip()})" for line in reason if "GLOBAL" in line or "Unsupported" in line), "")
        raise InputError(
            f"{path} is a pickle that needs code to be run, or is damaged, and is not loaded{detail}: save the model's "
            "state_dict() alone where that code is trusted"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged or is no file of weights: {str(error).strip()[:300]}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not weights by name (a state_dict)")
    return dict(content)


def find_weights(content: Mapping[str, Any], source: str, entry: str | None = None) -> dict[str, Tensor]:
    """The weights in a file's content, by name; those of an average where there is one.

    Args:
        content: what `read_weights` gave.
        source: for messages.
        entry: where they lie, if that is known; names are separated by dots.

    Raises:
        InputError: for content without weights, with more than one average, or of a LoRA.
    """
    # ema_0.9999 is one name
    for name in () if entry is None else [entry] if entry in content else entry.split("."):
        if not isinstance(content, Mapping) or name not in content:
            has = _some(content) if isinstance(content, Mapping) else f"a value of type {type(content).__name__} there"
            raise InputError(f"{source} has no entry {entry!r}; it has {has}")
        content = content[name]
    seen: list[int] = []
    while not _holds_weights(content, source):
        seen.append(id(content))
        # a pickle may hold itself
        inner = {str(k): v for k, v in content.items() if isinstance(v, Mapping) and id(v) not in seen}
        averaged = [k for k in inner if _AVERAGED.search(k) and _has(inner[k])]
        found = averaged or [k for k in _NESTS if k in inner][:1]
        if len(found) != 1:
            what = "more than one average" if averaged else "no weights at its top"
            raise InputError(f"{source} holds {what}: it holds {_some(averaged or content)}; say which by entry=NAME")
        content = inner[found[0]]
    # nn.DataParallel and torch.compile put their names before each
    tensors = {
        _WRAPPINGS.sub("", str(k)).replace("._orig_mod.", "."): v for k, v in content.items() if isinstance(v, Tensor)
    }
    if any(_LORA.search(name) for name in tensors):
        raise InputError(LORA.format(source))
    tensors = _average_beside(tensors, source)
    return {k: v for k, v in tensors.items() if k not in _COUNTS or v.ndim}


def _holds_weights(content: Any, source: str) -> bool:
    """Whether it has weights itself; an average without names is refused."""
    if not isinstance(content, Mapping):
        raise InputError(f"{source} holds a {type(content).__name__} there, not weights by name (a state_dict)")
    if isinstance(content.get("shadow_params"), list):
        raise InputError(
            f"{source} holds an average without names, a list of shadow_params: save the network's state_dict() after "
            "ema.copy_to(network.parameters()); entry=NAME takes weights that were not averaged"
        )
    # a count of steps may lie beside the entries
    return any(isinstance(v, Tensor) and v.ndim for v in content.values())


def _has(content: Mapping[str, Any], depth: int = 3) -> bool:
    """Whether there are weights somewhere in it, and not only settings, as of an average's schedule."""
    return any(
        (isinstance(v, Tensor) and v.ndim > 0)
        or (isinstance(v, list) and any(isinstance(t, Tensor) for t in v))
        or (isinstance(v, Mapping) and depth > 0 and _has(v, depth - 1))
        for v in content.values()
    )


def _average_beside(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Of a module that has its average as a part, that part: ema_model.NAME beside model.NAME."""
    parts = sorted({name.split(".")[0] for name in tensors if "." in name and _AVERAGED.search(name.split(".")[0])})
    if not parts:
        return tensors
    if len(parts) > 1:
        raise InputError(f"{source} holds more than one average: {', '.join(parts)}; save the one that is meant alone")
    average = {k.removeprefix(f"{parts[0]}."): v for k, v in tensors.items() if k.startswith(f"{parts[0]}.")}
    average = {k: v for k, v in average.items() if k not in _COUNTS}
    if any("." in name for name in average):
        return average
    # latent-diffusion's have names without dots, and no buffers: both are those of the network beside
    for part in {name.split(".")[0] for name in tensors} - set(parts):
        own = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        dotless = {name.replace(".", ""): name for name in own}
        if average.keys() <= dotless.keys():
            return own | {dotless[name]: value for name, value in average.items()}
    raise InputError(
        f"the average in {source}, {parts[0]}, has other names than the network beside it: {_some(average)}"
    )


def _some(content: Iterable[Any]) -> str:
    return ", ".join(map(str, list(content)[:8])) or "nothing"
