"""The forward process in Triton. Twin of csrc/cpu/corrupt.cpp, bit for bit: the draws are named, not sampled."""

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.philox import draw, scaled, stream, threshold
from fastdiff.philox import Purpose

MASK = tl.constexpr(int(Purpose.MASK))
SUBSET = tl.constexpr(int(Purpose.SUBSET))
COUNT = tl.constexpr(int(Purpose.COUNT))
REPLACE = tl.constexpr(int(Purpose.REPLACE))

# Tokens that a program holds at a time, and its warps.
TOKENS = dict(BLOCK=1024, num_warps=4)  # noise for each token by itself
SHORT = dict(BLOCK=1024, ONE_BLOCK=True, num_warps=4)  # subsets of sequences that one program can hold
MEDIUM = dict(BLOCK=4096, ONE_BLOCK=True, num_warps=8)
LONG = dict(BLOCK=4096, ONE_BLOCK=False, num_warps=8)  # longer ones

# ---------------------------------------------------------------------------------------------------------
# Noise for each token by itself: one program a block of a sequence.


@triton.jit
def load_names(SEED, STEPS, SAMPLE_IDS, b, purpose: tl.constexpr):
    return stream(tl.load(SEED), purpose, tl.load(STEPS + b), tl.load(SAMPLE_IDS + b))


@triton.jit
def token_noise_kernel(
    X0,  # int64 [B, L], as XT
    P,  # float64 [B, L], any strides
    MASKABLE,  # bool [B, L] or None
    SEED,  # int64 []
    STEPS,  # int64 [B], as SAMPLE_IDS
    SAMPLE_IDS,
    XT,
    MASKED,  # bool [B, L], or None: then tokens are redrawn instead of masked
    length,
    p_stride_b,
    p_stride_l,
    number,  # the mask's id, or the number of states to redraw from
    BLOCK: tl.constexpr,
):
    b, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK  # a grid has room for few blocks but in axis 0
    position = first + tl.arange(0, BLOCK)
    exists = position < length
    at = b * length + position
    k0, k1, sample, purpose_step = load_names(SEED, STEPS, SAMPLE_IDS, b, MASK)
    p = tl.load(P + b * p_stride_b + position.to(tl.int64) * p_stride_l, mask=exists, other=0.0)
    hit = draw(k0, k1, sample, purpose_step, first, BLOCK).to(tl.int64) < threshold(p)
    x0 = tl.load(X0 + at, mask=exists, other=0)
    if MASKED is not None:
        if MASKABLE is not None:
            hit = hit & (tl.load(MASKABLE + at, mask=exists, other=0) != 0)
        tl.store(MASKED + at, hit, mask=exists)
        tl.store(XT + at, tl.where(hit, number, x0), mask=exists)
    else:
        k0, k1, sample, purpose_step = load_names(SEED, STEPS, SAMPLE_IDS, b, REPLACE)
        redrawn = scaled(draw(k0, k1, sample, purpose_step, first, BLOCK), number)
        tl.store(XT + at, tl.where(hit, redrawn, x0), mask=exists)


# ---------------------------------------------------------------------------------------------------------
# Subsets: one program a sequence, which masks the m maskable positions with the smallest (draw, position).


@triton.jit
def candidates(names, MASKABLE, begin, length, first, BLOCK: tl.constexpr):
    """Draws of a block of positions, as int64; 2^32, above every draw, where nothing may be masked."""
    k0, k1, sample, purpose_step = names
    position = first + tl.arange(0, BLOCK)
    allowed = position < length
    if MASKABLE is not None:
        allowed = allowed & (tl.load(MASKABLE + begin + position, mask=allowed, other=0) != 0)
    return tl.where(allowed, draw(k0, k1, sample, purpose_step, first, BLOCK).to(tl.int64), 4294967296)


@triton.jit
def count_below(limit, held, names, MASKABLE, begin, length, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """How many positions draw less than the limit: from the draws held, if they are all, else drawn again."""
    if ONE_BLOCK:
        return tl.sum((held < limit).to(tl.int32), 0)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, length, BLOCK):
        count += (candidates(names, MASKABLE, begin, length, first, BLOCK) < limit).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def harmonic_count(draw_, table, num_maskable):
    """The first m with draw < round(2^32 H_m / H_L), and H_L, by bisection of the table of H."""
    norm = tl.load(table + num_maskable)
    low, high = tl.full((), 1, tl.int32), num_maskable
    while low < high:
        middle = (low + high) // 2
        below = draw_ < threshold(tl.load(table + middle) / norm)
        low, high = tl.where(below, low, middle + 1), tl.where(below, middle, high)
    return low, norm


