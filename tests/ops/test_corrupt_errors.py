"""Bad input to what corrupts tokens."""

import pytest
import torch
from corrupted import M, tokens

from fastdiff import (
    Uniform,
    corrupt,
    harmonic_mask,
    mask_exactly,
    mask_tokens,
    sample_mask_counts,
    sample_times,
)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda **k: mask_tokens(tokens(), 1.5, mask_index=M, **k),
            ValueError,
            r"p: expected probabilities in \[0, 1\], got 1.5",
        ),
        (
            lambda **k: mask_tokens(tokens(), torch.full((3, 7), torch.nan), mask_index=M, **k),
            ValueError,
            "p: expected prob",
        ),
        (
            lambda **k: mask_tokens(tokens(), torch.rand(7), mask_index=M, **k),
            ValueError,
            "p: expected a number or a shape",
        ),
        (lambda **k: mask_tokens(tokens()[0], 0.5, mask_index=M, **k), ValueError, r"x0: expected shape \[B, L\]"),
        (
            lambda **k: mask_tokens(tokens(3, 0), 0.5, mask_index=M, **k),
            ValueError,
            r"x0: expected shape \[B, L\] with L >= 1",
        ),
        (lambda **k: mask_tokens(tokens().float(), 0.5, mask_index=M, **k), TypeError, "x0: expected int64"),
        (lambda **k: mask_tokens(tokens(), 0.5, mask_index=-1, **k), ValueError, "mask_index: expected an id >= 0"),
        (
            lambda **k: mask_tokens(tokens(), 0.5, mask_index=M, maskable=tokens(), **k),
            TypeError,
            "maskable: expected a bool",
        ),
        (lambda **k: mask_tokens(tokens(), 0.5, mask_index=M, seed=0.5, **k), TypeError, "seed: expected an int"),
        (
            lambda **k: mask_tokens(tokens(), 0.5, mask_index=M, seed=torch.zeros(2, dtype=torch.long), **k),
            ValueError,
            "seed: expected one",
        ),
        (
            lambda **k: mask_tokens(tokens(), 0.5, mask_index=M, seed=1, generator=torch.Generator(), **k),
            ValueError,
            "got both",
        ),
        (
            lambda **k: mask_tokens(tokens(), 0.5, mask_index=M, sample_ids=torch.arange(2), **k),
            ValueError,
            "sample_ids: expected shape",
        ),
        (
            lambda **k: mask_tokens(tokens(), 0.5, mask_index=M, uniforms=torch.rand(3), **k),
            ValueError,
            "uniforms: expected",
        ),
        (
            lambda **k: mask_exactly(tokens(), torch.tensor([0, 8, 1]), mask_index=M, **k),
            ValueError,
            r"counts: expected numbers in \[0, .*got 8",
        ),
        (
            lambda **k: mask_exactly(tokens(), torch.tensor([0, -1, 1]), mask_index=M, **k),
            ValueError,
            "counts: expected numbers",
        ),
        (
            lambda **k: mask_exactly(tokens(), torch.tensor([1, 1]), mask_index=M, **k),
            ValueError,
            "counts: expected shape",
        ),
        (
            lambda **k: harmonic_mask(tokens(), mask_index=M, maskable=tokens() < 0, **k),
            ValueError,
            "maskable: expected at least one",
        ),
        (
            lambda **k: harmonic_mask(tokens(), cu_seqlens=torch.tensor([0, 21]), mask_index=M, **k),
            ValueError,
            "cu_seqlens: expected",
        ),
        (
            lambda **k: harmonic_mask(tokens()[0], cu_seqlens=torch.tensor([0, 5]), mask_index=M, **k),
            ValueError,
            "offsets from 0 to 7",
        ),
        (
            lambda **k: harmonic_mask(tokens()[0], cu_seqlens=torch.tensor([0, 5, 3, 7]), mask_index=M, **k),
            ValueError,
            "rising offsets",
        ),
        (lambda **k: corrupt(tokens(), -1.0, Uniform(M), **k), ValueError, "sigma: expected finite numbers >= 0"),
        (lambda **k: corrupt(tokens(), torch.nan, Uniform(M), **k), ValueError, "sigma: expected finite numbers >= 0"),
        (lambda **k: corrupt(tokens(), 1.0, Uniform(9), **k), ValueError, r"x0: expected ids in \[0, 9\)"),
        (lambda **k: corrupt(tokens(), 1.0, "absorb", **k), TypeError, "graph: expected Absorbing, Uniform or Mixture"),
    ],
)
def test_bad_input(call, error, message, backend):
    with pytest.raises(error, match=message):
        call(backend=backend)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_mask_counts(0, 5), "n: expected at least 1"),
        (lambda: sample_mask_counts(3, 0), "length: expected at least 1"),
        (lambda: sample_mask_counts(3, torch.tensor([3.0])), "length: expected"),
        (lambda: sample_mask_counts(3, 5, proposal="best"), "proposal: expected one of"),
        (lambda: sample_times(0), "expected n >= 1"),
        (lambda: sample_times(3, eps=1.0), "0 <= eps < 1"),
        (lambda: sample_times(3, rank=2, world_size=2), "rank < world_size"),
        (lambda: sample_times(3, method="sobol"), "method: expected one of"),
    ],
)
def test_bad_input_to_schedules_of_counts_and_times(call, message):
    with pytest.raises(ValueError, match=message):
        call()
