"""What a user can do something about.

An `InputError` is raised for anything a user gave that cannot be used: the message says what is wrong, what
came, and what to do. The command line prints it without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Something the user gave cannot be used."""


def unknown(kind: str, name: object, known: Iterable[object]) -> InputError:
    """The error for a name that is not among the known ones, with the nearest of them as a suggestion."""
    names = sorted(str(k) for k in known)
    typed = str(name).lower()
    near = difflib.get_close_matches(typed, [n.lower() for n in names], n=4, cutoff=0.5)
    # two letters swapped are likelier than one mistaken for another: ddmi is ddim, not ddpm
    near.sort(key=lambda n: sorted(n) != sorted(typed))
    hint = next((f"; did you mean {n!r}?" for n in names if near and n.lower() == near[0]), ".")
    return InputError(f"unknown {kind} {str(name)!r}{hint} Known: {', '.join(names)}")


def first_line(error: BaseException) -> str:
    """What an error of some library says: its first line that is not empty, or its name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, and that there are more."""
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def cut(value: object, most: int) -> str:
    """A value in so many characters at the most."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}…"


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What moves the cursor, changes a terminal's settings or turns the direction of writing."""


def printable(text: str) -> str:
    """Text for a terminal: names of files and entries of checkpoints may hold sequences that a terminal obeys.

    They are written as JSON and Python write them, ``\\u001b``, so that JSON stays JSON.
    """
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
