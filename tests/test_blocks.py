"""Block diffusion: what each stream sees, and the noise of blocks."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from fastdiff.blocks import block_causal, two_streams, two_streams_mask
from fastdiff.model import DiffusionTransformer, ModelConfig
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
    for i in range(L):
        for j in range(L):
            block, other = i // block_length, j // block_length
            assert sees[i, j] == (block == other)
            assert sees[i, L + j] == (other < block)
            assert not sees[L + i, j]
            assert sees[L + i, L + j] == (other <= block)
    mask_mod = two_streams_mask(L, block_length)
    assert torch.equal(create_mask(mask_mod, None, None, 2 * L, 2 * L, device="cpu")[0, 0], sees)
    assert torch.equal(block_causal(L, block_length), sees[L:, L:])


def test_a_last_block_may_be_short_where_no_noise_is():
    assert block_causal(5, 2).sum(1).tolist() == [2, 2, 4, 4, 5]


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


@pytest.mark.parametrize("block_length", [0, -1, 5, 24])
def test_blocks_that_do_not_divide(block_length):
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
