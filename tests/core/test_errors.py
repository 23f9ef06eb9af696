from __future__ import annotations

import pytest

import dualout
from dualout.errors import InputError, first_line, unknown


@pytest.mark.parametrize(
    ("name", "hint"),
    [("ddmi", "; did you mean 'ddim'?"), ("DDIM", "; did you mean 'ddim'?"), ("zzz", "."), (None, "."), (5, ".")],
)
def test_an_unknown_name_lists_the_known_ones(name: object, hint: str) -> None:
    error = unknown("sampler", name, ["heun", "ddim"])
    assert str(error) == f"unknown sampler {str(name)!r}{hint} Known: ddim, heun"
    assert isinstance(error, InputError)


def test_capital_letters_are_kept() -> None:
    assert "did you mean 'DDIMScheduler'?" in str(unknown("scheduler", "ddimscheduler", ["DDIMScheduler"]))


@pytest.mark.parametrize(
    ("error", "line"), [(KeyError("\n"), r"'\n'"), (OSError("\n\n a \nb"), "a"), (EOFError(), "EOFError")]
)
def test_the_first_line_of_what_a_library_says(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_an_input_error_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)
    assert dualout.InputError is InputError
