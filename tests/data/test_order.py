import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dualout.data.order import flips, indices


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(-(2**63), 2**64), n=st.integers(1, 3000), epoch=st.integers(0, 10**6))
@example(seed=0, n=10, epoch=0)  # one more than a square
def test_an_epoch_sees_every_image_once(seed, n, epoch):
    assert np.array_equal(np.sort(indices(seed, n, epoch * n, n)), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 500), start=st.integers(0, 10**7), count=st.integers(0, 2000), cut=st.integers(0, 2000))
def test_any_sample_can_be_asked_for_alone(n, start, count, cut):
    cut = min(cut, count)
    whole = indices(3, n, start, count)
    parts = np.concatenate([indices(3, n, start, cut), indices(3, n, start + cut, count - cut)])
    assert whole.dtype == np.int64
    assert np.array_equal(whole, parts)


def test_epochs_and_seeds_differ():
    n = 1000
    orders = [indices(0, n, 0, n), indices(0, n, n, n), indices(1, n, 0, n)]
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            # two random permutations agree in one place on average
            assert (a == b).sum() < 10


@pytest.mark.parametrize("n", [2, 3, 5, 8, 17, 30])
def test_every_image_is_as_likely_in_every_place(n):
    epochs = 6000
    orders = indices(11, n, 0, n * epochs).reshape(epochs, n)
    counts = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    # each row of counts is multinomial, and so is each column: (n − 1)² degrees of freedom, in epochs/n a cell
    chi2, freedom = ((counts - epochs / n) ** 2 / (epochs / n)).sum(), (n - 1) ** 2
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_neighbours_are_unrelated():
    n = 10_000
    order = indices(5, n, 0, n).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
    assert abs(np.corrcoef(order, indices(5, n, n, n))[0, 1]) < 0.05


def test_a_huge_set_costs_no_more_than_a_small_one():
    found = indices(0, 10**12, 7 * 10**12 - 3, 6)
    assert len(set(found.tolist())) == 6
    assert found.min() >= 0
    assert found.max() < 10**12


def test_half_of_the_samples_are_mirrored_independently_of_the_order():
    mirrored = flips(0, np.arange(100_000))
    assert abs(mirrored.mean() - 0.5) < 0.01
    assert np.array_equal(flips(0, np.arange(500, 600)), mirrored[500:600])
    assert (flips(1, np.arange(100_000)) == mirrored).mean() == pytest.approx(0.5, abs=0.01)


def test_the_order_is_fixed_for_good():
    # resumed runs rely on it
    assert indices(0, 9, 0, 9).tolist() == [8, 5, 3, 4, 7, 1, 0, 2, 6]
    assert indices(3, 1000, 2**40, 6).tolist() == [673, 711, 621, 797, 263, 798]
    assert np.flatnonzero(flips(0, np.arange(16))).tolist() == [1, 2, 3, 5, 6, 9, 10, 14, 15]


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="n >= 1"):
        indices(0, 0, 0, 1)
