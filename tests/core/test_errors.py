from __future__ import annotations

import pytest

import dualout
from dualout.errors import InputError, unknown


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


def test_an_input_error_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)
    assert dualout.InputError is InputError
