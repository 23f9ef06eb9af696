import math

import pytest

from dualout.analysis import reading
from dualout.analysis.tables import csv_text, json_text, number, spread


def rows(scores, **others):
    """One row a (method, steps): fd."""
    return [
        {"parameterization": m, "sampler": "ddim", "spacing": "trailing", "steps": k, "fd": fd, "run": m, "images": 500}
        | others
        for (m, k), fd in scores.items()
    ]


def test_cells_hold_means_and_ratios_and_dual_comes_first():
    many = rows({("eps", 5): 4.0, ("dual", 5): 1.0}) + rows({("eps", 5): 8.0, ("dual", 5): 3.0}, seed=1)
    (cell,) = reading.cells(many)
    assert (cell["dual"], cell["eps"]) == (2.0, 6.0)
    assert cell["dual / eps"] == pytest.approx(1 / 3)
    assert cell["spreads"]["dual"].sd == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    ("dual", "verdict"),
    [
        ((0.5, 0.5, 0.5), "is better everywhere"),
        ((2.0, 2.0, 2.0), "is worse everywhere"),
        ((0.5, 0.5, 2.0), "is better in 2 of 3 settings and worse in 1"),
        ((0.5, 2.0, 2.0), "does not win: it is better in 1 of 3 settings and worse in 2"),
        ((1.0, 1.01, 0.99), "does not win: it is better in 0 of 3 settings and worse in 0"),
    ],
)
def test_who_wins(dual, verdict):
    scores = {("dual", k): fd for k, fd in zip((5, 10, 20), dual, strict=True)} | {("eps", k): 1.0 for k in (5, 10, 20)}
    first, *cautions = reading.compare(rows(scores))
    assert verdict in first
    assert f"{math.prod(dual) ** (1 / 3):.2f} in the (geometric) mean" in first
    assert any("500 images, below 10,000" in s for s in cautions)
    assert any("One training each" in s for s in cautions)


def test_cautions_end_where_there_is_enough():
    enough = [
        r | {"images": 50_000, "run": f"{r['run']}-{s}"}
        for s in (0, 1)
        for r in rows({("dual", 5): 1.0, ("eps", 5): 2.0})
    ]
    assert len(reading.compare(enough)) == 1


def test_methods_are_named_by_how_they_were_read():
    row = {"parameterization": "dual", "route": "eps"}
    assert reading.method(row) == "dual (eps route)"
    assert reading.method(row | {"route": "mix", "calibrated": True}) == "dual, calibrated"
    assert reading.method({"method": "ours", "calibrated": True, "route": "eps"}) == "ours, calibrated"
    assert reading.method({"method": "ours", "calibrated": True, "guidance": 0.0}) == "ours, guidance 0, calibrated"


def test_scales_of_guidance_are_not_averaged():
    """They are settings, not seeds; the scale stays with the name, however often rows are named."""
    both = [r for g in (1.0, 2.5) for r in rows({("dual", 5): 4 * g}, guidance=g)]
    (cell,) = reading.cells(reading.named(reading.named(both)))
    assert (cell["dual, guidance 1"], cell["dual, guidance 2.5"]) == (4.0, 10.0)


def test_dual_output_is_compared_whatever_a_grid_calls_it():
    named = {"v": "velocity", "blend": "dual:gate=balanced"}
    both = [r | {"method": r["parameterization"], "parameterization": named[r["parameterization"]]}
            for r in rows({("v", 5): 2.0, ("blend", 5): 1.0})]  # fmt: skip
    assert reading.compare(both)[0].startswith("**blend** against **v**: blend is better everywhere")
    assert reading.cells(both)[0]["blend / v"] == 0.5


def test_another_model_is_compared_before_the_same_one_guided_otherwise():
    both = [r for g in (1.0, 2.0) for r in rows({("velocity", 5): 3.0, ("dual", 5): 1.0 + g}, guidance=g)]
    first, *_, last = [s for s in reading.compare(both) if " against " in s and s.startswith("**")]
    assert first.startswith("**dual, guidance 1** against **velocity, guidance 1**")
    assert last.startswith("**dual, guidance 1** against **dual, guidance 2**")
    assert reading.verdict(both, []) == [first]


def test_tables_are_written_for_every_reader():
    assert csv_text([{"a": 1, "b": [1, 2]}, {"c": "x,y"}]) == 'a,b,c\n1,"[1, 2]",\n,,"x,y"\n'
    assert json_text({"a": math.nan, "b": [math.inf, 1.0]}) == '{\n "a": null,\n "b": [\n  null,\n  1.0\n ]\n}\n'
    assert spread([None, math.nan, 2.0, 4.0]) == (3.0, pytest.approx(math.sqrt(2)), 2)
    assert spread([None]) is None


@pytest.mark.parametrize(
    ("value", "digits", "zeros", "text"),
    [
        (1823.4, 3, False, "1,823"),
        (1000.0, 3, False, "1,000"),
        (123456.0, 4, False, "123,456"),
        (1e-4, 3, False, "0.0001"),
        (260.0, 4, True, "260.0"),
        (260.0, 4, False, "260"),
        (12345.0, 3, True, "12,345"),
        (118.02, 3, True, "118"),
        (1e30, 4, False, "1e+30"),
        (math.nan, 4, True, "nan"),
        (math.inf, 4, True, "inf"),
    ],
)
def test_numbers_are_written_without_powers_of_ten_and_with_their_zeros(value, digits, zeros, text):
    assert number(value, digits, zeros=zeros) == text
