"""Cross-entropies: the sum first, then the gradient from a row that is still in the second-level cache."""

import triton
import triton.language as tl

from fastdiff.kernels.maths import LOG2_E, expm1_, log1p_
from fastdiff.kernels.rows import (
    EXCLUDED,
    X0,
    block_of,
    edge_of,
    load_at,
    load_others,
    load_part,
    num_blocks,
    store_apart,
    sum_exp,
)


@triton.jit
def x_exp(x):
    """exp(x) x, 0 at -inf."""
    return tl.where(x < -700.0, 0.0, tl.exp(x) * x)


@triton.jit
def softmax_visit(part, row, constants, WITH_GRAD: tl.constexpr, WITH_STATS: tl.constexpr, WITH_ENTROPY: tl.constexpr):
    """Stores gradients; for the statistics, exp(x) x with x = z - shift, and which numbers stand before x0's."""
    _, grad, ids, exists = part
    shift, x_x0, slope, pull, size = constants
    x = (load_others(part, row) if WITH_STATS else load_part(part)) - shift
    e = tl.exp2(x * LOG2_E)
    if WITH_ENTROPY:
        slope -= pull * tl.maximum(x, -1000.0)  # no NaN where e is 0
    if WITH_GRAD:
        tl.store(grad, slope * e * size, mask=exists)
    ahead = (x > x_x0) | ((x == x_x0) & (ids < row[X0]))
    return tl.where(x < -86.0, 0.0, e * x), tl.where(ahead, 1, 0)


@triton.jit
def softmax_pass(
    row, shift, x_x0, slope, pull,
    WITH_GRAD: tl.constexpr, WITH_STATS: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Stores the gradients exp(x) (slope - pull x); the sum of exp(x) x, and how many numbers stand before x0's."""
    f32 = tl.float32
    size = tl.maximum(tl.maximum(tl.abs(slope), tl.abs(pull)) * 1e-30, 1.0)  # what float32 has no room for
    constants = (shift.to(f32), x_x0, (slope / size).to(f32), (pull / size).to(f32), size.to(f32))
    dots, aheads = tl.zeros((BLOCK,), f32), tl.zeros((BLOCK,), tl.int32)
    for i in range(num_blocks(row, BLOCK, VEC)):
        dot, ahead = softmax_visit(block_of(row, i, BLOCK, VEC), row, constants, WITH_GRAD, WITH_STATS, WITH_ENTROPY)
        if WITH_STATS:
            dots += dot
            aheads += ahead
    dot, ahead = softmax_visit(edge_of(row, VEC), row, constants, WITH_GRAD, WITH_STATS, WITH_ENTROPY)
    return tl.sum(dots, 0) + tl.sum(dot, 0), tl.sum(aheads, 0) + tl.sum(ahead, 0)


@triton.jit
def softmax_row(
    row, weight, entropy_weight, z_loss, offset,
    OFFSET: tl.constexpr, WITH_GRAD: tl.constexpr, WITH_STATS: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """With OFFSET the excluded id is not left out, but has an offset."""
    top, others = sum_exp(row, BLOCK, VEC)
    elsewhere = row[X0] == -1
    at_x0 = tl.where(elsewhere, float("-inf"), load_at(row, row[X0]))
    at_xt = tl.full((), float("-inf"), tl.float64)
    if OFFSET:
        same = row[X0] == row[EXCLUDED]
        at_xt = tl.where(same, at_xt, load_at(row, row[EXCLUDED]) + offset)
        at_x0 += tl.where(same, offset, 0.0)
        above = tl.where(at_xt > top, at_xt, top)
        others = others * tl.exp(top - above) + tl.exp(at_xt - above)
        top = above
    if WITH_GRAD:
        tl.debug_barrier()  # as in scores_row
    shift = tl.where(at_x0 > top, at_x0, top)
    if OFFSET:  # a number of the loops' type
        shift = shift.to(tl.float32).to(tl.float64)
    others = tl.where(shift == float("inf"), float("nan"), others * tl.exp(top - shift))  # inf - inf, as in PyTorch
    e_x0 = tl.exp(at_x0 - shift)
    total = others + e_x0
    # Neither is 1 added to a small sum, nor the shift to log(sum): digits would be lost.
    log_total = tl.where(at_x0 >= top, log1p_(others / e_x0) + (at_x0 - shift), tl.log(total))
    log_p = (at_x0 - shift) - log_total
    logsumexp = shift + log_total
    log_p = tl.where(elsewhere, -logsumexp, log_p)
    drift = tl.where(z_loss == 0, 0.0, logsumexp)  # which may be infinite
    loss = weight * (z_loss * drift * drift - log_p)
    entropy, correct, pull = tl.zeros_like(total), tl.zeros_like(total), tl.zeros_like(total)
    x_x0 = at_x0.to(tl.float32) - shift.to(tl.float32)
    slope = 1 + 2 * z_loss * drift
    grad_x0 = weight * (expm1_(log_p) + (slope - 1) * tl.exp(log_p))
    is_nothing = elsewhere & (total == 0)  # a part of the row without weight
    slope = tl.where(is_nothing, 0.0, weight * slope / total)
    at_excluded = tl.zeros_like(total)
    if OFFSET:
        at_excluded = tl.where(same, grad_x0, slope * tl.exp(at_xt - shift))
    if WITH_GRAD or WITH_STATS or WITH_ENTROPY:
        AT_ONCE: tl.constexpr = WITH_GRAD and not WITH_ENTROPY
        AS_WELL: tl.constexpr = WITH_STATS or WITH_ENTROPY
        dot_apart = x_exp(at_x0 - shift) + x_exp(at_xt - shift)
        first = (total == total) & ((at_xt < at_x0) | ((at_xt == at_x0) & (row[X0] < row[EXCLUDED])))
        dot, ahead = softmax_pass(row, shift, x_x0, slope, pull, AT_ONCE, AS_WELL, False, BLOCK, VEC)
        if AS_WELL:
            entropy = log_total - (dot.to(tl.float64) + dot_apart) / total
            correct = tl.where(first & (ahead == 0), 1.0, 0.0).to(tl.float64)
    if WITH_ENTROPY:
        loss += entropy_weight * entropy
        p = tl.exp(log_p)
        grad_x0 -= entropy_weight * tl.where(p == 0, 0.0, p * (log_p + entropy))
        pull = tl.where(is_nothing, 0.0, entropy_weight / total)
        slope -= tl.where(is_nothing, 0.0, pull * (entropy - log_total))
        if OFFSET:
            at_excluded = tl.where(same, grad_x0, slope * tl.exp(at_xt - shift) - pull * x_exp(at_xt - shift))
        if WITH_GRAD:
            tl.debug_barrier()  # as above
            softmax_pass(row, shift, x_x0, slope, pull, True, False, True, BLOCK, VEC)
    if WITH_GRAD:
        store_apart(row, grad_x0, at_excluded)
    return loss, logsumexp, entropy, correct, -log_p
