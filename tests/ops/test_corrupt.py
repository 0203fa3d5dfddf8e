"""Corrupted tokens: draws, laws, and that backends agree bit for bit."""

import math

import numpy
import pytest
import torch
from corrupted import M, chi_square, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import (
    Absorbing,
    Uniform,
    corrupt,
    harmonic_mask,
    mask_exactly,
    mask_tokens,
    reference,
    sample_mask_counts,
    sample_times,
)
from fastdiff.philox import Purpose, draw32


def calls(x0, maskable, names):
    """Every operation, as tuples of tensors, on one backend."""
    most = torch.full((len(x0),), x0.shape[1]) if maskable is None else maskable.sum(1)
    options = dict(mask_index=M, maskable=maskable, **names)
    p = torch.linspace(0, 1, len(x0) + 1)[1:]
    yield mask_tokens(x0, p, **options)
    yield mask_exactly(x0, most // 2, **options)
    yield mask_exactly(x0, most, **options)
    if len(x0) and most.min() > 0:
        yield harmonic_mask(x0, **options)
    for graph in (Absorbing(M + 1), Uniform(M)):
        yield (corrupt(x0, 0.7, graph, **names),)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(1, 70),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**26),
    st.integers(0, 2**40),
    st.booleans(),
)
def test_backends_agree_bit_for_bit(batch, length, seed, step, first_id, restrict):
    x0 = tokens(batch, length)
    maskable = x0 % 3 > 0 if restrict else None
    names = dict(seed=seed, step=step, sample_ids=first_id + torch.arange(batch))
    pairs = zip(
        calls(x0, maskable, names | {"backend": "cpu"}),
        calls(x0, maskable, names | {"backend": "reference"}),
        strict=True,
    )
    for got, expected in pairs:
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_draws_do_not_depend_on_the_batch_around_them():
    x0 = tokens(40, 23)
    order = torch.tensor([30, 2, 17])
    steps = torch.arange(40) % 4
    for whole, part in zip(
        calls(x0, None, dict(seed=5, step=steps)),
        calls(x0[order], None, dict(seed=5, step=steps[order], sample_ids=order)),
        strict=True,
    ):
        if len(whole) != 2:  # mask_tokens and mask_exactly depend on p and counts, which follow the batch here
            assert all(torch.equal(a[order], b) for a, b in zip(whole, part, strict=True))
    whole = mask_tokens(x0, 0.3, mask_index=M, seed=5, step=steps).xt
    assert torch.equal(
        whole[order], mask_tokens(x0[order], 0.3, mask_index=M, seed=5, step=steps[order], sample_ids=order).xt
    )


def test_masks_and_tokens_agree():
    x0 = tokens(20, 30)
    maskable = x0 % 2 == 0
    for result in calls(x0, maskable, dict(seed=1)):
        if len(result) > 1:
            xt, mask = result[:2]
            assert torch.equal(xt, torch.where(mask, M, x0))
            assert not (mask & ~maskable).any()


def test_probabilities_at_the_ends_and_between():
    x0 = torch.zeros(200, 500, dtype=torch.long)
    assert mask_tokens(x0, 1.0, mask_index=M, seed=0).mask.all()
    assert not mask_tokens(x0, 0.0, mask_index=M, seed=0).mask.any()
    p = torch.tensor([0.1, 0.5, 0.9, 0.001]).repeat_interleave(50)
    share = mask_tokens(x0, p, mask_index=M, seed=0).mask.double().view(4, -1).mean(1)
    error = (share - p[::50]) / (p[::50] * (1 - p[::50]) / 25_000).sqrt()
    assert error.abs().max() < 4
    per_token = torch.rand(200, 500)
    mask = mask_tokens(x0, per_token, mask_index=M, seed=0).mask
    assert mask[per_token > 0.9].double().mean() > 0.9
    assert mask[per_token < 0.1].double().mean() < 0.1


def test_exact_counts():
    x0, counts = tokens(11, 10), torch.arange(11)
    assert torch.equal(mask_exactly(x0, counts, mask_index=M, seed=2).mask.sum(1), counts)


def test_subset_law_is_uniform():
    x0 = torch.zeros(60_000, 6, dtype=torch.long)
    mask = mask_exactly(x0, torch.full((60_000,), 3), mask_index=M, seed=3).mask
    codes = (mask.long() << torch.arange(6)).sum(1)
    counts = torch.bincount(codes, minlength=64)
    assert (counts > 0).sum() == math.comb(6, 3)
    assert chi_square(counts[counts > 0], torch.full((20,), 1 / 20)) < 4


