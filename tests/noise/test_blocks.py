"""Block diffusion: what each stream sees, and the noise of blocks."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.blocks import block_causal, mask_blocks, two_streams, two_streams_mask
from fastdiff.schedules import LogLinear

V, MASK, L = 11, 10, 12
X0 = torch.randint(0, MASK, (3, L), generator=torch.Generator().manual_seed(0))
XT = torch.where(torch.rand(3, L, generator=torch.Generator().manual_seed(1)) < 0.6, MASK, X0)


def make(conditioned: bool = False, **changes) -> DiffusionTransformer:
    torch.manual_seed(0)
    shape = {"num_states": V, "max_length": L, "dim": 16, "depth": 2, "heads": 2} | changes
    model = DiffusionTransformer(ModelConfig(**shape, cond_dim=8 * conditioned))
    for parameter in model.parameters():  # outputs are 0 before training, which would hide everything
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def logits_of(model: DiffusionTransformer, block_length: int):
    body, lm_head = model.block_conditionals(block_length, MASK, LogLinear().total_noise)
    return lambda xt, x0: lm_head(body(xt, x0))


# -- two streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_length", [1, 3, 4, L])
def test_streams(block_length):
    tokens, positions, sees = two_streams(XT, X0, block_length)
    assert torch.equal(tokens, torch.cat([XT, X0], 1))
    assert positions.tolist() == [*range(L), *range(L)]
    found = sees.tolist()
    for i in range(L):
        for j in range(L):
            block, other = i // block_length, j // block_length
            assert found[i][j] == (block == other)
            assert found[i][L + j] == (other < block)
            assert not found[L + i][j]
            assert found[L + i][L + j] == (other <= block)
    mask_mod = two_streams_mask(L, block_length)
    assert torch.equal(create_mask(mask_mod, None, None, 2 * L, 2 * L, device="cpu")[0, 0], sees)
    assert torch.equal(block_causal(L, block_length), sees[L:, L:])


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("block_length", [1, 3, 4])
def test_what_a_position_sees(block_length, conditioned):
    """Its own noised block and the clean blocks before, and nothing else."""
    logits = logits_of(make(conditioned), block_length)
    out = logits(XT, X0)
    for j in range(L):
        block = j // block_length
        xt, x0 = XT.clone(), X0.clone()
        xt[:, j] = torch.where(xt[:, j] == MASK, MASK, (xt[:, j] + 1) % MASK)  # as many masks
        x0[:, j] = (x0[:, j] + 1) % MASK
        moved = (logits(xt, X0) != out).flatten(2).any(2)
        own = torch.arange(L) // block_length == block
        assert not moved[:, ~own].any()
        assert torch.equal(moved[:, own], (xt != XT).any(1, keepdim=True).expand(-1, block_length))
        moved = (logits(XT, x0) != out).flatten(2).any(2)
        after = torch.arange(L) // block_length > block
        assert torch.equal(moved, after.expand(3, -1))


@pytest.mark.parametrize("conditioned", [False, True])
def test_one_block_is_the_ordinary_model(conditioned):
    model = make(conditioned)
    body, lm_head = model.conditionals(MASK, LogLinear().total_noise)
    torch.testing.assert_close(logits_of(model, L)(XT, X0), lm_head(body(XT)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("conditioned", [False, True])
def test_a_block_is_the_ordinary_model_on_what_it_sees(conditioned):
    """A clean stream of its own is no other than the blocks before, clean, under the block-causal mask."""
    model, block_length = make(conditioned), 4
    out = logits_of(model, block_length)(XT, X0)
    for block in range(L // block_length):
        end = (block + 1) * block_length
        xt = torch.cat([X0[:, : end - block_length], XT[:, end - block_length : end]], 1)
        sigma = None
        if conditioned:
            share = (xt == MASK).double().unflatten(1, (-1, block_length)).mean(2)
            sigma = LogLinear().total_noise(share).float().repeat_interleave(block_length, 1)
            sigma[:, : end - block_length] = 0
        alone = model(xt, sigma, block_causal(end, block_length))
        torch.testing.assert_close(out[:, end - block_length : end], alone[:, -block_length:], rtol=0, atol=1e-12)


def test_first_tokens_alone():
    model = make()
    assert torch.equal(model(XT, first=5), model(XT)[:, :5])


@pytest.mark.parametrize("learned_positions", [False, True])
def test_the_longest_sequence_is_that_of_one_stream(learned_positions):
    body, _ = make(learned_positions=learned_positions).block_conditionals(1, MASK, LogLinear().total_noise)
    assert body(XT, X0).shape == (3, L, 16)
    with pytest.raises(ValueError, match=r"positions: expected numbers in \[0, 12\), got 0 to 12"):
        body(XT[:, [0] * 13], X0[:, [0] * 13])


@pytest.mark.parametrize("block_length", [5, 24])
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_short_last_block(block_length, conditioned):
    """Each block alone, behind the clean ones; noise is by its own share of masks."""
    model = make(conditioned)
    found = logits_of(model, block_length)(XT, X0)
    for start in range(0, L, block_length):
        end = min(start + block_length, L)
        seen, n = torch.cat([X0[:, :start], XT[:, start:end]], 1), end - start
        level = LogLinear().total_noise((XT[:, start:end] == MASK).double().mean(1, keepdim=True)).float()
        sigma = torch.cat([torch.zeros(len(XT), start), level.expand(-1, n)], 1) if conditioned else None
        alone = model(seen, sigma, block_causal(end, block_length))[:, start:]
        torch.testing.assert_close(found[:, start:end], alone)


@pytest.mark.parametrize("block_length", [0, -1])
def test_blocks_of_no_length(block_length):
    with pytest.raises(ValueError, match="block_length: expected"):
        two_streams(XT, X0, block_length)
    with pytest.raises(ValueError, match="block_length: expected"):
        logits_of(make(), block_length)(XT, X0)


def test_streams_that_do_not_fit():
    with pytest.raises(ValueError, match=r"xt: expected shape \(3, 12\), got \(3, 4\)"):
        two_streams(XT[:, :4], X0, 4)
    with pytest.raises(ValueError, match=r"x0: expected shape \[B, L\], got \(12,\)"):
        two_streams(XT[0], X0[0], 4)
    with pytest.raises(TypeError, match=r"block_length: expected an int, got 2\.0"):
        two_streams(XT, X0, 2.0)


# -- noise -----------------------------------------------------------------------------------------------


def masked(n: int = 4, length: int = L, **options):
    x0 = torch.zeros(n, length, dtype=torch.int64)
    return mask_blocks(x0, **{"block_length": 4, "mask_index": MASK, "seed": 0} | options)


@pytest.mark.parametrize("exact", [False, True])
def test_a_block_has_one_rate_and_its_masks(exact):
    xt, mask, rate, weight = masked(500, exact=exact)
    assert torch.equal(mask, xt == MASK)
    assert (xt[~mask] == 0).all()
    assert torch.equal(weight, 1 / rate)
    rate, share = rate.unflatten(1, (-1, 4)), mask.unflatten(1, (-1, 4)).double().mean(2)
    assert (rate == rate[..., :1]).all()
    off = rate[..., 0] - share
    assert (off == 0).all() if exact else abs(off.mean()) < 4 * off.std() / off.numel() ** 0.5


@pytest.mark.parametrize("rates", [(0.0, 1.0), (0.3, 0.8), (0.5, 0.5), (1, 1)])
def test_rates_are_spread_evenly_over_their_range(rates):
    rate = masked(100, rates=rates).rate[:, ::4].flatten().sort()[0]
    low, high = rates
    assert (
        ((rate - low) * len(rate) // (high - low) == torch.arange(len(rate))).all()
        if low < high
        else ((rate == low).all())
    )


@pytest.mark.parametrize(("rates", "counts"), [((0.0, 1.0), [1, 2, 3, 4]), ((0.25, 0.5), [1, 2]), ((1, 1), [4])])
def test_exact_counts_within_rates(rates, counts):
    mask = masked(96, rates=rates, exact=True).mask.unflatten(1, (-1, 4)).sum(2)
    found, times = mask.unique(return_counts=True)
    assert found.tolist() == counts
    assert times.tolist() == [96 * 3 // len(counts)] * len(counts)


def test_every_block_meets_every_rate():
    """Also where a batch is one sequence: the strata of its blocks move on from step to step."""
    rates = torch.stack([masked(1, step=step).rate[0, ::4] for step in range(300)])
    assert ((rates.min(0)[0] < 0.02) & (rates.max(0)[0] > 0.98)).all()
    assert ((rates.mean(0) - 0.5).abs() < 4 * 12**-0.5 / 300**0.5).all()
    assert (rates.mean(1).std() < 0.5 * (12 * 3) ** -0.5).all()  # of independent ones it is (12 x 3)^(-1/2)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("n", "length", "block_length"), [(1, 4, 2), (6, 6, 3), (1, 3, 1)])
def test_the_weighted_loss_is_unbiased(n, length, block_length, exact):
    """Of a loss that is another one for each position and set of masked tokens in its block, against the sum over all
    of them: of s masked tokens, the integral of p^(s - 1) (1 - p)^(n - s) is (s - 1)! (n - s)! / n!."""
    loss = torch.rand(length, 2**block_length, generator=torch.Generator().manual_seed(0)).double()
    bits = 2 ** torch.arange(block_length)
    expected = 0.0
    for i in range(length):
        for s in range(2**block_length):
            if s >> i % block_length & 1:
                m = s.bit_count()
                integral = math.factorial(m - 1) * math.factorial(block_length - m) / math.factorial(block_length)
                expected += loss[i, s].item() * integral
    sums = []
    for step in range(300):
        noised = masked(n, length, block_length=block_length, exact=exact, step=step)
        sets = (noised.mask.unflatten(1, (-1, block_length)) * bits).sum(2).repeat_interleave(block_length, 1)
        sums.append((noised.mask * noised.weight * loss[torch.arange(length), sets]).sum(1))
    sums = torch.stack(sums).mean(1)
    if block_length == 1 and exact:
        assert sums.std() < 1e-12
    assert abs(sums.mean() - expected) < 4 * sums.std() / len(sums) ** 0.5 + 1e-12


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_not_maskable_stays_and_the_rest_is_as_before(exact):
    maskable = torch.rand(4, L, generator=torch.Generator().manual_seed(0)) < 0.5
    whole, part = masked(exact=exact), masked(exact=exact, maskable=maskable)
    assert torch.equal(part.mask, whole.mask & maskable)
    assert torch.equal(part.xt == MASK, part.mask)
    assert torch.equal(part.weight, whole.weight)


@pytest.mark.parametrize("exact", [False, True])
def test_noise_is_named_by_row_and_block(exact):
    whole = masked(6, exact=exact, step=3)
    part = masked(2, exact=exact, step=3, first=3, batch_size=6)
    for of_part, of_whole in zip(part, whole, strict=True):
        assert torch.equal(of_part, of_whole[3:5])
    assert not torch.equal(whole.mask, masked(6, exact=exact, step=4).mask)
    assert not torch.equal(whole.mask, masked(6, exact=exact, step=3, seed=1).mask)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rates": (-0.1, 1)}, r"rates: expected .* in \[0, 1\], .* got \(-0.1, 1\)"),
        ({"rates": (0.5, 1.1)}, "rates: expected"),
        ({"rates": (0.8, 0.3)}, "rates: expected"),
        ({"rates": (0, 0)}, "rates: expected"),
        ({"rates": (float("nan"), 1)}, "rates: expected"),
        ({"rates": (0.3, 0.4), "exact": True}, "rates: expected some m / 4 in them"),
        ({"block_length": 5}, "block_length: expected a divisor of the length, 12, got 5"),
        ({"maskable": torch.ones(4, 4, dtype=torch.bool)}, r"maskable: expected shape \(4, 12\)"),
        ({"first": 3, "batch_size": 6}, "first: expected 4 rows of a batch of 6, got those from 3 on"),
        ({"mask_index": -1}, "mask_index: expected"),
    ],
)
def test_bad_noise(changes, text):
    with pytest.raises(ValueError, match=text):
        masked(**changes)
