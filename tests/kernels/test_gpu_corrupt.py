"""The forward process of the GPU backends: bit for bit what the compiled CPU kernels give for the same names."""

from functools import partial

import pytest
import torch

from fastdiff import Uniform, corrupt, harmonic_mask, mask_exactly, mask_tokens

M = 50


def _to(where, tensor):
    return tensor.to(where)


def equal(backend, call, device):
    """Asserts that a backend on the device and the CPU kernels agree."""
    results = []
    for b, where in ((backend, device), ("cpu", "cpu")):
        result = call(b, partial(_to, where))
        results.append([result] if torch.is_tensor(result) else [t for t in result if torch.is_tensor(t)])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got.cpu(), expected)


def names(g, batch):
    """A seed, a step and sample ids, small and so large that they need another key."""
    large = bool(torch.rand((), generator=g) < 0.5)
    seed = int(torch.randint(-(2**62), 2**62, (), generator=g))
    step = int(torch.randint(0, 2**30 if large else 9, (), generator=g))
    return dict(seed=seed, step=step), torch.randint(0, 2**62 if large else 99, (batch,), generator=g)


# Lengths about those of a group of draws, of a block and of several.
@pytest.mark.parametrize(
    ("batch", "length", "share"),
    [(9, 1, 1.0), (9, 7, 0.2), (9, 64, 1.0), (9, 64, 0.2), (2, 1023, 0.2), (2, 1025, 1.0), (1, 4100, 0.2)],
)
def test_masks_of_rows(batch, length, share, backend, device):
    g = torch.Generator().manual_seed(length)
    named, ids = names(g, batch)
    x0 = torch.randint(0, M, (batch, length), generator=g)
    maskable = (torch.rand(batch, length, generator=g) < share).index_fill(1, torch.tensor([0]), True)
    counts = (torch.rand(batch, generator=g) * (maskable.sum(1) + 1)).long()
    each, one = torch.rand(batch, length, generator=g), torch.rand(batch, generator=g)

    def options(b, to):
        return dict(mask_index=M, sample_ids=to(ids), maskable=to(maskable), backend=b, **named)

    equal(backend, lambda b, to: mask_tokens(to(x0), to(each), **options(b, to)), device)
    equal(backend, lambda b, to: mask_tokens(to(x0), to(one), **options(b, to)), device)
    equal(backend, lambda b, to: mask_exactly(to(x0), to(counts), **options(b, to)), device)
    equal(backend, lambda b, to: harmonic_mask(to(x0), **options(b, to)), device)
    equal(backend, lambda b, to: corrupt(to(x0), to(one), Uniform(M), sample_ids=to(ids), backend=b, **named), device)


def test_masks_of_packed_documents(backend, device):
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 5, 0, 64, 33, 2])
    x0 = torch.randint(0, M, (int(lengths.sum()),), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    named, ids = names(g, len(lengths))
    counts = (torch.rand(len(lengths), generator=g) * (lengths + 1)).long()

    def options(b, to):
        return dict(mask_index=M, cu_seqlens=to(offsets), sample_ids=to(ids), backend=b, **named)

    equal(backend, lambda b, to: mask_exactly(to(x0), to(counts), **options(b, to)), device)
    offsets = torch.tensor([0, 1, 6, 9, 70, 100, len(x0)])
    equal(backend, lambda b, to: harmonic_mask(to(x0), **options(b, to)), device)


@pytest.mark.parametrize("num_states", [2**32 - 1, 2**33 + 5, 2**62])
def test_redrawn_in_any_number_of_states(num_states, backend, device):
    x0 = torch.zeros(2, 1100, dtype=torch.long)
    equal(backend, lambda b, to: corrupt(to(x0), 1.0, Uniform(num_states), seed=1, backend=b), device)


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0**-33, 1 - 2.0**-34])
def test_extreme_probabilities(p, backend, device):
    x0 = torch.arange(8).view(2, 4)
    equal(backend, lambda b, to: mask_tokens(to(x0), p, mask_index=M, seed=1, backend=b), device)


def test_none_and_all(backend, device):
    x0, counts = torch.arange(8).view(2, 4), torch.tensor([0, 4])
    equal(backend, lambda b, to: mask_exactly(to(x0), to(counts), mask_index=M, seed=1, backend=b), device)


def test_empty_batches(backend, device):
    x0 = torch.zeros((0, 4), dtype=torch.long, device=device)
    assert mask_tokens(x0, 0.5, mask_index=M, backend=backend).xt.shape == (0, 4)
    assert harmonic_mask(x0, mask_index=M, backend=backend).xt.shape == (0, 4)