@pytest.mark.parametrize("length", [1, 5, 32])
def test_harmonic_count_law_includes_the_full_mask(length):
    x0 = torch.zeros(100_000, length, dtype=torch.long)
    result = harmonic_mask(x0, mask_index=M, seed=4)
    assert torch.equal(result.mask.sum(1), result.counts)
    harmonic = sum(1 / m for m in range(1, length + 1))
    assert result.weight.sub(harmonic).abs().max() < 1e-12
    counts = torch.bincount(result.counts, minlength=length + 1)[1:]
    assert counts[-1] > 0
    if length > 1:
        assert chi_square(counts, reference.count_law(length, "harmonic")) < 4


def test_harmonic_subset_law():
    """p(I) = B(L - |I|, |I| + 1) / H_L over the unmasked sets I."""
    length = 4
    mask = harmonic_mask(torch.zeros(100_000, length, dtype=torch.long), mask_index=M, seed=5).mask
    codes = (mask.long() << torch.arange(length)).sum(1)
    _, weights = reference.subsets(length)
    assert chi_square(torch.bincount(codes, minlength=16)[1:], weights / weights.sum()) < 4


def test_harmonic_counts_follow_the_maskable_positions():
    x0 = torch.zeros(50_000, 9, dtype=torch.long)
    maskable = torch.zeros_like(x0, dtype=torch.bool)
    maskable[:, [1, 4, 8]] = True
    result = harmonic_mask(x0, mask_index=M, maskable=maskable, seed=6)
    assert result.weight[0] == pytest.approx(11 / 6)
    assert chi_square(torch.bincount(result.counts, minlength=4)[1:], reference.count_law(3, "harmonic")) < 4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_documents_are_masked_as_alone(backend):
    lengths = [5, 1, 12, 0, 7]
    documents = [tokens(1, n, seed=n) for n in lengths]
    packed, offsets = torch.cat(documents, 1)[0], torch.tensor([0, *lengths]).cumsum(0)
    maskable, counts = packed % 4 > 0, torch.tensor([2, 0, 6, 0, 1])
    names = dict(mask_index=M, seed=3, backend=backend)
    whole = mask_exactly(packed, counts, maskable=maskable, cu_seqlens=offsets, **names)
    keep = [0, 1, 2, 4]  # harmonic counts need a position
    no_empty = torch.tensor([0, *(lengths[b] for b in keep)]).cumsum(0)
    harmonic = harmonic_mask(packed, cu_seqlens=no_empty, sample_ids=torch.tensor(keep), **names)
    for b, n in enumerate(lengths):
        span = slice(int(offsets[b]), int(offsets[b]) + n)
        if n == 0:
            continue
        alone = dict(names, sample_ids=torch.tensor([b]))
        expected = mask_exactly(documents[b], counts[b : b + 1], maskable=maskable[None, span], **alone)
        assert torch.equal(whole.xt[span], expected.xt[0])
        assert torch.equal(whole.mask[span], expected.mask[0])
        expected = harmonic_mask(documents[b], **alone)
        assert torch.equal(harmonic.xt[span], expected.xt[0])
        assert harmonic.counts[keep.index(b)] == expected.counts[0]
        assert harmonic.weight[keep.index(b)] == expected.weight[0]


def test_uniform_noise_law():
    x0 = torch.full((1000, 100), 2)
    xt = corrupt(x0, 0.8, Uniform(5), seed=7)
    law = reference.transition("uniform", torch.tensor(2), torch.tensor(0.8), 5, None)
    assert chi_square(torch.bincount(xt.flatten(), minlength=5), law) < 4
    assert torch.equal(corrupt(x0, 0.0, Uniform(5), seed=7), x0)


@pytest.mark.parametrize("num_states", [2**32 - 1, 2**33 + 5, 2**62])
def test_redrawn_tokens_are_exact_in_any_number_of_states(num_states):
    draws = draw32(7, Purpose.REPLACE, 0, torch.arange(3).unsqueeze(1), 0, torch.arange(1100)).tolist()
    expected = torch.tensor([[draw * num_states >> 32 for draw in row] for row in draws])
    x0 = torch.zeros(3, 1100, dtype=torch.long)
    for backend in ("cpu", "reference"):
        assert torch.equal(corrupt(x0, 50.0, Uniform(num_states), seed=7, backend=backend), expected)
    draws = draw32(7, Purpose.LIMIT, 0, 0, 0, torch.arange(1100)).tolist()
    assert Uniform(num_states).sample_limit(1, 1100, seed=7)[0].tolist() == [draw * num_states >> 32 for draw in draws]


def test_absorbing_noise_is_masking():
    x0, sigma = tokens(6, 40), torch.linspace(0.1, 3, 6)
    p = -torch.expm1(-sigma.double())
    assert torch.equal(corrupt(x0, sigma, Absorbing(M + 1), seed=8), mask_tokens(x0, p, mask_index=M, seed=8).xt)


def test_own_uniforms_match_torch_rand():
    x0, p = tokens(4, 30), torch.tensor([0.1, 0.4, 0.6, 1.0])
    torch.manual_seed(0)
    expected = torch.rand(4, 30) < p[:, None]
    torch.manual_seed(0)
    got = mask_tokens(x0, p, mask_index=M, uniforms=torch.rand(4, 30))
    assert torch.equal(got.mask, expected)
    assert torch.equal(got.xt, torch.where(expected, M, x0))


