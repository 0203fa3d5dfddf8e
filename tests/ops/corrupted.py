"""Tokens, and how far counts are from their law."""

import math

import torch

M = 50


def tokens(batch=3, length=7, seed=0):
    return torch.randint(0, M, (batch, length), generator=torch.Generator().manual_seed(seed))


def chi_square(counts, probabilities):
    """Pearson's statistic in standard deviations from its mean; above 4 is one in many thousands."""
    expected = counts.sum() * probabilities
    assert expected.min() > 5
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))
