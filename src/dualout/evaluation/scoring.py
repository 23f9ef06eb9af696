"""From a sampling to rows of scores: images are made, their features kept, and the images dropped, batch by batch."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dualout.errors import InputError
from dualout.evaluation.group import Group
from dualout.evaluation.metrics import NEIGHBOURS
from dualout.evaluation.protocol import differences, warning
from dualout.evaluation.reference import Reference
from dualout.evaluation.sampling import Sampling, interval_text
from dualout.evaluation.statistics import Statistics
from dualout.files import explained, read_json, write_json, write_text

Row = dict[str, Any]
_COMBINATION = (
    "run", "parameterization", "route", "sampler", "spacing", "steps", "seed", "features", "calibrated",
)  # fmt: skip
COLUMNS = (*_COMBINATION, "fd", "kid", "precision", "recall", "images", "nfe", "seconds")
OPTIONAL = ("guidance", "guidance_interval", "decode")
"""Columns of rows that have them."""
KEY = (*_COMBINATION, "images", *OPTIONAL)
"""What tells one row from another: all that is asked for in the words of a command."""


class Scoring:
    """The scores of a sampling's first images, against one or more references.

    Iterating makes the images and yields how many are done; `rows` then gives the scores.

    Args:
        sampling: how images are made.
        images: how many.
        references: what they are compared with.
        seed: which set of images this is, for the rows; `first_seed` gives the seed of its first image.
        group: the processes that share the images; the first of them has the scores.

    Raises:
        InputError: when the features do not take the model's images, or there are too few.
    """

    def __init__(
        self,
        sampling: Sampling,
        images: int,
        references: Sequence[Reference],
        seed: int = 0,
        group: Group | None = None,
    ) -> None:
        check_count(images)
        channels, *size = sampling.model.image
        for reference in references:
            reference.features.check(channels, (size[0], size[1]))
        self.sampling, self.images, self.references, self.seed = sampling, images, references, seed
        self.group = group or Group()
        self.seconds = 0.0
        self._scores: list[dict[str, float]] = []

    def run(self, batch_size: int = 256) -> Iterator[int]:
        """Make this process's share of the images and their features; yields how many are done."""
        # gone when the scores are there: of 10,000 images in Inception's features they are 150 MB, and rows may be many
        statistics = [Statistics() for _ in self.references]
        began, share = time.perf_counter(), self.group.share(self.images)
        for start in range(share.start, share.stop, batch_size):
            batch = self.sampling.images(range(start, min(start + batch_size, share.stop)))
            self.seconds += time.perf_counter() - began
            for reference, own in zip(self.references, statistics, strict=True):
                own.add(reference.features(batch.to(self.sampling.device)))
            yield statistics[0].count if statistics else 0
            began = time.perf_counter()
        merged = [self.group.merged(own) for own in statistics]
        if self.group.rank == 0:
            self._scores = [reference.scores(whole) for reference, whole in zip(self.references, merged, strict=True)]

    @property
    def title(self) -> str:
        """The combination in a few words."""
        sampling = self.sampling
        name, route = sampling.model.denoiser.parameterization.short, sampling.route
        how = f"{_named(sampling)} {sampling.sampler.config()['spacing']} {sampling.sampler.steps} steps"
        how += f" guidance {sampling.guidance:g}" if sampling.guidance is not None else ""
        how += " calibrated" if sampling.calibrated else ""
        return f"{name}{'' if route == 'mix' else f' ({route})'} {how}"

    def pending(self) -> list[Row]:
        """The rows as they will be, without their scores: one for each reference."""
        sampling, protocol = self.sampling, self.sampling.protocol()
        row: Row = {
            "run": sampling.model.run,
            "parameterization": sampling.model.denoiser.parameterization.spec,
            "route": sampling.route,
            "sampler": _named(sampling),
            "spacing": protocol["spacing"],
            "steps": sampling.sampler.steps,
            "seed": self.seed,
            "calibrated": sampling.calibrated,
            "images": self.images,
            "nfe": sampling.evaluations,
        }
        row |= {} if sampling.guidance is None else {"guidance": sampling.guidance}
        interval = interval_text(sampling.guidance_interval)
        row |= {"guidance_interval": interval} if interval else {}
        model = sampling.model
        decoder = model.output.decoded_by
        row |= {} if decoder is None else {"decode": decoder}
        trained_on = (model.details.get("trained_on") or {}).get("fingerprint")
        rows = []
        for reference in self.references:
            known = reference.images["fingerprint"] == trained_on
            even = sampling.labels == model.turn and len(reference.classes) == model.classes
            in_turn = [reference.classes[k] for k in model.turn] if even else []
            note = warning(self.images, reference.images["count"], known, in_turn)
            own = {"images": self.images} | protocol | reference.protocol() | ({"warning": note} if note else {})
            rows.append(row | {"features": reference.features.spec, "protocol": own | sampling.computed()})
        return rows

    def rows(self) -> list[Row]:
        """The rows, once `run` has ended."""
        return [
            {k: row[k] for k in KEY if k in row}
            | scores
            | {"nfe": row["nfe"], "seconds": round(self.seconds, 3), "protocol": row["protocol"]}
            for row, scores in zip(self.pending(), self._scores, strict=True)
        ]


def check_count(images: int) -> None:
    """Refuse so few images that there is nothing to score."""
    if images <= NEIGHBOURS:
        raise InputError(f"scores need more than {NEIGHBOURS} images, got --images {images}")


def first_seed(seed: int, images: int) -> int:
    """The seed of the first image of the seed-th set of so many images: no two sets have one in common."""
    return seed * images


def _named(sampling: Sampling) -> str:
    """The sampler with the options that the other columns do not tell."""
    hidden = ("steps=", "spacing=")
    return ":".join(part for part in sampling.sampler.spec.split(":") if not part.startswith(hidden))


class Results:
    """results.json and results.csv in a directory: rows are added as they are finished.

    A row that is there with the same protocol need not be made again; one that is made again with another protocol (the
    model was trained further, the real images are others) takes its place. Scores of 1,000 and of 5,000 images are rows
    beside each other: either is true. Several commands may add rows to one directory at a time.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "results.json"
        self.rows: list[Row] = self._read()
        if not self.path.exists():
            with explained(self.path):
                directory.mkdir(parents=True, exist_ok=True)
            self.add([])

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        rows = read_json(self.path, object, "; remove it, or give another --out")
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "protocol" in row for row in rows):
            raise InputError(f"{self.path} holds something else than rows of scores; give another --out")
        return rows

    def find(self, row: Row) -> Row | None:
        """The finished row with this one's key and protocol."""
        for known in self.rows:
            if _same_key(known, row) and not differences(known["protocol"], row["protocol"]):
                return known
        return None

    def add(self, rows: Sequence[Row]) -> None:
        """Write down finished rows, beside those that another command may have added meanwhile."""
        from filelock import FileLock

        with explained(self.path), FileLock(self.directory / ".results.lock"):
            kept = [known for known in self._read() if not any(_same_key(known, row) for row in rows)]
            self.rows = [*kept, *rows]
            self._write()

    def _write(self) -> None:
        write_json(self.path, self.rows, indent=1)
        table = io.StringIO()
        columns = [*COLUMNS, *(name for name in OPTIONAL if any(name in row for row in self.rows))]
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: row.get(k) for k in columns} for row in self.rows)
        write_text(self.directory / "results.csv", table.getvalue())


def _same_key(a: Row, b: Row) -> bool:
    return all(a.get(k) == b.get(k) for k in KEY)
