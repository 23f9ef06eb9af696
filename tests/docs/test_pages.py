"""The documentation does what it says: every block of shell and Python in README.md and docs/ is run, as it is written.

A page is one test: its blocks run in order, in an empty folder. ``dualout`` runs in this process, everything else in
bash. What stands in the page is all there is, with three conventions that a reader sees:

- A block whose first line is ``# needs …`` (several GPUs, the Hugging Face Hub, Slurm) is not run. Its Python is
  compiled, and each dualout command in it is parsed and checked, up to where it would begin its work.
- A yaml or Python block whose first line is ``# FILE``, such as ``# grid.yaml``, is that file, and is written.
- The pages of results and the log tell what was done on another day; their commands are parsed, too.

A command that stands anywhere else, in an indented block say, is in `NOT_RUN` with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dualout.cli.main import commands, main
from dualout.cli.options import parse

HOME = Path(__file__).parents[2]
RECORDS = [*sorted((HOME / "docs" / "results").glob("*.md")), HOME / "docs" / "LOG.md"]
PAGES = [HOME / "README.md", *(p for p in sorted((HOME / "docs").rglob("*.md")) if p not in RECORDS)]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.M | re.S)
_FILE = re.compile(r"# ([\w./-]+\.(?:yaml|py))\n")
_COMMANDS = rf"(?:{'|'.join(commands())})\b"
_OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>"}
_STARTS = re.compile(rf"(?:\bdualout|-m dualout(?:\.cli\.main)?) (?={_COMMANDS})")


_INDENTED = re.compile(r"^(?: {4,}|\t)(?:\$ )?((?:dualout|make|python3?|pip|torchrun|accelerate|git) [^#\n]*)", re.M)
NOT_RUN = {
    "make demo": "sets up another environment and takes five minutes; tests/cli/test_demo.py runs a small demo",
    "make test": "is this suite",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    """Where it begins."""

    @property
    def needs(self) -> bool:
        """Whether it says that it needs what is not everywhere."""
        return self.text.startswith("# needs ")

    @property
    def file(self) -> str | None:
        """The file that it is, if it is one."""
        match = _FILE.match(self.text)
        return match[1] if match else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], re.sub(rf"^{m['indent']}", "", m["text"], flags=re.M), text.count("\n", 0, m.start()) + 1)
        for m in _FENCE.finditer(text)
    ]


def lines(block: Block) -> Iterator[str]:
    """The commands of a shell block: those that go over several lines are joined, comments are left out."""
    whole = ""
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        if not whole and (not line.strip() or line.lstrip().startswith("#")):
            continue
        whole += line
        if _closed(whole):
            yield whole.strip()
            whole = ""
        else:
            whole += "\n"
    assert not whole, f"a quotation is not closed: {whole}"


def _closed(text: str) -> bool:
    """Whether every quotation that begins also ends."""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


def check(line: str) -> None:
    """Parse each dualout command of a line, whoever starts it."""
    for match in _STARTS.finditer(line):
        end = r"\)" if line[: match.start()].endswith("$(") else r"(?<!\S)[|>&;]"
        words = re.split(end, line[match.end() :])[0]
        name, *arguments = shlex.split(words, comments=True)
        options = importlib.import_module(f"dualout.cli.{name}").Options
        # a variable of the shell stands for a number or a path; recipes are where a reader has them, in the clone
        with contextlib.chdir(HOME):
            parse(options, name, [re.sub(r"\$\{?\w+\}?", "1", argument) for argument in arguments])


def run(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "dualout" and not set(words) & _OPERATORS:
        try:
            code = main(words[1:])
        except SystemExit as stop:  # of --help and --print_config
            code = stop.code or 0
        assert code == 0, f"exit code {code}: {line}"
        return
    there = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; "
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", there + line], capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {line}\n{done.stderr[-2000:]}"


def perform(page: Path, block: Block, names: dict[str, Any]) -> None:
    """Do what a block says; names are those of the Python of its page."""
    if block.language in ("python", "yaml") and block.file and not block.needs:
        path = Path(block.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        # errors point at the line of the page
        code = compile("\n" * block.line + block.text, str(page), "exec")
        if not block.needs:
            exec(code, names)
    elif block.language == "sh":
        for line in lines(block):
            if block.needs:
                check(line)
            else:
                run(line)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HOME)))
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        try:
            perform(page, block, names)
        except BaseException as error:
            error.add_note(f"in the block of {page.relative_to(HOME)} at line {block.line}")
            raise


def indented(text: str) -> list[str]:
    """The commands in indented blocks."""
    joined = re.sub(r"\\\n\s*", " ", _FENCE.sub("", text))
    return [re.sub(r"\s+", " ", line).strip() for line in _INDENTED.findall(joined)]


@pytest.mark.parametrize("page", RECORDS, ids=lambda page: str(page.relative_to(HOME)))
def test_commands_of_a_record_exist(page: Path) -> None:
    shell = [line for block in blocks(page) if block.language == "sh" for line in lines(block)]
    for line in [*shell, *indented(page.read_text(encoding="utf-8"))]:
        check(line)
        for script in re.findall(r"\bpython3? (\S+\.py)", line):
            assert (HOME / script).is_file(), script


def test_every_command_is_run_or_there_is_a_reason() -> None:
    texts = [page.read_text(encoding="utf-8") for page in [*PAGES, HOME / "CONTRIBUTING.md"]]
    assert {line for text in texts for line in indented(text)} == NOT_RUN.keys()
    assert {block.language for page in PAGES for block in blocks(page)} <= {"sh", "python", "yaml"}
    # a fence without a language says what is printed
    bare = re.compile(r"^ *```\n(.*?)^ *```", re.M | re.S)
    for text in texts:
        for inside in bare.findall(_FENCE.sub("", text)):
            assert not re.search(r"^ *(?:\$ )?(?:dualout|make|python3?) ", inside, re.M), inside
    [targets] = re.findall(r"^\.PHONY: (.+)$", (HOME / "Makefile").read_text(), re.M)
    for target in {t for text in texts for t in re.findall(r"(?:^ +|`)make ([\w-]+)", text, re.M)}:
        assert target in targets.split(), target


def reference(page: Path) -> list[tuple[str, dict[str, Any]]]:
    """What a page of the reference shows: names, with the options that stand below them."""
    found = re.findall(r"^::: ([\w.]+)\n((?: {4}.*\n)*)", page.read_text(encoding="utf-8"), re.M)
    return [(name, (yaml.safe_load(text) or {}).get("options", {}) if text else {}) for name, text in found]


def test_the_reference_shows_what_there_is() -> None:
    pages = [page for page in PAGES if page.parent.name == "api"]
    shown = [entry for page in pages for entry in reference(page)]
    assert len({name for name, _ in shown}) == len(shown)
    for name, options in shown:
        there = pkgutil.resolve_name(name)
        for member in options.get("members") or ():
            assert hasattr(there, member) or member in there.__annotations__, f"{name} has no {member}"
    names = {name for name, _ in shown}
    assert {f"dualout.cli.{command}.Options" for command in commands()} <= names
    # what has a module of its own name is not shown with its package
    for package in ("data", "evaluation", "networks", "parameterizations", "samplers", "training"):
        module = importlib.import_module(f"dualout.{package}")
        assert module.__name__ in names
        hidden = {path.stem for path in Path(str(module.__file__)).parent.glob("*.py")} & set(module.__all__)
        assert {f"{module.__name__}.{name}" for name in hidden} <= names


_PAIR = """
from dataclasses import dataclass

