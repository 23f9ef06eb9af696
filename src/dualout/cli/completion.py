"""Print a shell completion script (bash, zsh or fish), for commands, options and values.

bash: eval "$(dualout completion bash)" in ~/.bashrc. zsh: eval "$(dualout completion zsh)" in ~/.zshrc, after
compinit. fish: dualout completion fish > ~/.config/fish/completions/dualout.fish.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from dualout.cli.main import commands
from dualout.cli.options import attribute_help, parse, types
from dualout.errors import unknown

SHELLS = ("bash", "zsh", "fish")
_DIRECTORIES = ("run", "runs", "source", "out", "cache", "init")


@dataclass(kw_only=True)
class Options:
    """The options of ``dualout completion``."""

    shell: str = field(metadata={"positional": True})
    """bash, zsh or fish"""


def run(arguments: list[str]) -> int | None:
    """Run the command."""
    options = parse(Options, "completion", arguments, __doc__)
    if options.shell not in SHELLS:
        raise unknown("shell", options.shell, SHELLS)

    import shtab

    print(shtab.complete(_parser(), options.shell))
    return None


def _parser() -> argparse.ArgumentParser:
    """Every command with its options, for a library that knows argparse's parsers only."""
    from shtab import DIRECTORY, FILE

    values = _values()
    parser = argparse.ArgumentParser(prog="dualout")
    parser.add_argument("--version", action="store_true", help="the version")
    below = parser.add_subparsers()
    for command, text in commands().items():
        options = importlib.import_module(f"dualout.cli.{command}").Options
        one = below.add_parser(command, help=_short(text))
        one.add_argument("--config", help="a YAML file with any of these options").complete = FILE  # type: ignore[attr-defined]
        one.add_argument("--print_config", action="store_true", help="print the configuration that results, and stop")
        helps = attribute_help(options)
        for f in dataclasses.fields(options):
            positional = bool(f.metadata.get("positional"))
            flag = {"action": "store_true"} if types(options)[f.name] is bool else {}
            name = f.name if positional else f"--{f.name}"
            action = one.add_argument(name, help=_short(helps.get(f.name, "")), **flag)  # type: ignore[arg-type]
            if f.name in _DIRECTORIES:
                action.complete = DIRECTORY  # type: ignore[attr-defined]
            elif f.name in values and not flag:
                action.choices = list(values[f.name])
    return parser


def _values() -> dict[str, Iterable[str]]:
    """What may stand after an option, by its name; options and paths may follow in the value itself."""
    from dualout.data.base import Source
    from dualout.evaluation.features import Features
    from dualout.networks.backbones import Backbone
    from dualout.networks.backends import AUTO, Backend
    from dualout.parameterizations import Parameterization
    from dualout.samplers import SPACINGS, Sampler
    from dualout.schedules import Schedule
    from dualout.training.config import PRECISIONS, TRACKERS

    routes = ("mix", "eps", "x0", "velocity", "flow")
    return {
        "data": Source.kinds(), "network": Backbone.kinds(), "parameterization": Parameterization.kinds(),
        "schedule": Schedule.kinds(), "sampler": Sampler.kinds(), "samplers": Sampler.kinds(),
        "features": Features.kinds(), "spacing": SPACINGS, "spacings": SPACINGS, "route": routes, "routes": routes,
        "precision": PRECISIONS, "backend": (AUTO, *Backend.kinds()), "track": TRACKERS,
        "device": ("auto", "cpu", "cuda", "mps"), "shell": SHELLS,
    }  # fmt: skip


def _short(text: str) -> str:
    """One line, without what a shell or argparse would read as its own."""
    line = text.partition(";")[0].replace("%", "%%")
    return line if len(line) <= 100 else line[:99] + "…"
