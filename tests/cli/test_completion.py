"""dualout completion, in the shells themselves where they are installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import pytest

from dualout.cli.completion import SHELLS
from dualout.cli.main import commands, main


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is printed for each shell, put into files."""
    import contextlib
    import io

    found = {}
    for shell in SHELLS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert main(["completion", shell]) == 0
        file = tmp_path_factory.mktemp("completion") / f"dualout.{shell}"
        file.write_text(text.getvalue())
        found[shell] = str(file)
    return found


def bash(script: str, *words: str) -> list[str]:
    """What the Tab key offers after these words."""
    code = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); '
        '_shtab_dualout; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code, "x", script, *words], capture_output=True, text=True, check=False)
    return done.stdout.split()


def fish(script: str, *words: str) -> list[str]:
    line = " ".join(words)
    done = subprocess.run(
        ["fish", "-N", "-c", f"source {script}; complete -C '{line}'"], capture_output=True, text=True, check=True
    )
    return [offer.partition("\t")[0] for offer in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_the_tab_key_offers_what_fits(scripts: dict[str, str], shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    offers: Callable[..., list[str]] = {"bash": bash, "fish": fish}[shell]
    script = scripts[shell]
    assert offers(script, "dualout", "tr") == ["train"]
    assert set(offers(script, "dualout", "")) >= set(commands())
    assert offers(script, "dualout", "train", "--param") == ["--parameterization"]
    assert offers(script, "dualout", "train", "--parameterization", "ve") == ["velocity"]
    assert offers(script, "dualout", "sample", "--spacing", "tr") == ["trailing"]
    # switches take no value, so that what follows is an option again
    assert offers(script, "dualout", "sample", "--calibrated", "--see") == ["--seed"]


def test_every_command_and_option_is_in_every_script(scripts: dict[str, str]) -> None:
    for script in scripts.values():
        with open(script, encoding="utf-8") as file:
            text = file.read()
        for name in (*commands(), "learned", "rectifiedflow", "tensorboard", "openvino"):
            assert name in text, name


def test_zsh_reads_its_script(scripts: dict[str, str]) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    code = f'autoload -U compinit; compinit -D; eval "$(cat {scripts["zsh"]})"; print $_comps[dualout]'
    done = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "_shtab_dualout", done.stderr


def test_an_unknown_shell_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fsh"]) == 2
    assert "did you mean 'fish'? Known: bash, fish, zsh" in capsys.readouterr().err