@triton.jit
def subset_kernel(
    X0,  # int64 [B, L] or [T], as XT
    COUNTS,  # int64 [B]: read, or written where TABLE is given
    MASKABLE,  # bool as X0, or None
    CU_SEQLENS,  # int64 [B + 1], or None
    SEED,  # int64 []
    STEPS,  # int64 [B], as SAMPLE_IDS
    SAMPLE_IDS,
    TABLE,  # float64 H_0 .. H_longest, or None
    XT,
    MASKED,  # bool as X0
    WEIGHT,  # float64 [B], or None
    length,
    mask_index,
    ONE_BLOCK: tl.constexpr,  # whether no sequence is longer than BLOCK
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    begin = b * length
    if CU_SEQLENS is not None:
        begin = tl.load(CU_SEQLENS + b)
        length = (tl.load(CU_SEQLENS + b + 1) - begin).to(tl.int32)
    names = load_names(SEED, STEPS, SAMPLE_IDS, b, SUBSET)
    held = candidates(names, MASKABLE, begin, length, 0, BLOCK)
    if TABLE is not None:
        num_maskable = count_below(4294967296, held, names, MASKABLE, begin, length, ONE_BLOCK, BLOCK)
        k0, k1, sample, purpose_step = load_names(SEED, STEPS, SAMPLE_IDS, b, COUNT)
        draw_ = tl.min(draw(k0, k1, sample, purpose_step, 0, 4).to(tl.int64) + (tl.arange(0, 4) > 0) * 4294967296, 0)
        m, norm = harmonic_count(draw_, TABLE, num_maskable)
        tl.store(COUNTS + b, m.to(tl.int64))
        tl.store(WEIGHT + b, norm)
    else:
        m = tl.load(COUNTS + b).to(tl.int32)

    # The m-th smallest draw is the largest value with less than m draws below it: bit by bit.
    cut = tl.full((), 0, tl.int64)
    for bit in range(32):
        tried = cut + (tl.full((), 1, tl.int64) << (31 - bit))
        below = count_below(tried, held, names, MASKABLE, begin, length, ONE_BLOCK, BLOCK)
        cut = tl.where(below < m, tried, cut)
    # Of equal draws the first are masked, so many that there are m.
    at_cut = m - count_below(cut, held, names, MASKABLE, begin, length, ONE_BLOCK, BLOCK)
    seen = tl.full((), 0, tl.int32)
    for first in range(0, length, BLOCK):
        position = first + tl.arange(0, BLOCK)
        exists = position < length
        draws = held if ONE_BLOCK else candidates(names, MASKABLE, begin, length, first, BLOCK)
        equal = (draws == cut).to(tl.int32)
        masked = (draws < cut) | ((equal > 0) & (seen + tl.cumsum(equal, 0) <= at_cut))
        seen += tl.sum(equal, 0)
        x0 = tl.load(X0 + begin + position, mask=exists, other=0)
        tl.store(MASKED + begin + position, masked, mask=exists)
        tl.store(XT + begin + position, tl.where(masked, mask_index, x0), mask=exists)


# ---------------------------------------------------------------------------------------------------------
# Launches.


def launch_token_noise(
    x0: Tensor,
    p: Tensor,
    maskable: Tensor | None,
    seed: Tensor,
    steps: Tensor,
    sample_ids: Tensor,
    xt: Tensor,
    mask: Tensor | None,
    number: int,
) -> None:
    token_noise_kernel[x0.shape[0], triton.cdiv(x0.shape[1], TOKENS["BLOCK"])](
        x0, p, maskable, seed, steps, sample_ids, xt, mask, x0.shape[1], *p.stride(), number, **TOKENS
    )


def launch_subset(
    x0: Tensor,
    counts: Tensor,
    maskable: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor,
    steps: Tensor,
    sample_ids: Tensor,
    table: Tensor | None,
    xt: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    mask_index: int,
) -> None:
    longest = x0.shape[-1]  # of packed documents too
    config = SHORT if longest <= SHORT["BLOCK"] else MEDIUM if longest <= MEDIUM["BLOCK"] else LONG
    subset_kernel[(counts.numel(),)](
        x0, counts, maskable, cu_seqlens, seed, steps, sample_ids, table, xt, mask, weight, longest, mask_index,
        **config,
    )  # fmt: skip