def test_seeds_and_generators():
    x0 = tokens(4, 60)

    def draw(**names):
        return mask_tokens(x0, 0.5, mask_index=M, **names).mask

    assert torch.equal(draw(seed=3), draw(seed=torch.tensor(3)))
    assert not torch.equal(draw(seed=3), draw(seed=4))
    assert not torch.equal(draw(seed=3), draw(seed=3, step=1))
    torch.manual_seed(11)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(11)
    assert torch.equal(first, draw())
    assert torch.equal(
        draw(generator=torch.Generator().manual_seed(1)), draw(generator=torch.Generator().manual_seed(1))
    )


def test_harmonic_mask_and_sample_mask_counts_draw_alike():
    x0 = torch.zeros(500, 20, dtype=torch.long)
    counts = sample_mask_counts(1, torch.full((500,), 20), proposal="harmonic", seed=2)[0][:, 0]
    assert torch.equal(counts, harmonic_mask(x0, mask_index=M, seed=2).counts)


def test_numbers_of_any_integer_type():
    x0, names = tokens(), dict(mask_index=M, seed=3, step=2)
    expected = mask_tokens(x0, 0.5, **names)
    for kind in (numpy.int64, numpy.uint8, torch.tensor):
        given = {name: kind(number) for name, number in names.items()}
        given["step"] = given["step"] if kind is not torch.tensor else torch.full((3,), 2)
        assert torch.equal(mask_tokens(x0, 0.5, **given).xt, expected.xt)
    for p in (numpy.int64(1), numpy.float32(0.5)):
        assert torch.equal(mask_tokens(x0, p, **names).xt, mask_tokens(x0, float(p), **names).xt)
    three, nine = numpy.int32(3), numpy.int64(9)
    assert torch.equal(sample_mask_counts(three, nine, seed=three)[0], sample_mask_counts(3, 9, seed=3)[0])
    assert torch.equal(sample_times(three, seed=three, step=nine), sample_times(3, seed=3, step=9))
    assert Uniform(nine) == Uniform(9)
    assert Absorbing(nine, numpy.int8(-1)) == Absorbing(9)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: mask_tokens(tokens(), 0.5, mask_index=True), "mask_index"),
        (lambda: mask_tokens(tokens(), 0.5, mask_index=M, seed=True), "seed"),
        (lambda: mask_tokens(tokens(), 0.5, mask_index=M, seed=1, step=0.5), "step"),
        (lambda: mask_tokens(tokens(), 0.5, mask_index=torch.tensor(True)), "mask_index"),
        (lambda: sample_mask_counts(2.0, 9), "n"),
        (lambda: sample_mask_counts(2, True), "length"),
        (lambda: sample_times(2, rank=numpy.bool_(False)), "rank"),
        (lambda: Uniform(5.0), "num_states"),
        (lambda: Absorbing(5, mask_index=2.0), "mask_index"),
    ],
)
def test_what_is_no_integer(call, name):
    with pytest.raises(TypeError, match=f"^{name}: expected an int, got "):
        call()


def test_opcheck():
    x0, ids = tokens(), torch.arange(3)
    names = (torch.tensor(1), torch.zeros(3, dtype=torch.long), ids)
    maskable, p = x0 % 2 == 0, torch.rand(3, 7, dtype=torch.float64)
    ops = torch.ops.fastdiff
    torch.library.opcheck(ops.mask_tokens.cpu, (x0, p, maskable, *names, M))
    packed, offsets = x0.flatten(), torch.tensor([0, 4, 9, 21])
    torch.library.opcheck(ops.mask_exactly.cpu, (x0, torch.zeros_like(ids), None, None, *names, M))
    torch.library.opcheck(ops.mask_exactly.cpu, (packed, ids, None, offsets, *names, M))
    torch.library.opcheck(ops.harmonic_mask.cpu, (x0, None, None, *names, M))
    torch.library.opcheck(ops.harmonic_mask.cpu, (packed, None, offsets, *names, M))
    torch.library.opcheck(ops.uniform_tokens.cpu, (x0, p, *names, M))


def test_compiles_whole():
    def step(x0, p, seed):
        masked = mask_tokens(x0, p, mask_index=M, seed=seed)
        harmonic = harmonic_mask(masked.xt, mask_index=M, seed=seed, step=3)
        return corrupt(harmonic.xt, 0.3, Uniform(M + 1), seed=seed), harmonic.weight

    arguments = tokens(), torch.rand(3), torch.tensor(5)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(got, expected)
    drawn = torch.compile(lambda x0: mask_tokens(x0, 0.5, mask_index=M).mask, fullgraph=True, backend="aot_eager")
    assert not torch.equal(drawn(tokens()), drawn(tokens()))
