"""Masking a batch of 64 x 4096 tokens."""

import peers
import pytest
import torch
from measure import DEVICE

from fastdiff import harmonic_mask, mask_tokens

MASK = 50257


@pytest.fixture(scope="module")
def x0():
    return torch.randint(0, MASK, (64, 4096), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def test_mask_tokens(x0, compare):
    p = torch.rand(len(x0), device=DEVICE)
    calls = {
        "fastdiff": lambda: mask_tokens(x0, p, mask_index=MASK),
        "torch.rand and where": lambda: peers.masked_tokens(x0, p, MASK),
    }
    compare("mask_tokens", calls)


def test_harmonic_mask(x0, compare):
    calls = {
        "fastdiff": lambda: harmonic_mask(x0, mask_index=MASK),
        "multinomial and argsort": lambda: peers.harmonic(x0, MASK),
    }
    compare("harmonic_mask", calls)
