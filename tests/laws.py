"""Laws over short strings, and whether samples come from one."""

import itertools
import math

import torch


def agrees(x, law, num_states):
    """Whether strings x [n, L] come from a law [num_states^L] over strings in the order of `strings`: a chi-square
    test at 0.1%, by Wilson and Hilferty's quantile, of cells that expect five or more, the others pooled."""
    digits = num_states ** torch.arange(x.shape[1] - 1, -1, -1)
    counts, expected = (x @ digits).bincount(minlength=len(law)).double(), law.double() * len(x)
    rare = expected < 5
    counts, expected = (torch.cat((v[~rare], v[rare].sum().view(1))) for v in (counts, expected))
    if expected[-1] < 1e-6:
        assert counts[-1] == 0
        counts, expected = counts[:-1], expected[:-1]
    freedom = len(expected) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    return ((counts - expected) ** 2 / expected).sum().item() < limit


def strings(num_states, length):
    return torch.tensor(list(itertools.product(range(num_states), repeat=length)))
