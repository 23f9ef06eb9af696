"""A command's options are a dataclass: its fields are the flags, the keys of --config's YAML, and the help."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import jsonargparse
import yaml

from dualout.errors import InputError, unknown
from dualout.files import refuse_others, sweep
from dualout.registry import described, fits

Options = TypeVar("Options")

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(options: type[Options], command: str, arguments: list[str], description: str | None = None) -> Options:
    """Read a command's arguments.

    Args:
        options: a dataclass. Fields are flags (``--batch_size 64``) unless their metadata says ``positional=True``, or
            ``positional=True, commas=True`` where several are one text; each has a docstring beneath it, which is its
            help.
        command: its name.
        arguments: what was typed after it.
        description: what --help says above the options.

    ``--config FILE.yaml`` reads fields from a file, flags override it, and ``--print_config`` prints what results.

    Raises:
        InputError: for anything that cannot be read.
    """
    parser, kinds = _reader(options, command, description), types(options)
    _check_flags(parser, command, arguments)
    arguments = _spell_switches(options, _spell_negatives(arguments))
    for flag, value in pairwise([*arguments, ""]):
        if flag.partition("=")[0] == "--config":
            _check_file(Path(flag.partition("=")[2] or value))
    arguments = _spell_texts(kinds, arguments)
    try:
        namespace = parser.parse_args(arguments)
        instantiated: Any = parser.instantiate(namespace)
        values = instantiated.as_dict()
    except _Unread as error:
        raise _told(str(error), options, command) from error.__cause__
    except (jsonargparse.ArgumentError, yaml.YAMLError, TypeError, RecursionError) as error:
        raise InputError(f"{_first(str(error))}\nSee dualout {command} --help") from error
    values.pop("config", None)
    values.pop("print_config", None)
    for name, kind in kinds.items():
        # which YAML makes of a value that was forgotten
        if values.get(name, "") is None and not fits(None, kind):
            raise InputError(f"{name} is {described(kind)}; got null\nSee dualout {command} --help")
    return options(**values)


def _reader(options: type, command: str, description: str | None) -> _Parser:
    """What reads a command's arguments: a flag, or an argument by position, for each field of its options."""
    text = description and _unmarked(description)
    parser = _Parser(prog=f"dualout {command}", description=text, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file with any of these options; flags override it")
    # which comes with --config
    printing = next(a for a in parser._actions if "--print_config" in a.option_strings)
    printing.help = "Print what results as YAML, and stop; =skip_default leaves out what is as by default"
    # not add_class_arguments: jsonargparse would import all that is imported for type checkers alone, torch with it
    flags = parser.add_argument_group(_unmarked(options.__doc__ or "").rstrip("."))
    helps, kinds = attribute_help(options), types(options)
    for f in dataclasses.fields(options):  # type: ignore[arg-type]
        kind = kinds[f.name]
        given: dict[str, Any] = {"help": helps.get(f.name)}
        if f.default_factory is not dataclasses.MISSING:
            given["default"] = f.default_factory()
        elif f.default is not dataclasses.MISSING:
            given["default"] = f.default
        if not f.metadata.get("positional"):
            flags.add_argument(f"--{f.name}", type=kind, **given)
            continue
        optional = "default" in given
        if get_origin(kind) is list:
            # one or more
            (kind,) = get_args(kind)
            given["nargs"] = "*" if optional else "+"
        elif optional:
            given["nargs"] = "?"
        parser.add_argument(f.name, type=kind, **given)
    return parser


_TRUTHS = ("true", "false", "True", "False", "yes", "no", "null")


def _spell_negatives(arguments: Sequence[str]) -> list[str]:
    """``--seeds -1,0`` as ``--seeds=-1,0``: argparse takes for a flag what begins as one and is no plain number."""
    found: list[str] = []
    for argument in arguments:
        if re.match(r"-\.?\d", argument) and found and re.fullmatch(r"--\w+", found[-1]):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def _spell_switches(options: type, arguments: Sequence[str]) -> list[str]:
    """``--flag`` alone means true where the field is a bool; jsonargparse wants the word."""
    switches = {f"--{name}" for name, kind in types(options).items() if fits(True, kind)}
    following = [*arguments[1:], ""]
    return [
        f"{argument}=true" if argument in switches and after not in _TRUTHS else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def _spell_texts(kinds: dict[str, Any], arguments: Sequence[str]) -> list[str]:
    """A file may say ``steps: 5`` or ``steps: [5, 10]`` where the field is a text that a flag writes as 5,10."""
    found = list(arguments)
    for k, (flag, after) in enumerate(pairwise([*arguments, ""])):
        name, _, told = flag.partition("=")
        if name != "--config":
            continue
        try:
            options = yaml.safe_load(Path(told or after).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            continue  # which is told where it is read
        if not isinstance(options, dict):
            continue
        texts = {key: _text(value, kinds[key]) for key, value in options.items() if key in kinds}
        if any(texts[key] is not options[key] for key in texts):
            found[k if told else k + 1] = "--config=" * bool(told) + json.dumps(options | texts)
    return found


def _text(value: Any, kind: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    scalars = all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items)
    return ",".join(map(str, items)) if scalars and not fits(value, kind) and fits("", kind) else value


def types(options: type) -> dict[str, Any]:
    """The type of each field."""
    import typing

    return typing.get_type_hints(options)


def attribute_help(options: type) -> dict[str, str]:
    """The docstring beneath each field, also of those that are inherited."""
    import docstring_parser

    parsed = [docstring_parser.parse_from_object(c) for c in reversed(options.__mro__) if dataclasses.is_dataclass(c)]
    return {p.arg_name: " ".join((p.description or "").split()) for one in parsed for p in one.params}


class _Unread(InputError):
    """What jsonargparse says of arguments that it cannot read."""


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise _Unread(message) from ex


_FORMS = {list: ", written [a, b]", tuple: ", written [a, b]", dict: ", written {name: value}"}


def _told(message: str, options: type, command: str) -> InputError:
    """jsonargparse's message in the words of the flags, where it speaks of Python's types."""
    key, value = re.match(r'Parser key "(\w+)":\s*(.*)', message), re.search(r"(?:Got|Given) value: (.*)", message)
    if key and key[1] == "config":
        return InputError(f"--config: {key[2]}")
    if key and value and (kind := types(options).get(key[1])):
        form = _FORMS.get(get_origin(kind), "")
        return InputError(f"--{key[1]} is {described(kind)}{form}; got {value[1]}")
    if text := re.match(r"Unexpected config: (.*)", message):
        return InputError(
            f"--config is a YAML file of lines such as seed: 0, one an option; got {text[1] or 'nothing'}"
        )
    if name := re.match(r"Option '(.*)' is not accepted", message):
        return unknown(f"option of dualout {command}:", name[1], types(options))
    if missing := re.match(r"the following arguments are required: (\w+)", message):
        what = attribute_help(options)[missing[1]]
        return InputError(f"{missing[1]} is missing: {what[0].lower()}{what[1:]}")
    commas = [f.name for f in dataclasses.fields(options) if f.metadata.get("commas")]
    if commas and re.match(r"unrecognized arguments: [^-]", message):
        return InputError(f"{_first(message)}; several {commas[0]} are written with commas between, and no space")
    if message.startswith("unrecognized arguments: "):
        return InputError(f"{_first(message)}; options are written --name value: see dualout {command} --help")
    return InputError(_first(message))


def _unmarked(text: str) -> str:
    """A docstring's Markdown as it is read in a terminal."""
    return text.replace("``", "")


def _check_flags(parser: jsonargparse.ArgumentParser, command: str, arguments: Sequence[str]) -> None:
    """Refuse an unknown flag with the nearest known one, which argparse does not tell."""
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        if argument == "--":
            return
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag not in known and not flag.startswith("--print_config"):
            raise unknown(f"option of dualout {command}:", flag, known)


_MOST = 100_000
"""Values in a file of options."""


def _check_file(file: Path) -> None:
    """Refuse YAML that says something twice, of which the second would count.

    And YAML whose aliases stand for far more than is written: each may hold several of the one before.
    """
    sizes: dict[int, int] = {}
    twice: list[str] = []

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 1  # also of one that holds itself
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                twice.extend(name for name, many in Counter(str(key.value) for key, _ in inner).items() if many > 1)
            sizes[id(node)] += sum(size(n) for part in inner for n in (part if isinstance(part, tuple) else (part,)))
        return sizes[id(node)]

    try:
        written = size(yaml.compose(file.expanduser().read_text(encoding="utf-8"), yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return  # which is told where it is read
    if written > _MOST:
        raise InputError(f"--config: {file} stands for {written} values, more than the {_MOST} that are read")
    if twice:
        raise InputError(f"--config: {file} says {twice[0]} twice")


def _first(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " ".join(lines[:6])


def out_directory(path: str | Path, *, holds: str, marker: str) -> Path:
    """A directory for results: new, empty, or one that this command made before (which has `marker` in it).

    Raises:
        InputError: when it holds something else.
    """
    directory = Path(path).expanduser()
    if not (directory / marker).exists():
        refuse_others(directory, f"{holds} go to a new or empty directory")
    sweep(directory)
    return directory


def listed(text: str) -> list[str]:
    """A comma-separated list."""
    return [item.strip() for item in text.split(",") if item.strip()]
