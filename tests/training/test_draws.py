"""What is random is a function of the seed and the sample."""

from __future__ import annotations

import numpy as np
import torch

from dualout.training import draws

G = np.arange(20_000)


def test_each_sample_alone_draws_what_it_draws_in_a_batch():
    some = np.array([3, 17, 4096])
    assert np.array_equal(draws.times(0, G, 1000)[some], draws.times(0, some, 1000))
    assert torch.equal(draws.noise(0, G[:20], (1, 4, 4))[17], draws.noise(0, np.array([17]), (1, 4, 4))[0])
    assert np.array_equal(draws.withheld(0, G, 0.3)[some], draws.withheld(0, some, 0.3))


def test_seeds_and_samples_differ():
    assert not np.array_equal(draws.times(0, G, 1000), draws.times(1, G, 1000))
    noise = draws.noise(0, G[:100], (1, 8, 8)).flatten(1)
    assert len(torch.unique(noise[:, 0])) == 100


def test_times_are_uniform():
    counts = np.bincount(draws.times(5, G, 10), minlength=10)
    # 2000 each, with a standard deviation of 42
    assert len(counts) == 10
    assert np.abs(counts - 2000).max() < 5 * 42


def test_noise_is_standard_normal_and_not_of_the_times():
    noise = draws.noise(3, G[:2000], (1, 8, 8))
    assert abs(float(noise.mean())) < 5 / np.sqrt(noise.numel())
    assert abs(float(noise.var()) - 1) < 5 * np.sqrt(2 / noise.numel())
    means, times = noise.mean((1, 2, 3)).numpy(), draws.times(3, G[:2000], 1000)
    assert abs(np.corrcoef(means, times)[0, 1]) < 5 / np.sqrt(2000)


def test_share_of_withheld_classes():
    assert abs(draws.withheld(0, G, 0.1).mean() - 0.1) < 5 * np.sqrt(0.09 / len(G))
    assert not draws.withheld(0, G, 0.0).any()
    assert draws.withheld(0, G, 1.0).all()


def test_seeds_of_dropout_are_each_samples_own_and_what_torch_takes():
    found = [draws.dropout(seed, g) for seed in (0, 1) for g in range(500)]
    assert len(set(found)) == 1000
    assert all(0 <= seed < 2**63 for seed in found)
    assert max(found) > 2**62


def test_values_are_fixed_for_good():
    # resumed runs rely on them
    assert draws.times(0, G[:6], 1000).tolist() == [573, 746, 270, 96, 933, 388]
    assert np.flatnonzero(draws.withheld(0, G[:30], 0.2)).tolist() == [3, 10, 17, 21]
    assert draws.dropout(0, 5) == 4957988460414475902
