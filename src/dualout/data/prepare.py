"""From a spec to a Dataset: the source is read, its channels and size settled, its pictures decoded once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualout.data import decode
from dualout.data.base import Names, Pictures, Progress, Reading, Source, open_source
from dualout.data.cache import Job, glimpse, listed_bad, materialize, quiet, workers
from dualout.data.dataset import Dataset, evenly
from dualout.errors import InputError, some

_LOOKED_AT, _COMPARED = 512, 64


def load(
    spec: str | Source,
    *,
    size: int | tuple[int, int] | None = None,
    grey: bool | None = None,
    split: str | None = None,
    cache: str | Path | None = None,
    strict: float | None = None,
    few: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """The images of a data source.

    Args:
        spec: such as ``digits`` or ``folder:/my/images:size=64``; see `open_source`. What it names wins over `size`,
            `grey`, `split` and `strict` here.
        size: what images are made to be: a number for squares, or (H, W).
        grey: True for C = 1, False for C = 3.
        split: "train" (where nothing is said), "test" or "all".
        cache: a directory where decoded images are kept and mapped from. Without one they are decoded into memory, up
            to 2 GiB of them.
        strict: the share of image files that may be unreadable (0.01 where nothing is said); they are left out and
            named in the result's `notes`.
        few: decode no more pictures than this, which then stand in turn for all: for a look at what there is, before
            hours of decoding. None decodes all.
        progress: called as (what, done, total) while files are found and decoded.

    Returns:
        a Dataset of at least one image.

    Raises:
        InputError: for whatever cannot be used, before any long work where it can be known.
    """
    source = open_source(spec, size=size, grey=grey, split=split, strict=strict)
    reading = Reading(None if cache is None else Path(cache).expanduser(), progress, few)
    found = source.read(reading)
    if isinstance(found, Pictures):
        made = _decoded(source, found, reading)
    else:
        made = _fitted(source, dataclasses.replace(found, name=source.spec), reading)
    note = _scaled(made) if made.latents else _narrow(made)
    return dataclasses.replace(made, notes=(*made.notes, note)) if note else made


def _narrow(found: Dataset) -> str | None:
    """A note on images that use less than half of the range: their values were perhaps meant for another."""
    pixels = found.gather(evenly(len(found), _COMPARED))
    low, high = int(pixels.min()), int(pixels.max())
    if high - low >= 128:
        return None
    return (
        f"all pixels of {len(pixels)} images looked at are from {low} to {high}, where 0 is black and 255 white: if "
        "that is not how the images look, say which values are black and white (arrays: values=[0+1] of floats), or "
        "convert them; 16-bit files are read as 0 to 65535"
    )


def _scaled(found: Dataset) -> str | None:
    """A note on latents of which a channel is far from unit variance, where noise hides it first or last."""
    spread = found.gather(evenly(len(found), _COMPARED)).std((0, 2, 3), dtype=np.float64)
    if spread.min() >= 0.25 and spread.max() <= 4:
        return None
    told = some([f"{s:.3g}" for s in spread], 8)
    return (
        f"the latents' channels have standard deviations of {told}, where schedules are made for about 1: multiply "
        "latents by their autoencoder's scaling_factor, or each channel by a number of its own"
    )


def _fitted(source: Source, found: Dataset, reading: Reading) -> Dataset:
    """Pixels that are there, with the channels and the size that the source asks for."""
    size, channels = source.shape or found.size, found.channels
    if source.grey is not None:
        channels = 1 if source.grey else 3
    if (channels, *size) == found.shape:
        return found
    if found.latents:
        raise InputError(f"{source.spec}: latents are no pictures, they cannot be given a size or made grey or colour")
    if channels != found.channels and found.channels not in (1, 3):
        raise InputError(
            f"{source.spec}: images of {found.channels} channels are neither grey nor colour; leave grey out"
        )
    job = Job(
        names=Names(len(found), str),
        shape=(channels, *size),
        image=lambda i: decode.refitted(found.gather(np.array([i]))[0], channels, size),
        identity=f"refitted {found.fingerprint} {_state_of(found)}",
        whole=source.spec,
        strict=0.0,
        progress=reading.progress,
    )
    stored, rows, _ = _made(job, reading)
    return Dataset(source.spec, stored, rows=rows, labels=found.labels, classes=found.classes, notes=found.notes)


def _state_of(found: Dataset) -> str:
    """A hash that changes with pixels that the fingerprint, of a part of many, does not look at."""
    stored, state = found.stored, hashlib.blake2b(digest_size=16)
    if isinstance(stored, np.memmap) and stored.filename is not None:
        file = Path(stored.filename).stat()
        state.update(f"{file.st_size} {file.st_mtime_ns}".encode())
    else:
        state.update(np.ascontiguousarray(stored).data)
    if found.rows is not None:
        state.update(found.rows.tobytes())
    return state.hexdigest()


def _decoded(source: Source, found: Pictures, reading: Reading) -> Dataset:
    """Picture files, decoded."""
    channels, size = _settled(source, found)

    def image(i: int) -> np.ndarray:
        picture = found.open(i)
        if source.grey is None or source.size is None:
            own_channels, own_size = decode.looked_at(picture)
            if source.grey is None and own_channels != channels:
                raise _mixed(found, {own_channels: [i], channels: []})
            if source.size is None and own_size != size:
                raise _sizes(found, {own_size: [i], size: []})
        return decode.decoded(picture, channels, size)

    job = Job(found.names, (channels, *size), image, found.identity, found.whole, source.strict, reading.progress)
    stored, rows, bad = _made(job, reading)
    kept = np.delete(np.arange(len(found.names)), [i for i, _ in bad])
    labels = None if found.labels is None else torch.from_numpy(found.labels[kept])
    notes = found.notes
    if bad:
        text = f"{len(bad)} of {len(found.names)} images cannot be read and are left out"
        notes = (*notes, f"{text}: {listed_bad(found.names, bad)}")
    return Dataset(source.spec, stored, rows=rows, labels=labels, classes=found.classes, notes=notes)


def _made(job: Job, reading: Reading) -> tuple[np.ndarray, np.ndarray | None, list[tuple[int, str]]]:
    """Pixels, which of them each image has (None: its own), and which images could not be read."""
    if reading.few is None or len(job.names) <= reading.few:
        stored, bad = materialize(job, reading.cache)
        return stored, None, bad
    stored = glimpse(job, reading.cache, reading.few)
    return stored, np.arange(len(job.names)) % len(stored), []


def _settled(source: Source, found: Pictures) -> tuple[int, tuple[int, int]]:
    """The channels and the size of all pictures, from the source's options or from the headers of some of them."""
    if source.grey is not None and source.shape is not None:
        return (1 if source.grey else 3), source.shape
    some = evenly(len(found.names), _LOOKED_AT).tolist()

    def look(i: int) -> Any:
        try:
            with found.open(i) as picture:
                return decode.looked_at(picture)
        except decode.Unreadable as error:
            return str(error)

    with quiet(), ThreadPoolExecutor(workers()) as pool:
        seen = list(zip(some, pool.map(look, some), strict=True))
    good = [(i, result) for i, result in seen if not isinstance(result, str)]
    if not good:
        reasons = listed_bad(found.names, seen)
        raise InputError(f"{found.whole}: none of {len(seen)} images looked at can be read ({reasons})")
    by_channels: dict[Any, list[int]] = {}
    by_size: dict[Any, list[int]] = {}
    for i, (channels, size) in good:
        by_channels.setdefault(channels, []).append(i)
        by_size.setdefault(size, []).append(i)
    if source.grey is None and len(by_channels) > 1:
        raise _mixed(found, by_channels)
    if source.size is None and len(by_size) > 1:
        raise _sizes(found, by_size)
    channels = next(iter(by_channels)) if source.grey is None else 1 if source.grey else 3
    return channels, source.shape or next(iter(by_size))


def _mixed(found: Pictures, by_channels: dict[Any, list[int]]) -> InputError:
    grey, colour = (_such(found, by_channels.get(c, [])) for c in (1, 3))
    return InputError(
        f"{found.whole}: some images are grey{grey}, others colour{colour}; say which all shall be made: grey=true or "
        "grey=false"
    )


def _sizes(found: Pictures, by_size: dict[Any, list[int]]) -> InputError:
    common = Counter({size: len(numbers) for size, numbers in by_size.items()}).most_common(3)
    some = ", ".join(f"{h}×{w}{_such(found, by_size[h, w])}" for (h, w), _ in common)
    return InputError(
        f"{found.whole}: the images have different sizes ({some}{', …' if len(by_size) > 3 else ''}, height × width); "
        "say which all shall be made, by a central cut and scaling: size=64, say"
    )


def _such(found: Pictures, numbers: list[int]) -> str:
    return f" ({len(numbers)} such as {found.names[numbers[0]]})" if numbers else ""