from dualout.parameterizations import Parameterization
from dualout.prediction import Prediction


@dataclass(frozen=True)
class Pair(Parameterization):
    def channels(self, image_channels):
        return 2 * image_channels

    def read(self, raw, x_t, level):
        x0, eps = raw.chunk(2, 1)
        level = level.over(x_t)
        return Prediction(x_t, level, (x0 + (x_t - level.sigma * eps) / level.alpha) / 2, {"x0": x0, "eps": eps})

    def losses(self, prediction, x0, eps):
        truth = {"x0": x0, "eps": eps}
        return {name: (part - truth[name]).square().flatten(1).mean(1) for name, part in prediction.parts.items()}
"""


def test_the_contract_tests_take_the_classes_of_the_guide(tmp_path: Path) -> None:
    for block in blocks(HOME / "docs" / "guide" / "extend.md"):
        if block.file in ("mine.py", "own.py"):
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    (tmp_path / "pair.py").write_text(_PAIR, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = (
        "-m pytest -n 0 -p no:cacheprovider -p mine -p own -p pair tests/contracts "
        "-k 'score or twostep or even-diffusers or even-ddim or (pair and loss)'"
    )
    found = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=HOME, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout
    assert int(re.search(r"(\d+) passed", found.stdout)[1]) >= 40  # type: ignore[index]


def test_a_command_that_is_not_run_is_found() -> None:
    text = "Type\n\n    dualout  sample \\\n        x   # and wait\n\n```sh\n    dualout info\n```\n"
    assert indented(text) == ["dualout sample x"]


def test_what_is_wrong_in_a_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = HOME / "docs" / "index.md"
    wrong = [
        Block("sh", "# needs 8 GPUs\ntorchrun --nproc-per-node 8 -m dualout.cli.main train --stepz 3\n", 1),
        Block("sh", "# needs 8 GPUs\naccelerate launch -m dualout.cli.main train --parameterization dul\n", 1),
        Block("sh", "# needs Slurm\nsrun dualout sample runs/x --images many\n", 1),
        Block("sh", "dualout info nowhere\n", 1),
        Block("sh", "cat nowhere\n", 1),
        Block("python", "# needs a GPU\nx = = 1\n", 1),
        Block("python", "assert 1 == 2\n", 1),
    ]
    for block in wrong:
        with pytest.raises((AssertionError, ValueError, SyntaxError)):
            perform(page, block, {})
    right = "# needs 8 GPUs\nsrun torchrun --nproc-per-node 8 \\\n    -m dualout.cli.main train --steps $N | tee log\n"
    perform(page, Block("sh", right, 1), {})
    perform(page, Block("yaml", "# sub/a.yaml\nsteps: 1\n", 1), {})
    assert Path("sub/a.yaml").read_text().endswith("steps: 1\n")
