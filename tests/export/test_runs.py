import json

import pytest
import torch

from dualout.errors import InputError
from dualout.export.runs import restored, shortened


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([-120.0, 0.1, 2.5]).repeat_interleave(torch.tensor([500, 300, 200])),
        torch.randn(1000, generator=torch.Generator().manual_seed(0)),
        torch.zeros(3, 2),
        torch.tensor(1.5),
        torch.zeros(1),
    ],
)
def test_tables_come_back_to_the_bit(values):
    written = json.loads(json.dumps(shortened(values)))
    assert torch.equal(restored(written, values.numel()), values)


def test_a_gate_of_few_steps_is_a_few_numbers():
    assert shortened(torch.zeros(1000)) == {"runs": [[1000, 0.0]]}


@pytest.mark.parametrize(
    "written",
    [{"runs": [[10**12, 0.0]]}, {"runs": [[-1, 0.0], [4, 0.0]]}, {"runs": []}, {"runs": [[2]]}, {}, "x", [[1], [1, 2]]],
)
def test_what_is_damaged_is_told(written):
    with pytest.raises(InputError, match="a table of numbers is damaged"):
        restored(written, 3)
