"""The first read of a row that is drawn from, lane by lane.

m is the largest z; s, the sum of exp((z - m) / temperature); if asked for s1, the same at temperature 1, and u, the sum
of exp(z - m) (z - m); the second largest z; the first id of the largest.
"""

import triton
import triton.language as tl

from fastdiff.kernels.maths import LOG2_E
from fastdiff.kernels.rows import LOWEST
from fastdiff.kernels.walk import CLASSES, edge_of, first_edge, num_tiles, tile_of

NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def add(state, x, ids, scale, TWO_SUMS: tl.constexpr, BEST: tl.constexpr, STATS: tl.constexpr):
    """Adds a number to each lane. scale = LOG2_E / temperature."""
    m, s, s1, u, second, best = state
    larger, d = x > m, tl.abs(x - m)
    e = tl.exp2(-d * scale)
    e1 = e
    if TWO_SUMS:
        e1 = tl.exp2(-d * LOG2_E)
    if STATS:
        d = tl.minimum(d, 126.0)  # from where on the exponential is 0, and 0 times infinity would be NaN
        u = tl.where(larger, e1 * (u - d * (s1 if TWO_SUMS else s)), u - d * e1)
        second = tl.where(larger, m, tl.maximum(second, x))
    if TWO_SUMS:
        s1 = tl.where(larger, s1 * e1 + 1, s1 + e1)
    if BEST:
        best = tl.where(larger, ids, best)
    return tl.where(larger, x, m), tl.where(larger, s * e + 1, s + e), s1, u, second, best


@triton.jit
def merge(state, scale, TWO_SUMS: tl.constexpr):
    """One lane of all along the first axis; here s1 is s where they are the same."""
    m, s, s1, u, second, best = state
    top = tl.max(m, 0)
    d, first = top - m, tl.min(tl.where(m == top, best, NO_ID), 0)
    e1 = tl.exp2(-d * LOG2_E)
    u = tl.sum(e1 * (u - tl.minimum(d, 126.0) * (s1 if TWO_SUMS else s)), 0)
    second = tl.max(tl.where((best == first) & (m == top), second, m), 0)
    s = tl.sum(s * tl.exp2(-d * scale), 0)
    return top, s, tl.sum(s1 * e1, 0) if TWO_SUMS else s, u, second, first


@triton.jit
def survey(
    row, scale,
    TWO_SUMS: tl.constexpr, BEST: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The state of a row, class by class."""
    zero = tl.zeros((BLOCK,), tl.float32)
    state = (zero + LOWEST, zero, zero, zero, zero + LOWEST, tl.full((BLOCK,), NO_ID, tl.int32))
    for i in range(num_tiles(row, BLOCK, VEC)):
        x, ids = tile_of(row, i, float("-inf"), BLOCK, VEC)
        state = add(state, x, ids, scale, TWO_SUMS, BEST, STATS)
    FOLD: tl.constexpr = (BLOCK // CLASSES, CLASSES)
    m, s, s1, u, second, best = state
    state = merge(
        (m.reshape(FOLD), s.reshape(FOLD), s1.reshape(FOLD), u.reshape(FOLD), second.reshape(FOLD), best.reshape(FOLD)),
        scale, TWO_SUMS,
    )  # fmt: skip
    for i in range(first_edge(row), 2):
        x, ids = edge_of(row, i, float("-inf"), VEC)
        state = add(state, x, ids, scale, TWO_SUMS, BEST, STATS)
    return state
