"""What is printed, in a terminal and where it is piped."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")

PROGRAM = """
from dualout.cli import console
with console.progress("loss") as bar:
    task = bar.add_task("training", total=2, loss="0.5")
    bar.update(task, completed=2)
console.say("a line of the log")
console.out.print("a title", style="bold green")
console.wrote("out", "two files")
console.table([{"fd": 1.25}], ["fd"], "scores")
"""
COLOUR = re.compile(r"\x1b\[(?:\d;)?(?:3[0-8]|9\d)[;\d]*m")


def environment(**more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM")}
    return own | {"TERM": "xterm-256color"} | more


def in_a_terminal(program: str = PROGRAM, **more: str) -> str:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**more)
    )
    os.close(theirs)
    found = b""
    while True:
        try:
            some = os.read(ours, 4096)
        except OSError:  # nobody is at the other end
            break
        if not some:
            break
        found += some
    os.close(ours)
    assert process.wait() == 0, found
    return found.decode()


def test_a_terminal_has_colour_and_progress() -> None:
    text = in_a_terminal()
    assert COLOUR.search(text)
    assert "training" in text
    assert "2/2" in text


def test_no_color_takes_the_colour_away_and_leaves_the_progress() -> None:
    text = in_a_terminal(NO_COLOR="1")
    assert not COLOUR.search(text)
    assert "2/2" in text


def test_of_processes_that_share_a_terminal_the_first_shows_progress() -> None:
    assert "2/2" in in_a_terminal(WORLD_SIZE="2", RANK="0")
    text = in_a_terminal(WORLD_SIZE="2", RANK="1")
    assert "training" not in text
    assert "a line of the log" in text


def test_a_terminal_that_knows_nothing_gets_plain_text() -> None:
    text = in_a_terminal(TERM="dumb")
    assert "\x1b" not in text
    assert "wrote out  (two files)" in text


def test_what_is_piped_is_plain_and_without_progress() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment()
    )
    assert "\x1b" not in done.stdout + done.stderr
    assert "training" not in done.stderr
    assert done.stderr.strip() == "a line of the log"
    assert "wrote out  (two files)" in done.stdout
    assert "1.25" in done.stdout


WIDE = """
from dualout.cli import console
names = ["sampler", "fd", "kid", "precision", "recall", "seconds"]
rows = [dict(zip(names, ["ddim", 38.57, 1.272, 0.4567, 0.1234, 0.0742]))]
console.table(rows, names, "scores")
"""


@pytest.mark.parametrize("width", [120, 44, 20])
def test_no_digit_is_cut_off_to_fit_a_screen(width: int) -> None:
    text = in_a_terminal(WIDE, COLUMNS=str(width))
    assert "scores" in text
    assert "…" not in text
    for value in ("ddim", "38.57", "1.272", "0.4567", "0.1234", "0.0742", "precision"):
        assert value in text


def test_numbers_stand_under_each_other() -> None:
    program = (
        "from dualout.cli import console; console.table([{'n': 5, 'by': 'a'}, {'n': 120, 'by': 'bc'}], ['n', 'by'])"
    )
    text = in_a_terminal(program, COLUMNS="80", NO_COLOR="1")
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in text.splitlines()]
    assert "    5   a" in lines
    assert "  120   bc" in lines


def test_what_is_counted_is_one_or_many() -> None:
    from dualout.cli.console import count

    assert [count(n, "image") for n in (0, 1, 2, 50_000)] == ["0 images", "1 image", "2 images", "50,000 images"]
