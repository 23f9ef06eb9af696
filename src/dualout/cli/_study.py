"""The directory of an analysis: tables, arrays and figures of one model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dualout.analysis import canvas
from dualout.analysis.study import Study, together
from dualout.analysis.tables import csv_text, json_text
from dualout.data.npfiles import npz_array, npz_arrays
from dualout.errors import InputError
from dualout.files import atomically, explained, read_json, write_text

PROTOCOL, DOCUMENT, ARRAYS, FIGURES = "protocol.json", "analysis.json", "arrays.npz", "figures"


def write(study: Study, directory: Path, name: str) -> list[Path]:
    """Write tables as CSV, everything as analysis.json and arrays.npz, and figures as PNG.

    protocol.json comes first and marks the directory as an analysis's, analysis.json comes last: where it is, all is.

    Args:
        study: what was measured.
        directory: made if it is missing.
        name: what the model is called in figures.

    Returns:
        what was written.
    """
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / DOCUMENT).unlink(missing_ok=True)
    written = [directory / PROTOCOL]
    write_text(written[0], json_text(study.protocol))
    with explained(directory):
        (directory / FIGURES).mkdir(exist_ok=True)
    for table, rows in study.tables().items():
        written.append(directory / f"{table}.csv")
        write_text(written[-1], csv_text(rows))
    for drawing in [*study.drawings(), *together({name: study})]:
        written.append(directory / FIGURES / f"{drawing.name}.png")
        with atomically(written[-1]) as aside:
            aside.write_bytes(canvas.png(drawing.figure, drawing.title))
    with atomically(directory / ARRAYS) as aside, aside.open("wb") as file:
        np.savez_compressed(file, **study.arrays())  # type: ignore[arg-type]
    write_text(directory / DOCUMENT, json_text(study.document()))
    return [*written, directory / ARRAYS, directory / DOCUMENT]


def read(directory: Path) -> Study | None:
    """The study in a directory; None when there is none.

    Raises:
        InputError: when it is damaged.
    """
    file = directory / DOCUMENT
    if not file.exists():
        return None
    try:
        document = read_json(file)
        stored = npz_arrays(directory / ARRAYS)
        arrays = {name: npz_array(directory / ARRAYS, info) for name, info in stored.items()}
        return Study.of(document, arrays)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the analysis in {directory} is damaged ({error}); make it again with dualout analyze"
        ) from error
