"""What is written down with every set of images and every score, so that two numbers can be compared or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dualout.errors import cut
from dualout.version import __version__

ENOUGH = 10_000
UNEVEN = 2
"""How many times as many images as another a class may have."""
INCIDENTAL = ("software", "device", "computed_by")
"""Written down, but no reason to make the same images again."""
_NAMES = ("name", "data")
"""What images are called, beside their fingerprint."""


def software(device: torch.device) -> dict[str, Any]:
    """The versions and the device that were used."""
    return {
        "software": {"dualout": __version__, "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def warning(images: int, reference: int, trained_on: bool = False, classes: Sequence[int] = ()) -> str | None:
    """What to know before a score is compared with another.

    Args:
        images: how many were generated.
        reference: how many they are compared with.
        trained_on: whether the model was trained on the very images it is compared with.
        classes: of images that are made of some classes in turn, how many of the reference's are of each.
    """
    found = []
    few = [f"{n} {what}" for n, what in ((images, "generated images"), (reference, "reference images")) if n < ENOUGH]
    if few:
        found.append(
            f"FD is biased upward by few images, and recall falls: {' and '.join(few)} are fewer than {ENOUGH}. "
            "Compare these scores only with others of the same counts"
        )
    if trained_on:
        found.append("The reference images are those the model was trained on: what it learnt by heart scores best")
    if classes and max(classes) > UNEVEN * min(classes):
        found.append(
            f"Images are made of the {len(classes)} classes in turn, {min(classes)} to {max(classes)} reference images "
            "are of one: some of the distance is between these shares"
        )
    return ". ".join(found) or None


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The entries in which two protocols differ, by dotted name, each with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    # the same images may lie elsewhere now
    same = _NAMES if a.get("fingerprint") and a["fingerprint"] == b.get("fingerprint") else ()
    for key in [*a, *(k for k in b if k not in a)]:
        if key in (same if prefix else INCIDENTAL):
            continue
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found |= differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found[prefix + key] = (x, y)
    return found


def listed(found: dict[str, tuple[Any, Any]], most: int = 6) -> str:
    """Differences in words."""
    lines = [f"{key} was {cut(old, 40)}, now {cut(new, 40)}" for key, (old, new) in found.items()]
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more" if len(lines) > most else "")
