"""Walking a row in Triton: where its numbers are, which exist, and what any loss reads of them.

A row may start anywhere. It is walked in groups of VEC numbers aligned to 16 bytes, blocks of them under a mask that is
constant in a group, so that loads and stores are 16 bytes wide; what is left at its two ends is one narrow edge.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.maths import LOG2_E

LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum to start from, which subtracts from -inf without NaN

# `row` is (z, grad, z_aligned, grad_aligned, head, groups, V, x0, excluded): where the row and its gradient start,
# where their first aligned groups do, how many numbers come before that, how many groups follow, and the ids that are
# treated apart (int32; the excluded one may be -1).
GROUPS, SIZE, X0, EXCLUDED = (tl.constexpr(place) for place in (5, 6, 7, 8))

# Numbers of a row that a program holds at a time, and its warps: two 16-byte loads a thread before the first use, and
# few enough registers that nothing spills. Vocabularies of one block (bytes, characters, DNA) take a small one.
SMALL = dict(BLOCK=1024, num_warps=4)
LARGE = {2: dict(BLOCK=4096, num_warps=8), 4: dict(BLOCK=2048, num_warps=8)}  # by the bytes of a number


@triton.jit
def block_of(row, i, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Pointers into row and gradient, ids, and which exist, of block i of the groups."""
    _, _, z_aligned, grad_aligned, head, groups, _, _, _ = row
    offsets = i * BLOCK + tl.arange(0, BLOCK)
    return z_aligned + offsets, grad_aligned + offsets, head + offsets, offsets // VEC < groups


@triton.jit
def edge_of(row, VEC: tl.constexpr):
    """The same of what lies before the first group and after the last."""
    z, grad, _, _, head, groups, V, _, _ = row
    i = tl.arange(0, 2 * VEC)
    before = i < VEC
    ids = tl.where(before, i, head + groups * VEC + i - VEC)
    return z + ids, grad + ids, ids, tl.where(before, i < head, ids < V)


@triton.jit
def num_blocks(row, BLOCK: tl.constexpr, VEC: tl.constexpr):
    return tl.cdiv(row[GROUPS] * VEC, BLOCK)


@triton.jit
def load_at(row, index):
    """The number at an id, in float64; NaN where there is no such id."""
    return tl.load(row[0] + index, mask=(index >= 0) & (index < row[SIZE]), other=float("nan")).to(tl.float64)


@triton.jit
def store_at(row, index, gradient):
    tl.store(row[1] + index, gradient.to(tl.float32), mask=(index >= 0) & (index < row[SIZE]))


@triton.jit
def store_apart(row, at_x0, at_excluded):
    """Writes the gradients of x0 and of the excluded id over what the loops have left there."""
    tl.debug_barrier()
    store_at(row, row[X0], at_x0)
    store_at(row, row[EXCLUDED], at_excluded)


@triton.jit
def zero_grad(row, BLOCK: tl.constexpr, VEC: tl.constexpr):
    for i in range(num_blocks(row, BLOCK, VEC)):
        _, pointers, _, exists = block_of(row, i, BLOCK, VEC)
        tl.store(pointers, tl.zeros((BLOCK,), tl.float32), mask=exists)
    _, pointers, _, exists = edge_of(row, VEC)
    tl.store(pointers, tl.zeros((2 * VEC,), tl.float32), mask=exists)


@triton.jit
def load_part(part):
    """Some numbers of a row that is read again, from the cache; -inf where there is none."""
    z, _, _, exists = part
    return tl.load(z, mask=exists, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)


@triton.jit
def load_others(part, row):
    """The same, -inf at x0 and at the excluded id too."""
    ids = part[2]
    return tl.where((ids == row[X0]) | (ids == row[EXCLUDED]), float("-inf"), load_part(part))


@triton.jit
def online(m, s, z):
    """Adds exp(z) to the sum s exp(m), number by number, with one exponential."""
    e = tl.exp2(-tl.abs(z - m) * LOG2_E)
    larger = z > m
    return tl.where(larger, z, m), tl.where(larger, s * e + 1, s + e)


@triton.jit
def sum_exp(row, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """max and sum of exp(z - max) over the ids other than x0 and the excluded one, float64."""
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    for i in range(num_blocks(row, BLOCK, VEC)):
        m, s = online(m, s, load_others(block_of(row, i, BLOCK, VEC), row))
    m_edge = tl.full((2 * VEC,), LOWEST, tl.float32)
    m_edge, s_edge = online(m_edge, tl.zeros((2 * VEC,), tl.float32), load_others(edge_of(row, VEC), row))
    top = tl.maximum(tl.max(m, 0), tl.max(m_edge, 0))
    total = tl.sum(s * tl.exp2((m - top) * LOG2_E), 0) + tl.sum(s_edge * tl.exp2((m_edge - top) * LOG2_E), 0)
    return top.to(tl.float64), total.to(tl.float64)


def row_strides(z: Tensor) -> tuple[int, int, int]:
    """How rows lie: row r at (r // inner) * stride_outer + (r % inner) * stride_inner."""
    return max(z.shape[-2], 1), 0 if z.dim() == 2 else z.stride(0), z.stride(-2)
