"""Against closed forms, scipy's matrix root, torchmetrics, and the definitions written out."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from dualout.errors import InputError
from dualout.evaluation.metrics import frechet, kid, precision_recall, scores, trace_of_root, trace_of_singular_root
from dualout.evaluation.statistics import Statistics


def gathered(features):
    statistics = Statistics()
    statistics.add(torch.as_tensor(features))
    return statistics


def normal(n, d, seed, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d)) / d**0.5
    return (rng.normal(size=(n, d)) @ mixing) * scale + shift


def rotation(d, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def by_sqrtm(a, b):
    (ma, ca), (mb, cb) = ((x.mean(0), np.cov(x.T)) for x in (a, b))
    return ((ma - mb) ** 2).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)


@pytest.mark.parametrize("d", [1, 3, 40])
def test_frechet_agrees_with_scipys_matrix_root(d):
    a, b = normal(500, d, 0), normal(400, d, 1, scale=2.0, shift=0.3)
    # one feature has a covariance of one number, which numpy makes a scalar
    expected = by_sqrtm(a, b) if d > 1 else (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet(gathered(a), gathered(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_agrees_with_torchmetrics():
    from torchmetrics.image.fid import _compute_fid

    a, b = gathered(normal(300, 64, 0)), gathered(normal(300, 64, 1, shift=0.1))
    theirs = float(_compute_fid(*a.moments, *b.moments))
    assert frechet(a, b) == pytest.approx(theirs, rel=1e-6)


def test_frechet_of_equal_sets_is_zero_and_it_is_symmetric():
    a, b = gathered(normal(90, 30, 0)), gathered(normal(80, 30, 1))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)


def test_frechet_of_known_gaussians():
    # commuting covariances: the roots are those of the eigenvalues
    turn = rotation(6, 2)
    va, vb = np.array([1.0, 2, 3, 4, 5, 6]), np.array([6.0, 1, 1, 9, 0.01, 2])
    expected = va.sum() + vb.sum() - 2 * np.sqrt(va * vb).sum()
    a, b = turn @ np.diag(va) @ turn.T, turn @ np.diag(vb) @ turn.T
    root, error = trace_of_root(a, b)
    assert np.trace(a + b) - 2 * root == pytest.approx(expected, rel=1e-9)
    assert trace_of_singular_root(a, b) == pytest.approx(root, rel=1e-12)
    assert error < 1e-12 * root
    # without the third dimension they are singular, which is noticed
    a, b = (m - turn[:, 2:3] @ turn[:, 2:3].T * v[2] for m, v in ((a, va), (b, vb)))
    root, error = trace_of_root(a, b)
    assert error > 1e-9
    assert trace_of_singular_root(a, b) == pytest.approx(np.sqrt(va * vb).sum() - math.sqrt(va[2] * vb[2]), rel=1e-9)


@pytest.mark.parametrize("turned", [False, True])
def test_small_eigenvalues_are_not_lost_beside_large_ones(turned):
    # as those of the pixels of photos: variances over ten orders of magnitude
    rng, d = np.random.default_rng(0), 120
    scale = 10.0 ** (-5 * np.arange(d) / d)
    a, b = (np.cov((rng.normal(size=(n, d)) * scale @ rotation(d, seed)).T) for n, seed in ((300, 0), (400, turned)))
    root, error = trace_of_root(a, b)
    expected = trace_of_singular_root(a, b)
    assert abs(root - expected) <= error <= 1e-9 * root
    assert root == pytest.approx(expected, rel=1e-12)


def _factor(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.where(values > 1e-10 * max(values[-1], 1e-300), values, 0))


def _root(a, b):
    """tr √(A·B) where both may be singular."""
    return np.linalg.svd(_factor(a).T @ _factor(b), compute_uv=False).sum()


@pytest.mark.parametrize(("rank_a", "rank_b"), [(5, 5), (5, 20), (20, 5), (0, 5), (20, 20)])
def test_singular_covariances_lose_nothing_to_rounding(rank_a, rank_b):
    # features that never leave a subspace: there the distance is that of the few dimensions they have
    a, b = np.zeros((60, 20)), np.zeros((70, 20))
    a[:, :rank_a], b[:, :rank_b] = normal(60, rank_a, 0) if rank_a else 0, normal(70, rank_b, 1)
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * _root(ca, cb)
    turn = rotation(40, 3)[:20]
    assert frechet(gathered(a @ turn), gathered(b @ turn)) == pytest.approx(expected, rel=1e-6)


def test_fewer_images_than_features():
    a, b = normal(20, 50, 0), normal(30, 50, 1)
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * _root(ca, cb)
    assert frechet(gathered(a), gathered(b)) == pytest.approx(expected, rel=1e-9)


def test_a_constant_feature_adds_its_distance_only():
    a, b = normal(100, 4, 0), normal(100, 4, 1)
    more = [gathered(np.hstack([x, np.full((100, 1), c)])) for x, c in ((a, 2.0), (b, 5.0))]
    assert frechet(*more) == pytest.approx(frechet(gathered(a), gathered(b)) + 9, rel=1e-6)


def test_kid_agrees_with_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b = (torch.from_numpy(normal(120, 17, seed, shift=0.2 * seed)) for seed in (0, 1))
    assert kid(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_kid_is_unbiased():
    draws = [kid(*torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 60, 4)))) for seed in range(300)]
    error = np.std(draws) / math.sqrt(len(draws))
    assert abs(np.mean(draws)) < 4 * error
    assert min(draws) < 0 < max(draws)


def test_kid_takes_sets_of_two_sizes_and_does_it_in_blocks(monkeypatch):
    a, b = torch.from_numpy(normal(40, 3, 0)), torch.from_numpy(normal(25, 3, 1))
    k = lambda x, y: (x @ y.T / 3 + 1) ** 3  # noqa: E731
    off = ~torch.eye(40, dtype=torch.bool), ~torch.eye(25, dtype=torch.bool)
    expected = k(a, a)[off[0]].mean() + k(b, b)[off[1]].mean() - 2 * k(a, b).mean()
    monkeypatch.setattr("dualout.evaluation.metrics._ROWS", 7)
    assert kid(a, b) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("rows", [7, 1024])
def test_precision_and_recall_by_definition(rows, monkeypatch):
    monkeypatch.setattr("dualout.evaluation.metrics._ROWS", rows)
    generated, real = (torch.from_numpy(normal(n, 5, seed)) for n, seed in ((60, 0), (80, 1)))

    def share(points, others, k=3):
        among = torch.cdist(others, others).sort(dim=1).values[:, k]
        return float((torch.cdist(points, others) <= among).any(1).double().mean())

    expected = share(generated, real), share(real, generated)
    assert precision_recall(generated, real) == pytest.approx(expected)
    assert 0 < expected[0] < 1


def test_precision_and_recall_of_known_cases():
    rng = np.random.default_rng(0)
    left, right = (torch.from_numpy(rng.normal(size=(200, 2)) + shift) for shift in (0.0, 100.0))
    both = torch.cat([left, right])
    assert precision_recall(left, left) == (1, 1)
    assert precision_recall(left, right) == (0, 0)
    # one of two modes is never made: what is made is good, half of what is real is missing
    precision, recall = precision_recall(left, both)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)


def test_all_scores_of_more_images_than_are_kept():
    a = normal(300, 6, 0)
    few, many = Statistics(kept=100), gathered(a)
    few.add(torch.from_numpy(a))
    found = scores(few, many)
    assert found.keys() == {"fd", "kid", "precision", "recall"}
    assert found["fd"] == pytest.approx(0, abs=1e-9)
    assert found["precision"] == 1
    assert found["recall"] < 1


def test_too_few_images_are_refused():
    x = torch.zeros(3, 2)
    for k, number in ((3, 3), (0, 0), (-1, -1)):
        with pytest.raises(InputError, match=rf"look at {number} neighbours.*got 3"):
            precision_recall(x, x, k)
    with pytest.raises(InputError, match="at least 2"):
        kid(x[:1], x)
    for compare in (kid, precision_recall):
        with pytest.raises(InputError, match=r"features are tensors.*got ndarray"):
            compare(x.numpy(), x.numpy())


def test_features_of_two_networks_are_refused():
    x, y = torch.randn(10, 3), torch.randn(10, 4)
    for compare in (lambda: frechet(gathered(x), gathered(y)), lambda: kid(x, y), lambda: precision_recall(x, y)):
        with pytest.raises(InputError, match="lengths 3 and 4"):
            compare()


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_images_that_are_there_many_times_are_among_themselves(unit):
    # their reach is 0, and in the distances, which are differences of squares, rounding is not
    x = torch.randn(10, 60, generator=torch.Generator().manual_seed(0)).repeat(5, 1) + 3
    x = unit * x.double()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert precision_recall(x, x[order]) == (1.0, 1.0)
    # one that is a thousandth off is not
    assert precision_recall(x + 1e-3 * unit, x[order]) == (0.0, 0.0)


@pytest.mark.filterwarnings("error")
def test_a_generator_that_makes_one_image_is_scored():
    one, many = torch.zeros(20, 4), torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    mean, covariance = many.double().mean(0), torch.cov(many.double().T)
    for a, b in ((one, many), (many, one)):
        assert scores(gathered(a), gathered(b))["fd"] == pytest.approx(
            float(mean.square().sum() + covariance.trace()), rel=1e-6
        )
