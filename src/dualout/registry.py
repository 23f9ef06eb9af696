"""Classes found by name.

A kind of thing (schedule, parameterization, sampler, data source …) is an abstract class that derives from
`Registered`. Every concrete class below it is then known by its name: to the command line, to checkpoints and to
the contract tests. Adding one is writing the class; nothing else is edited.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import pkgutil
import re
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

import yaml

from dualout.errors import InputError, unknown


def discover(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that the classes in it are known."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


class Registered:
    """A dataclass that can be named, written down and rebuilt.

    Its written form, the *spec*, is the name followed by the fields that differ from their defaults:
    ``ddim``, ``ddim:eta=0.5``, ``dual:ratio=channel:gate=balanced``. A field may be such a thing itself:
    ``learned:base=dual``, ``learned:base=(dual:ratio=channel)``.
    """

    kind: ClassVar[str] = "thing"
    """What the family is called in messages."""
    name: ClassVar[str]
    """How the class is called in specs; the lower-case class name unless it says otherwise."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names that specs may use, besides the lower-case class name."""
    _types: ClassVar[dict[str, Any]]
    _checked: ClassVar[list[tuple[str, Any, frozenset[type]]]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Names that specs may use for the class with some of its fields set; what a spec says besides is set on top."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()
        if not cls.__module__.startswith(_OURS):
            _check_name(cls)

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """Every concrete class of this family, by name."""
        return {sub.name: sub for sub in cls._concrete()}

    @classmethod
    def _concrete(cls) -> Iterator[type[Self]]:
        for sub in cls.__subclasses__():
            if not _abstract(sub) and dataclasses.is_dataclass(sub):
                yield sub
            yield from sub._concrete()

    @classmethod
    def named(cls, name: str, **fields: Any) -> Self:
        """Build the class called `name` from its fields.

        Raises:
            InputError: for an unknown name, an unknown field, a missing one, or a value of another type.
        """
        kinds = cls.kinds()
        others = {alias: sub for sub in kinds.values() for alias in (sub.__name__.lower(), *sub.aliases)}
        presets = {preset: sub for sub in kinds.values() for preset in sub.presets}
        sub = kinds.get(name) or presets.get(name) or others.get(name.lower())
        if sub is None:
            raise _Unknown(str(unknown(cls.kind, name, [*kinds, *presets])))
        fields = {**sub.presets.get(name, {}), **fields}
        known = {f.name: f for f in dataclasses.fields(sub) if f.init}  # type: ignore[arg-type]
        types = _declared(sub)
        for key in fields:
            if key not in known:
                raise unknown(f"field of {cls.kind} {name!r}:", key, known)
        for key, value in fields.items():
            hint = types.get(key, Any)
            fields[key] = built(hint, as_python(value)) if _registered(hint) else as_python(value)
            _check(cls, name, key, fields[key], hint)
        for key, f in known.items():
            if f.default is f.default_factory is dataclasses.MISSING and key not in fields:
                raise InputError(f"{cls.kind} {name!r} needs a value for {key!r}: write {name}:{key}=…")
        return sub(**fields)

    @classmethod
    def parse(cls, spec: str, **defaults: Any) -> Self:
        """Build from a spec such as ``ddim:eta=0.5``; `defaults` fill the fields that it does not name.

        Raises:
            InputError: for what is no such text, and as `named`.
        """
        if not isinstance(spec, str):
            raise InputError(f"a {cls.kind} is written name:option=value, got {spec!r}")
        # what is in parentheses is another spec, and in path=C:\file the : is not between options
        name, *options = re.split(r":(?![^()]*\))(?<!=[A-Za-z]:(?=[/\\]))", spec.strip())
        fields: dict[str, Any] = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not (equals and value):
                raise InputError(f"cannot read {option!r} in {cls.kind} {spec!r}: options are written key=value")
            fields[key.strip()] = value_of(value.strip())
        return cls.named(name, **(defaults | fields))

    def check_types(self) -> None:
        """Refuse fields of another type than they declare; those that are registered things are the class's affair.

        Numbers of numpy's and torch's become Python's, and paths become text, which can be written down.

        Raises:
            InputError: naming the first such field.
        """
        for key, hint, plain in _checked(type(self)):
            value = getattr(self, key)
            if type(value) not in plain:
                value = as_python(value)
                object.__setattr__(self, key, value)
                _check(type(self), self.name, key, value, hint)

    @property
    def spec(self) -> str:
        """The short written form, which `parse` reads back."""
        return self._written(self.name, {}, lambda thing: thing.spec)

    @property
    def short(self) -> str:
        """The spec as people read it: by the name of a preset, where it has all that this sets. `parse` reads it too;
        a spec goes on to mean the same, should the preset ever set something else."""
        alike = (p for p in self.presets.items() if all(getattr(self, k) == v for k, v in p[1].items()))
        return self._written(*next(alike, (self.name, {})), lambda thing: thing.short)

    def _written(self, name: str, told: Mapping[str, Any], of: Callable[[Registered], str]) -> str:
        """The name, and the fields that it does not tell. Args: of: how a field that is such a thing is written."""
        # what has no default is what it is made of: folder:path=pictures:size=8
        fields = sorted(self.fields().items(), key=lambda item: self._default(item[0]) is not dataclasses.MISSING)
        changed = [f"{k}={_text(v, of)}" for k, v in fields if k not in told and v != self._default(k)]
        return ":".join([name, *changed])

    @classmethod
    def shortened(cls, spec: str) -> str:
        """The short form of a spec, or the text as it is where it is none of a class that is known here."""
        try:
            return cls.parse(spec).short
        except InputError:
            return spec

    def fields(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]

    def config(self) -> dict[str, Any]:
        """The long written form: the name and every field, as plain JSON values."""
        return {"name": self.name} | {k: _plain(v) for k, v in self.fields().items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Rebuild from `config()`.

        Raises:
            InputError: for anything that is not such a dictionary.
        """
        if not isinstance(config, dict) or not isinstance(config.get("name"), str):
            raise InputError(f"a {cls.kind} is written {{'name': …, field: value}}, got {config!r}")
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "name"}
        try:
            return cls.named(config["name"], **fields)
        except _Unknown as error:
            own = "; one of your own is known once its module is imported, as by python MINE.py (docs/guide/extend.md)"
            raise InputError(f"{error}{own}") from error

    def _default(self, key: str) -> Any:
        f = next(f for f in dataclasses.fields(self) if f.name == key)  # type: ignore[arg-type]
        return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


class _Unknown(InputError):
    """A name that no class of a family has."""


_OURS = f"{__name__.partition('.')[0]}."


def _check_name(cls: type[Registered]) -> None:
    """Refuse a class of somebody else by the name of one of ours, which specs and checkpoints would mean by it then."""
    family = [base for base in cls.__mro__ if issubclass(base, Registered)][-2]
    for other in family._concrete():
        names = (other.name, other.__name__.lower(), *other.aliases, *other.presets)
        if other.__module__.startswith(_OURS) and cls.name in names:
            raise InputError(
                f"{cls.kind} {cls.name!r} is dualout's own {other.__name__}: give {cls.__qualname__} another name, or "
                "a class attribute `name`"
            )


def _abstract(cls: type) -> bool:
    # also a class that has no abstract method left, but says that it is only a base
    return inspect.isabstract(cls) or ABC in cls.__bases__


def _plain(value: Any) -> Any:
    """A field as a JSON value; functions and objects of other libraries are named."""
    if isinstance(value, Registered):
        return value.config()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return getattr(value, "__name__", type(value).__name__)


def _declared(cls: type[Registered]) -> dict[str, Any]:
    """The types of a class's fields, by name; kept in the class, which a cache of its own would keep alive."""
    if "_types" not in cls.__dict__:
        try:
            cls._types = get_type_hints(cls)
        except NameError:  # of a class inside a function, whose names are not found
            cls._types = {}
    return cls._types


def _checked(cls: type[Registered]) -> list[tuple[str, Any, frozenset[type]]]:
    """The fields whose types are checked, each with the exact types that need no closer look; kept in the class."""
    if "_checked" not in cls.__dict__:
        types = _declared(cls)
        hints = {f.name: types.get(f.name, Any) for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        cls._checked = [
            (key, hint, frozenset(_exact_types(hint)))
            for key, hint in hints.items()
            if hint is not Any and not _registered(hint)
        ]
    return cls._checked


def _exact_types(hint: Any) -> list[type]:
    if get_origin(hint) in (Union, UnionType):
        return [kind for option in get_args(hint) for kind in _exact_types(option)]
    return [int, float] if hint is float else [hint] if hint in _WORDS and hint not in (list, dict) else []


def as_python(value: Any) -> Any:
    """A number of numpy's or torch's, also in a tuple, as Python's, and a path as text; anything else as it is."""
    if type(value) is tuple:
        return tuple(map(as_python, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _check(cls: type[Registered], name: str, key: str, value: Any, hint: Any) -> None:
    if not fits(value, hint):
        raise InputError(f"{key} of {cls.kind} {name!r} is {described(hint)}; got {value!r}")


def _registered(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Registered)


def built(family: Any, value: Any) -> Any:
    """A thing of a family of registered classes: from its spec, from its config, or the thing itself."""
    if isinstance(value, str):
        return family.parse(value.removeprefix("(").removesuffix(")"))
    return family.from_config(value) if isinstance(value, dict) else value


def value_of(text: str) -> Any:
    """The value that a text in a spec stands for: a number, true, false, null, a list ``[1+2]``, or a word."""
    if text.startswith("[") and text.endswith("]"):
        # the + of an exponent separates nothing
        return tuple(value_of(item) for item in re.split(r"(?<![eE])\+|,", text[1:-1]) if item)
    if "&" in text or "*" in text:  # YAML's aliases, of which a line may stand for gigabytes
        return text
    try:
        value = yaml.safe_load(text)
        # YAML 1.1 takes 1e-05 for a word
        return float(value) if isinstance(value, str) else value
    except (yaml.YAMLError, ValueError):
        return text


def _text(value: Any, of: Callable[[Registered], str]) -> str:
    if isinstance(value, Registered):
        text = of(value)
        return f"({text})" if ":" in text else text
    value = _plain(value)
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{'+'.join(_text(item, of) for item in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read from text is of the type that a field declares."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in arguments)
    if origin in (tuple, list, Sequence):
        items = [a for a in arguments if a is not Ellipsis]
        return isinstance(value, tuple | list) and all(any(fits(v, item) for item in items) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if origin is Callable:
        return callable(value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


_WORDS = {
    int: "a whole number", float: "a number", str: "a name", bool: "true or false", list: "a list", dict: "a mapping",
    type(None): "null",
}  # fmt: skip


def described(hint: Any) -> str:
    """The type that a field declares, in words."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    words = ["a list of numbers" if get_origin(o) in (tuple, Sequence) else _word(get_origin(o) or o) for o in options]
    return " or ".join(word for word in words if word)


def _word(hint: Any) -> str | None:
    return f"a {hint.kind}" if _registered(hint) else _WORDS.get(hint)
