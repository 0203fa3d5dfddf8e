"""The permutation of any size: a bijection, as random as a shuffle, and the same everywhere."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.data.permutation import permute

KNOWN = [
    [0, 7, 1, 9, 4, 3, 2, 8, 5, 6],
    [529021136970, 718458615789, 726502163129],
]  # of this code, so that no machine gives others
VAST = [2**31 - 1, 2**32, 2**40 + 3, 2**62 - 1]


def test_a_bijection_of_every_small_size():
    for size in (*range(1, 200), 1023, 1024, 1025, 3000, 4097):
        assert sorted(permute(torch.arange(size), size, seed=5, epoch=size).tolist()) == list(range(size))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**56 - 1))
def test_a_bijection_under_every_key(size, seed, epoch):
    assert sorted(permute(torch.arange(size), size, seed=seed, epoch=epoch).tolist()) == list(range(size))


@pytest.mark.parametrize("size", VAST)
def test_vast_sizes(size):
    near, far = torch.arange(20_000), size - 1 - torch.arange(20_000)
    spread = torch.arange(20_000) * (size // 20_001) + 20_000
    index = torch.cat([near, far, spread]).unique()
    found = permute(index, size, seed=1)
    assert len(found.unique()) == len(index)
    assert found.min() >= 0
    assert found.max() < size
    for part in (permute(near, size, seed=1), permute(far, size, seed=1)):
        counts = torch.histc(part.double() / size, 100, 0, 1)
        assert 55 < ((counts - 200) ** 2 / 200).sum() < 160  # chi-square, 99 degrees of freedom
        assert abs((part % 2).double().mean().item() - 0.5) < 5 * 0.5 / 20_000**0.5
        steps = part.diff().double() / size  # of neighbours: the difference of two uniforms
        assert steps.abs().mean().item() == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_is_as_likely(size):
    n, every = 24_000, list(permutations(range(size)))
    found = permute(torch.arange(size), size, seed=2, epoch=torch.arange(n).unsqueeze(1))
    named = {order: k for k, order in enumerate(every)}
    counts = torch.bincount(torch.tensor([named[tuple(row)] for row in found.tolist()]), minlength=len(every))
    expected, freedom = n / len(every), len(every) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def test_pairs_of_a_middling_size_fall_everywhere():
    """Where two neighbours go, over many epochs: 36 x 35 ordered pairs."""
    n, size = 60_000, 36
    found = permute(torch.tensor([7, 8]), size, seed=3, epoch=torch.arange(n).unsqueeze(1))
    counts = torch.bincount(found[:, 0] * size + found[:, 1], minlength=size**2).view(size, size)
    assert counts.diagonal().sum() == 0
    expected, freedom = n / (size * (size - 1)), size * (size - 1) - 1
    others = counts[~torch.eye(size).bool()]
    assert abs(((others - expected) ** 2 / expected).sum() - freedom) < 5 * math.sqrt(2 * freedom)


def test_known_answers():
    assert permute(torch.arange(10), 10, seed=7).tolist() == KNOWN[0]
    assert permute(torch.arange(3), 2**40 + 3, seed=-1, epoch=2**40).tolist() == KNOWN[1]


def test_values_do_not_depend_on_what_is_asked_beside_them():
    whole = permute(torch.arange(1000), 1000, seed=1, epoch=4)
    some = torch.tensor([[3, 999], [7, 0]])
    assert torch.equal(permute(some, 1000, seed=1, epoch=4), whole[some])
    mixed = permute(torch.tensor([3, 3]), 1000, seed=1, epoch=torch.tensor([4, 5]))
    assert mixed[0] == whole[3]
    assert mixed[1] == permute(torch.tensor(3), 1000, seed=1, epoch=5)
    assert permute(torch.arange(0), 10, seed=1).shape == (0,)


def test_seeds_and_epochs_count():
    names = [(0, 0), (1, 0), (2**32, 0), (-1, 0), (0, 1), (0, 2**24), (0, 2**32), (0, 2**55)]
    assert len({tuple(permute(torch.arange(50), 50, seed=s, epoch=e).tolist()) for s, e in names}) == len(names)


@pytest.mark.parametrize(
    ("index", "size", "text"),
    [
        ([0], 0, "size: expected at least 1, got 0"),
        ([0], 2**62, r"size: expected a number below 2\^62"),
        ([1, 5], 5, r"index: expected values in \[0, 5\), got 1 to 5"),
        ([-1, 2], 5, r"index: expected values in \[0, 5\), got -1 to 2"),
    ],
)
def test_bad_input(index, size, text):
    with pytest.raises(ValueError, match=text):
        permute(torch.tensor(index), size, seed=0)
