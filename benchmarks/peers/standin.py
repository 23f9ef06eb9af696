"""Stand-ins for packages that peers import and, for what is timed here, never use.

torchvision above all: with the CPU build of torch it cannot be imported, and its presence breaks diffusers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

UNUSED = ("torchvision", "omegaconf", "skimage", "clip", "cleanfid", "jsonmerge", "kornia")


class Anything:
    """Can be made and called with whatever is given, and does nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __call__(self, *arguments: Any, **options: Any) -> None: ...


class Standin(ModuleType):
    """A module in which every name is there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Anything,), {}) if name[0].isupper() else importlib.import_module(f"{self.__name__}.{name}")


class _Finder:
    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Standin(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


@contextmanager
def standing_in() -> Iterator[None]:
    """While a peer is imported, what it does not need is there in name; afterwards it is gone again."""
    # these look around for torchvision when they are imported, and are to see the truth
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401

    finder = _Finder([name for name in UNUSED if importlib.util.find_spec(name) is None])
    sys.meta_path.append(finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in [n for n, m in sys.modules.items() if isinstance(m, Standin)]:
            del sys.modules[name]
