"""The real images that a model is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualout.errors import InputError
from dualout.files import cache_directory

if TYPE_CHECKING:
    from dualout.data.base import Progress
    from dualout.data.dataset import Dataset

Shape = tuple[int, int, int]
"""Of an image, (C, H, W)."""


def real_images(
    spec: str,
    shape: Shape,
    split: str,
    *,
    latents: bool = False,
    grey: bool | None = None,
    progress: Progress | None = None,
) -> tuple[Dataset, str]:
    """Load images of the shape that a model makes; what has to be decoded is kept in dualout's cache.

    Args:
        spec: of the data.
        shape: of the model's images.
        split: which part, where the spec does not say.
        latents: whether the model makes latents, which are held against latents.
        grey: True makes them grey, False colour, where the spec does not say; None leaves them as they are.
        progress: told how far reading them is.

    Returns:
        the images, and which split they are.

    Raises:
        InputError: when they cannot be used, or are of another shape.
    """
    from dualout import data

    source = data.open_source(spec, size=shape[1:], grey=grey, split=split)
    dataset = data.load(source, cache=cache_directory() / "data", progress=progress)
    if dataset.shape != shape:
        raise InputError(
            f"the model makes images of {_told(shape)}, {spec} has {_told(dataset.shape)}; a data source is made grey "
            "by :grey=true, colour by :grey=false"
        )
    if dataset.latents != latents:
        made, found = ("latents", "pictures") if latents else ("pictures", "latents")
        raise InputError(
            f"the model makes {made}, and {spec} holds {found}: say by --data which {made} it learned from"
        )
    return dataset, source.split


def _told(shape: Shape) -> str:
    return f"{shape[0]} channel{'s' if shape[0] > 1 else ''} and {shape[1]}×{shape[2]} pixels"
