"""Masking a batch of 64 x 4096 tokens (on a GPU 256 x 4096, also 20 times in a CUDA graph: without Python's part).

The floor reads the tokens once and writes them and their mask once.
"""

from functools import partial

import peers
import pytest
import torch
from measure import DEVICE

from fastdiff import harmonic_mask, mask_tokens

MASK = 50257
SHAPE = (256 if DEVICE.type == "cuda" else 64, 4096)


@pytest.fixture(scope="module")
def x0():
    return torch.randint(0, MASK, SHAPE, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def floor(x0, rates):
    return x0.numel() * (8 + 8 + 1) / rates.copy / 1e9


def test_mask_tokens(x0, compare):
    p = torch.rand(len(x0), device=DEVICE)
    calls = {
        "fastdiff": lambda: mask_tokens(x0, p, mask_index=MASK),
        "torch.rand and where": lambda: peers.masked_tokens(x0, p, MASK),
    }
    compare("mask_tokens", calls, partial(floor, x0), graph=20)


def test_harmonic_mask(x0, compare):
    calls = {
        "fastdiff": lambda: harmonic_mask(x0, mask_index=MASK),
        "multinomial and argsort": lambda: peers.harmonic(x0, MASK),
    }
    compare("harmonic_mask", calls, partial(floor, x0), graph=20)
