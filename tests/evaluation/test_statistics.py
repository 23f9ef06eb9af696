import pytest
import torch

from dualout.errors import InputError
from dualout.evaluation.statistics import Statistics


def gathered(features, batch=7, kept=50):
    statistics = Statistics(kept)
    for rows in features.split(batch):
        statistics.add(rows)
    return statistics


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    # means far from 0 next to variances of 1: what sums of squares suffer from most
    return torch.randn(101, 5, generator=generator) + torch.tensor([0.0, 1.0, 10.0, 100.0, -300.0])


def test_moments_are_those_of_all_rows_at_once(features):
    mean, covariance = gathered(features).moments
    assert torch.allclose(mean, features.double().mean(0), rtol=1e-12)
    assert torch.allclose(covariance, torch.cov(features.double().T), rtol=1e-8, atol=1e-9)
    assert mean.dtype == covariance.dtype == torch.float64


def test_merging_parts_is_one_pass(features):
    whole, parts = gathered(features), Statistics(50)
    for part in features.tensor_split((13, 40, 41)):
        parts.merge(gathered(part))
    parts.merge(Statistics())
    assert parts.count == whole.count == 101
    for a, b in zip(parts.moments, whole.moments, strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-9)
    assert torch.equal(parts.features, whole.features)
    assert torch.equal(whole.features, features[:50])


def test_features_far_from_zero_lose_nothing(features):
    far = features.double() + 1e7
    parts = gathered(far[:30])
    parts.merge(gathered(far[30:]))
    for found in (gathered(far), parts):
        torch.testing.assert_close(found.moments[1], torch.cov(far.T), rtol=1e-7, atol=1e-8)


def test_what_was_known_is_brought_up_to_date(features):
    statistics = gathered(features[:50])
    before = statistics.moments[0]
    statistics.add(features[50:])
    assert not torch.equal(before, statistics.moments[0])
    assert torch.allclose(statistics.moments[0], features.double().mean(0))


def test_written_and_read(features):
    statistics = gathered(features)
    again = Statistics.from_tensors(statistics.tensors())
    assert again.count == 101
    assert torch.equal(again.moments[1], statistics.moments[1])
    assert torch.equal(again.features, statistics.features)
    again.add(features)
    assert again.count == 202
    assert len(again.features) == 50


def test_refusals(features):
    with pytest.raises(InputError, match="images 101 to 102 hold NaN"):
        gathered(features).add(torch.tensor([[1.0] * 5, [float("nan")] * 5]))
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        gathered(features[:1]).moments
    with pytest.raises(InputError, match=r"\(B, D\), got a Tensor of shape torch.Size\(\[2, 5, 1, 1\]\)"):
        Statistics().add(torch.zeros(2, 5, 1, 1))
    with pytest.raises(InputError, match="length 4 came after some of length 5"):
        gathered(features).add(torch.zeros(2, 4))
    with pytest.raises(InputError, match="length 4 came after some of length 5"):
        gathered(features).merge(gathered(torch.zeros(2, 4)))
