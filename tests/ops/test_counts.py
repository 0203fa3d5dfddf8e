"""Counts of masks, weights and times."""

import pytest
import torch
from corrupted import chi_square

from fastdiff import (
    reference,
    sample_mask_counts,
    sample_times,
)
from fastdiff.philox import Purpose, draw32


@pytest.mark.parametrize("proposal", ["harmonic", "uniform"])
def test_count_laws_and_weights(proposal):
    counts, weights = sample_mask_counts(200_000, 12, proposal=proposal, seed=9)
    law = reference.count_law(12, proposal)
    assert chi_square(torch.bincount(counts, minlength=13)[1:], law) < 4
    torch.testing.assert_close(weights, 1 / (counts * law[counts - 1]))


def test_stratified_counts():
    counts, weights = sample_mask_counts(6, torch.tensor([12, 1, 100]), seed=1)
    assert counts.shape == weights.shape == (3, 6)
    assert torch.equal((counts[0] - 1) // 2, torch.arange(6))
    assert (counts[1] == 1).all()
    many = torch.stack([sample_mask_counts(5, 12, seed=s)[0] for s in range(1000)])
    counts = torch.bincount(many.flatten(), minlength=13)[1:].double()
    assert (counts / counts.mean() - 1).abs().max() < 0.15
    torch.testing.assert_close(sample_mask_counts(5, 12, seed=3)[1], 12 / many[3].double())


@pytest.mark.parametrize(("n", "length"), [(70_000, 32_768), (1000, 2**31 + 7), (3, 2**61)])
def test_counts_are_exact_at_any_size(n, length):
    draws = draw32(1, Purpose.COUNT, 0, 0, 0, torch.arange(n)).tolist()
    expected = [1 + ((j << 32) + draw) * length // (n << 32) for j, draw in enumerate(draws)]
    assert sample_mask_counts(n, length, seed=1)[0].tolist() == expected
    expected = [1 + (draw * length >> 32) for draw in draws]
    assert sample_mask_counts(n, length, proposal="uniform", seed=1)[0].tolist() == expected


def test_many_harmonic_counts_of_long_sequences_need_little_memory():
    """A table of harmonic numbers for each sequence, not for each count."""
    counts, weights = sample_mask_counts(100_000, 100_000, proposal="harmonic", seed=1)
    assert counts.min() == 1
    assert 0 < counts.max() <= 100_000
    assert weights.shape == counts.shape


def test_times():
    times = sample_times(8, eps=0.1, seed=0)
    assert torch.equal(((times - 0.1) / 0.9 * 8).floor(), torch.arange(8.0))
    ranks = [sample_times(4, eps=0.1, seed=0, rank=r, world_size=2) for r in range(2)]
    assert torch.equal(torch.cat(ranks), times)
    pairs = sample_times(7, method="antithetic", eps=0, seed=1)
    torch.testing.assert_close(pairs[0:6:2] + pairs[1:6:2], torch.ones(3))
    many = sample_times(10_000, method="iid", eps=1e-3, seed=2)
    assert many.min() >= 1e-3
    assert chi_square(torch.histc(many, 20, 1e-3, 1), torch.full((20,), 0.05)) < 4
