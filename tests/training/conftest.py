"""A run that tests look at, and go on with in copies."""

from __future__ import annotations

import pytest

from runs import trained


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    trained(out)
    return out
