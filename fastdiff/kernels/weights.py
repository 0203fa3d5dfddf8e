"""Reads of a row that follow the first, from the second-level cache: what its numbers weigh in the race.

`how` is (origin, scale, least, cut, log_largest).
"""

import triton
import triton.language as tl

from fastdiff.kernels.maths import LOG2_E
from fastdiff.kernels.walk import CLASSES, edge_of, first_edge, num_tiles, tile_of

WAYS = tl.constexpr(8)  # into which a read divides the keys among which a threshold is


@triton.jit
def weights(x, how, KEPT: tl.constexpr, LAW: tl.constexpr, TWO_SUMS: tl.constexpr):
    """What ids weigh in the race, and with a law at temperature 1, where NaN stands for no id."""
    origin, scale, least, cut, log_largest = how
    w = tl.exp2((x - origin) * scale)
    if KEPT:
        w = tl.where(x >= least, w, 0.0)
    w1 = w
    if LAW:
        w1 = tl.exp2((x - origin) * LOG2_E) - cut
        w1 = tl.where(w1 > 0, w1, 0.0)
        raised = w1
        if TWO_SUMS:
            raised = tl.where(cut == 0, w, tl.exp2((tl.log2(w1) - log_largest) * (scale / LOG2_E)))
        w = tl.where(x == x, raised, 0.0)
    return w, w1


@triton.jit
def class_sums(
    row, how,
    KEPT: tl.constexpr, LAW: tl.constexpr, TWO_SUMS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums of both weights, class by class."""
    absent: tl.constexpr = float("nan") if LAW else float("-inf")
    s, s1 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in range(num_tiles(row, BLOCK, VEC)):
        w, w1 = weights(tile_of(row, i, absent, BLOCK, VEC)[0], how, KEPT, LAW, TWO_SUMS)
        s += w
        s1 += w1
    s = tl.sum(s.reshape((BLOCK // CLASSES, CLASSES)), 0)
    s1 = tl.sum(s1.reshape((BLOCK // CLASSES, CLASSES)), 0)
    for i in range(first_edge(row), 2):
        w, w1 = weights(edge_of(row, i, absent, VEC)[0], how, KEPT, LAW, TWO_SUMS)
        s += w
        s1 += w1
    return s, s1


@triton.jit
def ordered(bits, BITS: tl.constexpr):
    """Integers in the order of the floating-point numbers whose bits are given, and back."""
    return bits ^ ((bits >> 63) & ((1 << (BITS - 1)) - 1))


@triton.jit
def key_of(x, DTYPE: tl.constexpr):
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    bits = x.to(DTYPE).to(tl.int16 if BITS == 16 else tl.int32, bitcast=True)
    return ordered(bits.to(tl.int64), BITS)


@triton.jit
def number_of(key, DTYPE: tl.constexpr):
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    bits = ordered(key, BITS).to(tl.int16 if BITS == 16 else tl.int32)
    return bits.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def mass_from(row, top, scale, key, DTYPE: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """The sum of the weights of the numbers from a key on."""
    how = (top, scale, number_of(key, DTYPE), 0.0, 0.0)
    return tl.sum(class_sums(row, how, True, False, False, BLOCK, VEC)[0], 0)


@triton.jit
def add_from(sums, x, w, bounds, LANES: tl.constexpr):
    """Adds to each sum, of LANES lanes, the weights of the numbers from its bound on."""
    added = ()
    for j in tl.static_range(WAYS - 1):
        part = tl.where(x >= bounds[j], w, 0.0).reshape((LANES, x.shape[0] // LANES))
        added += (sums[j] + tl.sum(part, 1),)  # type: ignore[assignment]
    return added


@triton.jit
def divide(row, top, scale, low, high, target, DTYPE: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Of the WAYS parts of a range of keys the one that `reach` looks for, by one read."""
    how = (top, scale, float("-inf"), 0.0, 0.0)
    step = tl.cdiv(high - low, WAYS)
    bounds, sums, at_edges = (), (), ()
    for j in tl.static_range(WAYS - 1):
        bounds += (number_of(tl.minimum(low + (j + 1) * step, high), DTYPE),)  # type: ignore[assignment]
        sums += (tl.zeros((BLOCK // VEC,), tl.float32),)  # type: ignore[assignment]
        at_edges += (tl.zeros((1,), tl.float32),)  # type: ignore[assignment]
    for i in range(first_edge(row), 2):
        x = edge_of(row, i, float("-inf"), VEC)[0]
        at_edges = add_from(at_edges, x, weights(x, how, False, False, False)[0], bounds, 1)
    for i in range(num_tiles(row, BLOCK, VEC)):
        x = tile_of(row, i, float("-inf"), BLOCK, VEC)[0]
        sums = add_from(sums, x, weights(x, how, False, False, False)[0], bounds, BLOCK // VEC)
    first, last = low, high
    for j in tl.static_range(WAYS - 1):
        key = tl.minimum(first + (j + 1) * step, last)
        enough = tl.sum(sums[j], 0) + tl.sum(at_edges[j], 0) >= target
        low, high = tl.where(enough, key, low), tl.where(enough, high, tl.minimum(high, key))
    return low, high


@triton.jit
def reach(row, top, scale, low, target, DTYPE: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """The largest key from which on the mass is at least the target, as it is from `low` on."""
    high = key_of(top, DTYPE) + 1
    while high - low > 1:
        low, high = divide(row, top, scale, low, high, target, DTYPE, BLOCK, VEC)
    return low


@triton.jit
def least_kept(row, top, total, scale, top_k, top_p, DTYPE: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """From which number on top_k and then top_p keep ids, of which all weigh `total`."""
    low = key_of(tl.full((), float("-inf"), tl.float32), DTYPE)
    if top_k > 0:
        low = reach(row, top, 0.0, low, top_k, DTYPE, BLOCK, VEC)
        if top_p < 1:
            total = mass_from(row, top, scale, low, DTYPE, BLOCK, VEC)
    if top_p < 1:
        low = reach(row, top, scale, low, top_p * total, DTYPE, BLOCK, VEC)
    return number_of(low, DTYPE)
