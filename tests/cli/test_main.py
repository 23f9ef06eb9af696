"""The entry point: finding commands, messages and exit codes."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dualout
from dualout.__main__ import main as entry
from dualout.cli import main as module
from dualout.cli.main import commands, main
from dualout.cli.options import out_directory
from dualout.errors import InputError

NOT_COMMANDS = {"__init__", "main", "console", "options"}


def files() -> set[str]:
    found = {p.stem for p in Path(module.__file__).parent.glob("*.py")}
    return {name for name in found - NOT_COMMANDS if not name.startswith("_")}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "usage: dualout COMMAND" in out
    assert files()
    for name in files():
        assert f"\n  {name} " in out


def test_every_command_says_what_it_does() -> None:
    assert set(commands()) == files()
    for name, text in commands().items():
        assert 10 < len(text) < 120, name
        assert callable(importlib.import_module(f"dualout.cli.{name}").run)


@pytest.mark.parametrize("name", sorted(files()))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code in (0, None)
    out = capsys.readouterr().out
    assert f"dualout {name}" in out
    assert "options" in out
    assert "``" not in out


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"dualout {dualout.__version__}\n"


def test_an_unknown_command_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dualout trian: unknown command 'trian'; did you mean 'train'? Known: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("name", sorted(files()))
def test_an_unknown_option_is_told_the_nearest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--cnofig", "x"]) == 2
    err = capsys.readouterr().err
    assert "did you mean '--config'?" in err
    assert "Traceback" not in err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Puts a command called `trial` in place."""

    def put(run: Callable[..., Any]) -> None:
        fake = types.ModuleType("dualout.cli.trial")
        fake.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(module.sys.modules, "dualout.cli.trial", fake)
        monkeypatch.setattr(module, "commands", lambda: {"trial": "A trial."})

    return put


def test_arguments_and_exit_codes_are_passed_on(command: Callable[..., None]) -> None:
    seen: list[list[str]] = []
    command(seen.append)
    assert main(["trial", "--a", "1"]) == 0
    assert seen == [["--a", "1"]]
    command(lambda arguments: 143)
    assert main(["trial"]) == 143


