"""Tokens drawn from 1024 rows (8192 on a GPU), all of them masked: LLaDA's step, V = 126464; SEDD's, V = 50257.

The floor reads the rows once.
"""

from functools import partial

import peers
import pytest
import torch
from measure import DEVICE

from fastdiff import reverse_probs, reverse_step, sample_tokens

SHAPE = (8, 1024 if DEVICE.type == "cuda" else 128)
LLADA, GPT2 = 126464, 50257


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def dtype(request):
    return request.param


def rows(num_states, dtype):
    g = torch.Generator(DEVICE).manual_seed(0)
    z = torch.randn(*SHAPE, num_states, generator=g, device=DEVICE, dtype=dtype)
    return z.mul_(2), torch.full(SHAPE, num_states - 1, device=DEVICE)


def floor(z):
    return lambda rates: z.numel() * z.element_size() / rates.read / 1e9


def name(what, dtype):
    return f"{what}, {str(dtype).removeprefix('torch.')}"


def test_llada_step(dtype, compare):
    z, xt = rows(LLADA, dtype)
    calls = {
        "fastdiff": lambda: sample_tokens(z, xt, seed=0),
        "fastdiff, statistics": lambda: sample_tokens(z, xt, seed=0, return_stats=True),
        "fastdiff, greedy, statistics": lambda: sample_tokens(z, xt, seed=0, temperature=0, return_stats=True),
        "LLaDA": lambda: peers.llada_step(z, xt, 1.0),
    }
    compare(name("a token for each mask", dtype), calls, floor(z))


def shaped(kind):
    """Rows whose probability is spread over many ids, falls with the id's rank as words' does, or is one id's."""
    z, xt = rows(GPT2, torch.float32)
    if kind == "language":
        z -= torch.arange(1, GPT2 + 1, device=DEVICE).log()
    if kind == "peaked":
        z.scatter_(-1, torch.randint(GPT2, (*SHAPE, 1), device=DEVICE), 20.0)
    return z, xt


@pytest.mark.parametrize("kind", ["flat", "language", "peaked"])
def test_kept(kind, dtype, compare):
    z, xt = shaped(kind)
    z = z.to(dtype)
    truncations = {"": {}, ", top_k 50": {"top_k": 50}, ", top_p 0.9": {"top_p": 0.9}}
    truncations[", top_k 50, top_p 0.9"] = {"top_k": 50, "top_p": 0.9}
    calls = {f"fastdiff{of}": partial(sample_tokens, z, xt, seed=0, **kept) for of, kept in truncations.items()}
    compare(name(f"a token of {kind} rows", dtype), calls, floor(z))


def test_sedd_analytic(dtype, compare):
    z, xt = rows(GPT2, dtype)
    z -= 12.0
    calls = {
        "fastdiff": lambda: reverse_step(z, xt, 1.0, sigma_next=0.9, seed=0),
        "SEDD": lambda: peers.sedd_analytic(z, xt, 0.1),
    }
    compare(name("SEDD's analytic step", dtype), calls, floor(z))


def test_reverse_probs(dtype, compare):
    z, xt = rows(GPT2, dtype)
    write = z.numel() * 4
    z -= 12.0
    calls = {"fastdiff": lambda: reverse_probs(z, xt, 1.0, sigma_next=0.9)}
    compare(name("reverse_probs", dtype), calls, lambda rates: floor(z)(rates) + write / rates.fresh_fill / 1e9)
