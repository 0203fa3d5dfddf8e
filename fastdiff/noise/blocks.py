"""Block diffusion (Arriola et al., ICLR 2025): a block of tokens is noised given the clean blocks before it.

One pass serves all blocks: the noised sequence and the clean one go through the network side by side, and a mask of
attention keeps each noised block to itself and to the clean blocks before it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.checks import check_bool, check_integer, check_tokens
from fastdiff.noise.noising import mask_exactly, mask_tokens, spread
from fastdiff.philox import Purpose, draw32, resolve_seed, scaled, scaled_in_stratum, uniform


def num_blocks(length: int, block_length: int) -> int:
    """Into how many blocks a length is cut.

    Raises:
        TypeError, ValueError: a block_length that is no divisor of the length.
    """
    block_length = check_integer("block_length", block_length, 1)
    if length < 1 or length % block_length:
        raise ValueError(f"block_length: expected a divisor of the length, {length}, got {block_length}")
    return length // block_length


def two_streams(xt: Tensor, x0: Tensor, block_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """[xt, x0] side by side, for a network that is given positions and a mask of attention.

    What it gives for the first half is of each block of xt given the clean blocks before; a loss takes those alone.

    Args:
        xt, x0: [B, L] int64 or int32, noised and clean tokens.
        block_length: tokens of a block; the last may be shorter.

    Returns:
        tokens [B, 2 L]; positions [2 L] int64, 0..L-1 twice; sees [2 L, 2 L] bool, which tokens (columns) each token
        attends to, as `two_streams_mask`.

    Raises:
        TypeError, ValueError: tokens that do not fit together; a block_length below 1.
    """
    check_tokens("x0", x0, None)
    check_tokens("xt", xt, x0.shape, x0.device)
    if x0.dim() != 2:
        raise ValueError(f"x0: expected shape [B, L], got {tuple(x0.shape)}")
    length = x0.shape[1]
    at = torch.arange(2 * length, device=x0.device)
    sees = two_streams_mask(length, block_length)(None, None, at.unsqueeze(1), at)
    return torch.cat([xt, x0], 1), at % length, sees


def two_streams_mask(length: int, block_length: int) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """The mask of attention of `two_streams` as a mask_mod: create_block_mask(mask_mod, None, None, 2 L, 2 L).

    Noised tokens see their own noised block and the clean blocks before it; clean ones see their own and earlier blocks
    of clean ones.

    Args:
        length: L, of each half.
        block_length: tokens of a block; the last may be shorter.
    """
    check_integer("block_length", block_length, 1)

    def sees(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        query_block, key_block = query % length // block_length, key % length // block_length
        own = (query_block == key_block) & ((query < length) == (key < length))
        return own | ((key >= length) & (key_block < query_block))

    return sees


def block_causal(length: int, block_length: int, device: torch.device | None = None) -> Tensor:
    """Which tokens (columns) each token of one sequence sees: all of its own block and of those before, bool [L, L].

    Args:
        length, block_length: as `two_streams_mask`.
    """
    block = torch.arange(length, device=device) // check_integer("block_length", block_length, 1)
    return block.unsqueeze(1) >= block


class MaskedBlocks(NamedTuple):
    """xt [B, L] int64, mask [B, L] bool, true where a token was masked, and rate and weight [B, L] float64, alike in
    each block."""

    xt: Tensor
    mask: Tensor
    rate: Tensor
    weight: Tensor


def mask_blocks(
    x0: Tensor,
    block_length: int,
    *,
    mask_index: int,
    rates: tuple[float, float] = (0.0, 1.0),
    exact: bool = False,
    maskable: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int = 0,
    first: int = 0,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> MaskedBlocks:
    """Masks the tokens of each block at a rate of its own, drawn for all blocks of a batch together.

    The sum of the masked tokens' losses, each times its weight 1 / rate, is an unbiased estimate of the block bound on
    -log p(x0) in nats if rates is (0, 1). Clipped rates, as BD3-LM trains with, give the mean of the same integrand
    over them alone, which is another objective.

    Rates are stratified: of N blocks in a batch one falls into each N-th of the range. A row has rates from all over
    it, and where a block stands says nothing of its rate, for the strata move on from step to step.

    Args:
        x0: [B, L] int64 or int32, the rows from `first` on of a batch of batch_size (None: B).
        block_length: a divisor of L.
        mask_index: the mask's id, >= 0.
        rates: the least and the largest, in [0, 1]; (1, 1) masks all.
        exact: mask exactly m tokens of a block, with m / block_length in rates, and not each with a probability.
        maskable: [B, L] bool; other tokens stay, and those are masked as if they did not.
        seed, step, first, generator: name the draws, with the number of a block in its row.

    Raises:
        ValueError, TypeError: an argument does not fit; no m lies within the rates.
    """
    check_tokens("x0", x0, None)
    if x0.dim() != 2:
        raise ValueError(f"x0: expected shape [B, L], got {tuple(x0.shape)}")
    low, high = rates
    if not (0 <= low <= high <= 1 and high > 0):
        raise ValueError(f"rates: expected (least, largest) in [0, 1], the largest > 0, got {rates}")
    if maskable is not None:
        check_bool("maskable", maskable, x0.shape, x0.device)
    n, blocks = len(x0), num_blocks(x0.shape[1], block_length)
    total = check_integer("batch_size", n if batch_size is None else batch_size, 1)
    if check_integer("first", first, 0) + n > total:
        raise ValueError(f"first: expected {n} rows of a batch of {total}, got those from {first} on")
    seed = resolve_seed(seed, generator, x0.device)
    names, parts = torch.arange(first * blocks, (first + n) * blocks, device=x0.device), total * blocks
    strata = block_strata(names, parts, seed=seed, step=step)
    named: dict[str, Any] = dict(mask_index=mask_index, seed=seed, step=step, sample_ids=names)
    rows = x0.reshape(-1, block_length)
    if exact:
        counts = [m for m in range(1, block_length + 1) if low <= m / block_length <= high]
        if not counts:
            raise ValueError(f"rates: expected some m / {block_length} in them, for exact counts, got {rates}")
        draws = draw32(seed, Purpose.COUNT, step, 0, 0, strata)
        m = counts[0] + scaled_in_stratum(draws, strata, parts, len(counts))
        rate, mask = m.double() / block_length, mask_exactly(rows, m, **named).mask
    else:
        u = (strata + uniform(seed, Purpose.TIME, step, 0, 0, strata)) / parts
        rate = low + (high - low) * u
        mask = mask_tokens(rows, rate, **named).mask
    mask = mask.view(x0.shape)
    mask = mask if maskable is None else mask & maskable
    rate = per_token_of_blocks(rate, x0, block_length)
    return MaskedBlocks(torch.where(mask, mask_index, x0.long()), mask, rate, 1 / rate)


def block_strata(names: Tensor, n: int, *, seed: int | Tensor, step: int) -> Tensor:
    """Which of n strata each of some blocks of a batch of n takes in a step, int64.

    Args:
        names: int64 in [0, n): numbers of blocks in the batch, row by row. Those that follow each other have strata of
            all sizes, and each has every stratum equally often over steps.
    """
    moved = scaled(draw32(seed, Purpose.TIME, step, 0, 1, 0), n).to(names.device)
    return (spread(n, names.device)[names] + moved) % n


def mean_of_blocks(values: Tensor, block_length: int) -> Tensor:
    """The mean of a block of values [B, L], for each in it, [B, L]; the last block may be shorter."""
    block = torch.arange(values.shape[1], device=values.device) // block_length
    both = torch.cat([values, torch.ones_like(values[:1])])
    sums = both.new_zeros(len(both), -(-len(block) // block_length)).index_add(1, block, both)
    return (sums[:-1] / sums[-1])[:, block]


def per_token_of_blocks(value: Tensor, tokens: Tensor, block_length: int) -> Tensor:
    """A number of each block, [B K], for each of the tokens [B, L]."""
    return value.repeat_interleave(block_length).view(tokens.shape)