def test_errors_become_messages_and_codes(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(arguments: list[str]) -> None:
        raise InputError("no such folder; make it")

    command(wrong)
    assert main(["trial"]) == 2
    assert capsys.readouterr().err == "dualout trial: no such folder; make it\n"

    def stopped(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    command(stopped)
    assert main(["trial"]) == 130
    assert capsys.readouterr().err == "\ndualout trial: stopped\n"

    def broken(arguments: list[str]) -> None:
        raise ZeroDivisionError

    # a fault of ours keeps its traceback
    command(broken)
    with pytest.raises(ZeroDivisionError):
        main(["trial"])


def test_sigterm_leaves_as_ctrl_c_does(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    removed = []

    def terminated(arguments: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            removed.append("what is half written")

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        command(terminated)
        assert main(["trial"]) == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert removed
    assert capsys.readouterr().err == "\ndualout trial: stopped\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("looked_for", "entry"),
    [
        # the first imports
        ("name == 'dualout.cli.main'", "from dualout.__main__ import main"),
        # torch's C code imports numpy, and goes on without it whatever is raised there
        ("name == 'numpy' and 'torch' in sys.modules", "from dualout.cli.main import main"),
    ],
    ids=["first", "torch"],
)
def test_a_signal_amid_imports_ends_quietly(looked_for: str, entry: str, number: int, code: int) -> None:
    program = (
        "import os, signal, sys\n"
        # what was started in the background has it ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Stops:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if {looked_for}:\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Stops())\n"
        "sys.argv[1:] = ['info']\n"
        f"{entry}\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_warnings_are_lines_without_a_place_in_a_program(monkeypatch, capsys) -> None:
    def command() -> int:
        warnings.warn("the scheduler\x1b[2J clips", stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return 3

    monkeypatch.setattr("dualout.cli.main.main", command)
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert entry() == 3
        assert warnings.showwarning is shown
    told, where, *_ = capsys.readouterr().err.splitlines()
    assert told == "warning: the scheduler\\u001b[2J clips"
    assert "test_main.py" in where
    assert where.endswith("DeprecationWarning: old")


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["info"]])
def test_a_reader_that_has_gone_is_no_error(arguments: list[str]) -> None:
    # the pipe is closed before anything is written
    code = f"import sys; from dualout.cli.main import main; sys.stdin.read(); sys.exit(main({arguments}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        process.stdin.close()
        err = process.stderr.read().decode()
    assert process.returncode == 0, err
    assert err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
@pytest.mark.parametrize("arguments", ["--version", "info"])
def test_a_full_disk_that_the_output_goes_to_is_told(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dualout", arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    told = f"dualout {arguments}: the disk is full that its output goes to; make room and run again\n"
    assert (done.returncode, done.stderr) == (2, told)


@pytest.mark.parametrize(("arguments", "expected"), [(["--version"], 0), (["nothing"], 2)])
def test_closed_outputs_are_no_error(arguments: list[str], expected: int, monkeypatch) -> None:
    """As by >&- in a shell, or of a service without a console."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--steps", "five"], "--steps is a whole number; got five"),
        (["train", "--size", "big"], "--size is a whole number or null; got big"),
        (["train", "--lr", "nan"], "--lr is a number; got nan"),
        (["train", "--betas", "0.9"], "--betas is a list of numbers, written [a, b]; got 0.9"),
        (["train", "--flip=maybe"], "--flip is true or false; got maybe"),
        (["compare", "--steps", "5,10"], "--steps is a list, written [a, b]; got 5,10"),
        (["compare", "--methods", "eps"], "--methods is a mapping, written {name: value}; got eps"),
        (["train", "--config", "none.yaml"], "--config: File does not exist"),
        (["train", "--config", "text"], "--config is a YAML file of lines such as seed: 0, one an option; got words"),
        (["train", "--config", "none"], "--config is a YAML file of lines such as seed: 0, one an option; got nothing"),
        (["train", "--config", "twice"], "--config: twice says steps twice"),
        (["compare", "--config", "methods"], "--config: methods says dual twice"),
        (["train", "--config", "typo"], "unknown option of dualout train: 'stepz'; did you mean 'steps'?"),
        (["evaluate", "a", "--seeds", "-1,x"], "--seeds are whole numbers separated by commas, got '-1,x'"),
        (["train", "--lr", "-1e-3"], "--lr is a number above 0 and below 10; got -0.001"),
        (["evaluate", "runs/a", "runs/b"], "unrecognized arguments: runs/b; several runs are written with commas"),
    ],
)
def test_what_cannot_be_read_is_told_by_the_flag(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("words")
    Path("typo").write_text("stepz: 5")
    Path("methods").write_text("methods:\n  dual: dual\n  dual: eps\n")
    Path("none").touch()
    Path("twice").write_text("steps: 5\nseed: 1\nsteps: 6\n")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"dualout {arguments[0]}: {says}")
    assert "class '" not in said


def test_a_value_that_was_forgotten_in_a_file_is_told(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("steps: 3\ndevice:\nsize:\n")
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--dry_run"]) == 2
    assert "device is a name; got null" in capsys.readouterr().err


def test_what_a_killed_process_was_writing_is_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".results.json.a1b2c3_4.tmp").write_text("half")
    (tmp_path / ".results.lock").touch()
    (tmp_path / ".writing-abc").mkdir()
    assert out_directory(tmp_path, holds="scores", marker="results.json") == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == [".results.lock"]
    (tmp_path / ".mine").write_text("whole")
    with pytest.raises(InputError, match=r"holds something else \(.mine\)"):
        out_directory(tmp_path, holds="scores", marker="results.json")


def test_what_an_encoding_has_not_is_written_otherwise(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    command(lambda _: print("1×8×8 → r"))
    assert main(["trial"]) == 0
    assert written.getvalue().decode("cp1252").strip() == "1×8×8 \\u2192 r"


def test_what_is_missing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for name, says in (
        ("sample", "run is missing: a run's directory, a checkpoint's, or the name of a Hugging Face Hub repository"),
        ("upgrade", "source is missing: what to upgrade: a checkpoint"),
        ("report", "runs is missing: directories of runs"),
        ("completion", "shell is missing: bash, zsh or fish"),
    ):
        assert main([name]) == 2
        assert capsys.readouterr().err.startswith(f"dualout {name}: {says}")


def test_a_value_without_its_option_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train", "digits"], ["train", "--flip", "digits"], ["sample", "run", "digits"]):
        assert main(arguments) == 2
        told = f"unrecognized arguments: digits; options are written --name value: see dualout {arguments[0]} --help"
        assert told in capsys.readouterr().err


def test_a_commands_help_is_in_words_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "Print what results as YAML, and stop" in told
    assert "flags customizes" not in told
