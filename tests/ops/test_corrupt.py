"""The forward process: same bits on every backend, exact laws, bad input."""

import math

import numpy
import pytest
import torch
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

M = 50


def tokens(batch=3, length=7, seed=0):
    return torch.randint(0, M, (batch, length), generator=torch.Generator().manual_seed(seed))


def chi_square(counts, probabilities):
    """Pearson's statistic in standard deviations from its mean; above 4 is one in many thousands."""
    expected = counts.sum() * probabilities
    assert expected.min() > 5
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


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
