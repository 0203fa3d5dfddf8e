"""hidden @ lm_head.T without a place for it: what a loss needs of every row, from tiles that are never stored.

A program multiplies some rows with one share of the vocabulary, tile by tile, and leaves the maximum and the sum of
exponentials of each row's share. Shares are merged in order: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.maths import LOG2_E
from fastdiff.kernels.rows import LOWEST

# The largest tile of logits that fits the registers of eight warps on sm_80, sm_90 and sm_100 without spilling, and
# three stages of 16-bit operands.
TILE = dict(ROWS=128, IDS=128, WIDTH=64, num_warps=8, num_stages=3)
PROGRAMS = 4  # for each multiprocessor, so that the last to finish do not leave many idle


@triton.jit
def row_sums_kernel(
    HIDDEN,  # [M, D] contiguous
    LM_HEAD,  # [V, D] contiguous
    BIAS,  # [V] or None
    INDEX,  # int64 [rows], rows of HIDDEN
    COUNT,  # int64 [], how many of them there are; the others are left as they are
    X0,  # int64 [rows]
    TOP,  # float32 [shares, rows]
    TOTAL,  # float32 [shares, rows]
    AT_X0,  # float32 [shares, rows], 0 but in the share that has x0
    num_rows,
    num_ids,
    width,
    share,  # ids of a program, a multiple of IDS
    excluded,  # an id, or -1
    softcap,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    IDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    first_row, first_id = tl.program_id(0) * ROWS, tl.program_id(1) * share
    if first_row >= tl.load(COUNT):
        return
    row = first_row + tl.arange(0, ROWS)
    exists = row < num_rows
    x0 = tl.load(X0 + row, mask=exists, other=-1).to(tl.int32)
    source = HIDDEN + tl.load(INDEX + row, mask=exists, other=0)[:, None] * width
    m, s, at_x0 = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(first_id, tl.minimum(first_id + share, num_ids), IDS):
        ids = start + tl.arange(0, IDS)
        z = tile(source, LM_HEAD, ids, num_ids, width, ROWS, IDS, WIDTH)
        if BIAS is not None:
            z += tl.load(BIAS + ids, mask=ids < num_ids, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            z = softcap * (1 - 2 / (1 + tl.exp2(z * (2 * LOG2_E / softcap))))  # tanh
        column = tl.arange(0, IDS)
        is_x0 = column[None, :] == (x0 - start)[:, None]
        at_x0 += tl.sum(tl.where(is_x0, z, 0.0), 1)
        left_out = (column >= num_ids - start) | (column == excluded - start)
        z = tl.where(is_x0 | left_out[None, :], float("-inf"), z)
        top = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp2((m - top) * LOG2_E) + tl.sum(tl.exp2((z - top[:, None]) * LOG2_E), 1)
        m = top
    at = tl.program_id(1).to(tl.int64) * num_rows + row
    tl.store(TOP + at, m, mask=exists)
    tl.store(TOTAL + at, s, mask=exists)
    tl.store(AT_X0 + at, at_x0, mask=exists)


@triton.jit
def tile(source, LM_HEAD, ids, num_ids, width, ROWS: tl.constexpr, IDS: tl.constexpr, WIDTH: tl.constexpr):
    """The product of some rows with some ids, float32 [ROWS, IDS]."""
    target = LM_HEAD + tl.minimum(ids, num_ids - 1).to(tl.int64)[None, :] * width
    z = tl.zeros((ROWS, IDS), tl.float32)
    for k in range(0, width, WIDTH):
        column = k + tl.arange(0, WIDTH)
        inside = column < width
        a = tl.load(source + column[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(target + column[:, None], mask=inside[:, None], other=0.0)
        z = tl.dot(a, b, z)
    return z


def row_sums(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    x0: Tensor,
    excluded: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """For rows `index` [M] of hidden, the first `count` of them: log sum exp of the logits of all ids but x0 and the
    excluded one (-1 for none), and the logit of x0, float64 [M]. Nothing here waits for the device."""
    hidden, lm_head = hidden.contiguous(), lm_head.contiguous()
    num_rows, num_ids = len(index), len(lm_head)
    blocks = triton.cdiv(num_rows, TILE["ROWS"])
    tiles = triton.cdiv(num_ids, TILE["IDS"])
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 1
    share = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS * processors // max(1, blocks)))) * TILE["IDS"]
    shares = triton.cdiv(num_ids, share)
    top, total, at_x0 = hidden.new_zeros(3, shares, num_rows, dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(hidden):
            row_sums_kernel[(blocks, shares)](
                hidden, lm_head, bias, index, count, x0, top, total, at_x0,
                num_rows, num_ids, hidden.shape[1], share, excluded, softcap, SOFTCAP=softcap != 0, **TILE,
            )  # fmt: skip
    highest = top.double().amax(0)
    return highest + (total * torch.exp(top - highest)).sum(0).log(), at_x0.double().sum(0)
