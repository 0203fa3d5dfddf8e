"""Row losses in Triton, one program a row. Twin of csrc/row_loss.h and csrc/cpu/row_bodies.h, which say more.

A row may start anywhere. It is walked in groups of VEC numbers aligned to 16 bytes, blocks of them under a mask that is
constant in a group, so that loads and stores are 16 bytes wide; what is left at its two ends is one narrow edge.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.targets import for_rows

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum to start from, which subtracts from -inf without NaN

# ---------------------------------------------------------------------------------------------------------
# The mathematics. Constants of a row are float64, what runs along it float32.


@triton.jit
def expm1_(x):
    """expm1 in float64, by Kahan's correction of exp(x) - 1."""
    u = tl.exp(x)
    inside = (u != 1) & (u != 0)
    corrected = (u - 1) * x / tl.where(inside, tl.log(tl.where(inside, u, 2.0)), 1.0)
    return tl.where(inside, corrected, tl.where(u == 0, -1.0, x))


@triton.jit
def log1p_(x):
    """log1p in float64, by Kahan's correction of log(1 + x)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * x / tl.where(u == 1, 1.0, u - 1))


@triton.jit
def survival(sigma):
    """alpha = exp(-sigma), 1 - alpha, and 1 / e1, where e1 = expm1(sigma) is never formed."""
    alpha, rest = tl.exp(-sigma), -expm1_(-sigma)
    return alpha, rest, alpha / rest


@triton.jit
def weight_parts(weight):
    """RowWeight of csrc/row_loss.h: its factor, and the share that goes into the exponent."""
    small = tl.abs(weight) < 1
    return tl.where(small, tl.where(weight < 0, -1.0, 1.0), weight), tl.where(small, tl.abs(weight), 1.0)


@triton.jit
def scaled_phi(s, d, a, near: tl.constexpr):
    """a phi(d) and its derivative exp(s) - a, where phi(d) = expm1(d) - d, d = s - log a; a series where |d| < near."""
    e = tl.exp(s)
    series = a * (d * d) * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720)))))
    is_near = tl.abs(d) < tl.where(a > 0, near, 0.0)
    return tl.where(is_near, series, e - a * (1 + d)), tl.where(is_near, series + a * d, e - a)


@triton.jit
def log_gap(w, rho, near: tl.constexpr):
    """w - log(rho) for rho = 1 + w, each rounded by itself; a series where |w| < near."""
    t = w / (2 + w)  # log(1 + w) = 2 artanh(t), and w - 2 t = w t
    t2 = t * t
    series = w * t - 2 * t * t2 * (1 / 3 + t2 * (1 / 5 + t2 * (1 / 7 + t2 * (1 / 9 + t2 * (1 / 11)))))
    return tl.where(tl.abs(w) < near, series, w - tl.log(rho))


@triton.jit
def gap_at(w, rho, divisor):
    """gap(rho) and 1 - 1/rho of rho = 1 + w in float64, from both times a divisor."""
    return log_gap(w / divisor, rho / divisor, 1e-3), w / rho


# ---------------------------------------------------------------------------------------------------------
# Walking a row. `row` is (z, grad, z_aligned, grad_aligned, head, groups, V, x0, excluded): where the row and its
# gradient start, where their first aligned groups do, how many numbers come before that, how many groups follow, and
# the ids that are treated apart (int32; the excluded one may be -1).


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
    return tl.cdiv(row[5] * VEC, BLOCK)


@triton.jit
def load_at(row, index):
    """The number at an id, in float64; NaN where there is no such id."""
    return tl.load(row[0] + index, mask=(index >= 0) & (index < row[6]), other=float("nan")).to(tl.float64)


@triton.jit
def store_at(row, index, gradient):
    tl.store(row[1] + index, gradient.to(tl.float32), mask=(index >= 0) & (index < row[6]))


@triton.jit
def store_apart(row, at_x0, at_excluded):
    """Writes the gradients of x0 and of the excluded id over what the loops have left there."""
    tl.debug_barrier()
    store_at(row, row[7], at_x0)
    store_at(row, row[8], at_excluded)


@triton.jit
def zero_grad(row, BLOCK: tl.constexpr, VEC: tl.constexpr):
    for i in range(num_blocks(row, BLOCK, VEC)):
        _, pointers, _, exists = block_of(row, i, BLOCK, VEC)
        tl.store(pointers, tl.zeros((BLOCK,), tl.float32), mask=exists)
    _, pointers, _, exists = edge_of(row, VEC)
    tl.store(pointers, tl.zeros((2 * VEC,), tl.float32), mask=exists)


# ---------------------------------------------------------------------------------------------------------
# Log scores: a sum of terms, loss and gradient from one pass.


@triton.jit
def score_term(s, d, a, near: tl.constexpr, SQUARED: tl.constexpr):
    """a phi(d), or (exp(s) - a)^2 / 2 if SQUARED, and its derivative, d = s - log a; a series where |d| < near."""
    value, slope = scaled_phi(s, d, a, near)
    if SQUARED:
        return slope * slope / 2, slope * tl.exp(s)
    return value, slope


@triton.jit
def scores_visit(part, row, constants, RATIOS: tl.constexpr, SQUARED: tl.constexpr, WITH_GRAD: tl.constexpr):
    """The terms of some numbers, 0 at x0 and the excluded id; stores gradients."""
    z, grad, ids, exists = part
    shift, shift_a, a, scale = constants
    x = tl.load(z, mask=exists, other=0.0).to(tl.float32)
    if RATIOS:
        value, slope = score_term(x - shift, x - shift_a, a, 0.25, SQUARED)
    else:
        slope = tl.exp((x - shift) * (2 if SQUARED else 1))
        value = slope / 2 if SQUARED else slope
    if WITH_GRAD:
        tl.store(grad, scale * slope, mask=exists)
    return tl.where(exists & (ids != row[7]) & (ids != row[8]), value, 0.0)


@triton.jit
def scores_sum(
    row, constants,
    RATIOS: tl.constexpr, SQUARED: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(num_blocks(row, BLOCK, VEC)):
        total += scores_visit(block_of(row, i, BLOCK, VEC), row, constants, RATIOS, SQUARED, WITH_GRAD)
    # In place, warps that come later find gradients at the edges, which all read; what is stored is the first's.
    edge = scores_visit(edge_of(row, VEC), row, constants, RATIOS, SQUARED, WITH_GRAD)
    return (tl.sum(total, 0).to(tl.float64) + tl.sum(edge, 0)) * constants[3]


@triton.jit
def shared(shift, a, weight, SQUARED: tl.constexpr):
    """A term's shift and a with the weight's share in the exponent, and the weight's factor."""
    factor, share = weight_parts(weight.to(tl.float64))
    if SQUARED:
        share = tl.sqrt(share)
    return shift - tl.log(share), a * share, factor


@triton.jit
def weighted(constants, SQUARED: tl.constexpr):
    """The same terms with the weight's share in the exponent, at a digit's cost."""
    shift, shift_a, a, weight = constants
    shift, a, factor = shared(shift, a, weight, SQUARED)
    return shift.to(tl.float32), shift_a, a.to(tl.float32), factor.to(tl.float32)


@triton.jit
def scores_row(
    row, weight, sigma, all_states,
    FUNCTOR: tl.constexpr, SCALE_BY_SIGMA: tl.constexpr, WITH_GRAD: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Terms of the ratios p(y | x0) / p(x_t | x0), which are a_x0 at x0 and a elsewhere: where RATIOS is false, 0."""
    SQUARED: tl.constexpr = FUNCTOR == "csm_absorb" or FUNCTOR == "csm_uniform"
    RATIOS: tl.constexpr = FUNCTOR == "dse_uniform" or FUNCTOR == "csm_uniform"
    f32 = tl.float32
    _, rest, inv_e1 = survival(sigma)
    log_e1 = sigma + tl.log(rest)
    shift = tl.full((), 0.0, tl.float64)
    if SCALE_BY_SIGMA:
        shift = log_e1 + tl.log((all_states - 1).to(tl.float64))
    if RATIOS:
        moved, k = row[7] != row[8], all_states * inv_e1
        log_r = tl.where(k < float("inf"), -log1p_(k), 0.0)  # with sigma = 0 r is 0, and log r is not needed
        a, log_a = tl.where(moved, 1.0, 1 / (1 + k)), tl.where(moved, 0.0, log_r)
        a_x0, log_a_x0 = 1 + k, -log_r
    else:
        a, log_a, a_x0, log_a_x0 = shift * 0, shift * 0, inv_e1, -log_e1
    if FUNCTOR == "dse_uniform":
        weight /= all_states

    s_x0 = load_at(row, row[7])
    if WITH_GRAD:
        tl.debug_barrier()  # a gradient in the place of its row must not come before this
    shift_x0, a_x0, factor = shared(shift, a_x0, weight, SQUARED)
    at_x0, slope_x0 = score_term(s_x0 - shift_x0, s_x0 - shift - log_a_x0, a_x0, 1e-2, SQUARED)
    at_x0 = tl.where((row[7] == row[8]) | (row[7] == -1), 0.0, at_x0)
    constants = (shift.to(f32), (shift + log_a).to(f32), a.to(f32), weight.to(f32))
    if IN_PLACE:  # where a row is gone once it is read
        others = scores_sum(row, weighted(constants, SQUARED), RATIOS, SQUARED, WITH_GRAD, BLOCK, VEC)
    else:
        others = scores_sum(row, constants, RATIOS, SQUARED, WITH_GRAD, BLOCK, VEC)
        if not tl.abs(others) < float("inf"):  # again, in smaller blocks: for the registers that the first loop takes
            others = scores_sum(row, weighted(constants, SQUARED), RATIOS, SQUARED, WITH_GRAD, BLOCK // 4, VEC)
    if WITH_GRAD:
        store_apart(row, factor * slope_x0, shift * 0)
    return others + factor * at_x0


# ---------------------------------------------------------------------------------------------------------
# Softmax: the sum first, then the gradient from a row that is still in the second-level cache.


@triton.jit
def load_part(part):
    """Some numbers of a row that is read again, from the cache; -inf where there is none."""
    z, _, _, exists = part
    return tl.load(z, mask=exists, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)


@triton.jit
def load_others(part, row):
    """The same, -inf at x0 and at the excluded id too."""
    ids = part[2]
    return tl.where((ids == row[7]) | (ids == row[8]), float("-inf"), load_part(part))


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
    ahead = (x > x_x0) | ((x == x_x0) & (ids < row[7]))
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
    elsewhere = row[7] == -1
    at_x0 = tl.where(elsewhere, float("-inf"), load_at(row, row[7]))
    at_xt = tl.full((), float("-inf"), tl.float64)
    if OFFSET:
        same = row[7] == row[8]
        at_xt = tl.where(same, at_xt, load_at(row, row[8]) + offset)
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
        first = (total == total) & ((at_xt < at_x0) | ((at_xt == at_x0) & (row[7] < row[8])))
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


# ---------------------------------------------------------------------------------------------------------
# Affine: two sums in sequence, then the gradient. AffineRow of csrc/row_loss.h has the formulas.


@triton.jit
def dse_uniform_logits(sigma, n, moved, c_x0, c_xt, rest_x0, rest_xt):
    """a, slope, offset, offset_w, unit, value, mass_x0 and mass_xt, as the next two give them too."""
    _, _, inv_e1 = survival(sigma)
    k = n * inv_e1
    b, ratio = 1 + k * c_xt, tl.where(moved, 1.0, 1 / (1 + k))
    unit = k / (n * b)
    offset_w = tl.where(moved, -k * c_xt, k * rest_xt) / b
    at_xt = unit * k * (n + k) / b * c_xt
    gap, pull = gap_at(-k * (rest_x0 + c_xt * (1 + k)), 1 + k * c_x0, (1 + k) * b)
    mass_x0 = tl.where(moved, unit * c_x0 * pull, -at_xt * rest_xt * ratio)
    value, mass_xt = tl.where(moved, (1 + k) / n * gap, 0.0), tl.where(moved, at_xt * c_xt, 0.0)
    return ratio / n, k / (ratio * b), 1 / (ratio * b), offset_w, unit, value, mass_x0, mass_xt


@triton.jit
def d3pm_uniform(sigma, sigma_s, penalty, n, moved, c_x0, c_xt, rest_x0, rest_xt, nll):
    last = sigma_s == 0
    alpha_s, rest_s, inv_s = survival(tl.where(last, sigma / 2, sigma_s))
    alpha_t, rest_t, inv_t = survival(sigma)
    alpha_ts, rest_ts, _ = survival(sigma - tl.where(last, sigma / 2, sigma_s))
    k, k_s, lives = n * inv_t, n * inv_s, tl.where(last, 0.0, 1.0)
    b, m = 1 + k * c_xt, tl.where(moved, 1.0, 1 + k)
    between = n * alpha_s * rest_ts / (rest_t * rest_s)  # k_s - k
    keeps, stays = alpha_s + rest_s / n, alpha_ts + rest_ts / n
    unit, unit_xt = rest_ts * alpha_s / (rest_t * b), (rest_ts + n * alpha_ts) * alpha_s / (rest_t * b)
    offset_w = tl.where(moved, -k * c_xt, k * rest_xt) / b
    w_x0 = tl.where(moved, -(k_s * rest_x0 + k * c_xt * (1 + k_s)), -between * rest_xt)
    gap_x0, pull_x0 = gap_at(w_x0, (1 + k_s * c_x0) * m, (1 + k_s) * b)
    gap_xt, pull_xt = gap_at(between * c_xt, 1 + k_s * c_xt, b)
    q_x0 = tl.where(moved, rest_ts / rest_t, stays / (alpha_t + rest_t / n)) * keeps
    q_xt = tl.where(moved, stays * rest_s / rest_t, 0.0)
    cross_entropy = penalty + 1 - lives
    value = lives * (q_x0 * gap_x0 + q_xt * gap_xt) + cross_entropy * nll
    mass_x0 = lives * tl.where(moved, unit, unit_xt) * c_x0 * pull_x0 - cross_entropy
    mass_xt = lives * tl.where(moved, unit_xt * c_xt * pull_xt, 0.0)
    a = rest_ts * rest_s / (n * rest_t * m)
    return (
        lives * a,
        lives * k_s * m / b,
        tl.where(last, 1.0, m / b),
        lives * offset_w,
        lives * unit,
        value,
        mass_x0,
        mass_xt,
    )


@triton.jit
def mixture(sigma, share, n, moved, apart, c_x0, c_xt, rest_x0, nll):
    alpha, rest, _ = survival(sigma)
    alpha = tl.maximum(alpha, 1e-280)
    base = rest * share / n
    t = base / alpha
    least = tl.maximum(t, 2e-18)  # instead of 0, where this is cross-entropy
    a = alpha * least
    part = 1 / (1 + tl.where(t > 0, t * tl.exp(nll), 0.0))  # c / (c + t) of x0
    w, rho = -rest_x0 / (1 + t), (c_x0 + t) / (1 + t)
    log_rho = tl.where(t > 0, tl.log(rho), -nll)
    value = (alpha + base) * tl.where(tl.abs(w) < 1e-3, log_gap(w, rho, 1e-3), w - log_rho)
    mass_x0 = -alpha * rest_x0 * part
    v = rest_x0 / (c_x0 + t)  # 1 / rho - 1
    at_x0 = tl.where(tl.abs(v) < 1e-3, log_gap(v, 1 + v, 1e-3), v + log_rho)
    w_xt = c_xt / least
    pull = w_xt / (1 + w_xt)
    at_xt = a * log_gap(w_xt, 1 + w_xt, 1e-3) + log_gap(-pull, 1 / (1 + w_xt), 1e-3)
    value += tl.where(apart, at_xt, tl.where(moved, 0.0, at_x0))
    mass_x0 -= tl.where(moved, 0.0, v * part)
    mass_xt = tl.where(apart, pull * (alpha * c_xt + pull), 0.0)
    return a, 1 / least, a * 0 + 1, a * 0, alpha, value, mass_x0, mass_xt


@triton.jit
def affine_terms(part, row, xt, constants):
    """c, w - log(rho) and 1 - 1/rho of some numbers, 0, 0 and anything at the ids apart and where there is none."""
    _, _, ids, exists = part
    shift, inv_total, slope, offset, offset_w = constants
    live = exists & (ids != row[7]) & (ids != row[8]) & (ids != xt)
    c = tl.exp2((tl.where(live, load_part(part), float("-inf")) - shift) * LOG2_E) * inv_total
    rho, w = slope * c + offset, slope * c + offset_w
    return c, tl.where(live, log_gap(w, rho, 0.25), 0.0), w / rho


@triton.jit
def affine_store(part, row, xt, constants, gradient):
    unit, masses = gradient
    c, _, pull = affine_terms(part, row, xt, constants)
    tl.store(part[1], c * (unit * pull - masses), mask=part[3])


@triton.jit
def affine_row(
    row, xt, weight, sigma, extra, penalty,
    FUNCTOR: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """x_t is the excluded id, or of a mixture any; what is excluded then, the mask, has no part."""
    f32 = tl.float32
    MIXED: tl.constexpr = FUNCTOR == "mixture"
    top, others = sum_exp(row, BLOCK, VEC)
    moved = row[7] != xt
    apart = moved & (xt != row[8]) if MIXED else moved
    at_x0, at_xt, n = load_at(row, row[7]), tl.where(apart, load_at(row, xt), float("-inf")), row[6].to(tl.float64)
    shift = tl.where(at_x0 > top, at_x0, top)
    if not MIXED:
        shift = tl.where(at_xt > shift, at_xt, shift)
    others *= tl.exp(top - shift)
    e_x0, e_xt = tl.exp(at_x0 - shift), tl.exp(at_xt - shift)
    but_x0 = others if MIXED else others + e_xt
    total = but_x0 + e_x0
    c_x0, rest_x0 = e_x0 / total, but_x0 / total
    c_xt, rest_xt = e_xt / total, tl.where(moved, (total - e_xt) / total if MIXED else (others + e_x0) / total, rest_x0)
    nll = tl.where(at_x0 == shift, log1p_(but_x0), tl.log(total)) - (at_x0 - shift)
    if FUNCTOR == "dse_uniform_logits":
        found = dse_uniform_logits(sigma, n, moved, c_x0, tl.where(moved, c_xt, c_x0), rest_x0, rest_xt)
    elif FUNCTOR == "d3pm_uniform":
        found = d3pm_uniform(
            sigma, extra, penalty, n, moved, c_x0, tl.where(moved, c_xt, c_x0), rest_x0, rest_xt, nll
        )  # fmt: skip
    else:
        found = mixture(sigma, extra, n - 1, moved, apart, c_x0, c_xt, rest_x0, nll)
    a, slope, offset, offset_w, unit, value, mass_x0, mass_xt = found
    constants = (shift.to(f32), (1 / total).to(f32), slope.to(f32), offset.to(f32), offset_w.to(f32))
    # An id apart has its mass less its share of all, in two parts: without what the loops add, and with it. They and
    # all else that waits for the loops take few registers.
    unit, apart_mass = weight * unit, weight * (mass_x0 + mass_xt)
    grad_x0 = (weight * (mass_x0 * rest_x0 - c_x0 * mass_xt)).to(f32)
    grad_xt = (weight * (mass_xt * rest_xt - c_xt * mass_x0)).to(f32)
    share_x0, share_xt = c_x0.to(f32), c_xt.to(f32)
    a, value = weight * a, weight * value
    gaps, pulls = tl.zeros((BLOCK,), f32), tl.zeros((BLOCK,), f32)
    for i in range(num_blocks(row, BLOCK, VEC)):
        c, gap, pull = affine_terms(block_of(row, i, BLOCK, VEC), row, xt, constants)
        gaps += gap
        pulls += c * pull
    edge_c, edge_gap, edge_pull = affine_terms(edge_of(row, VEC), row, xt, constants)
    if WITH_GRAD:
        mass = unit * (tl.sum(pulls, 0).to(tl.float64) + tl.sum(edge_c * edge_pull, 0))
        gradient = (unit.to(f32), (mass + apart_mass).to(f32))
        for i in range(num_blocks(row, BLOCK, VEC)):
            affine_store(block_of(row, i, BLOCK, VEC), row, xt, constants, gradient)
        affine_store(edge_of(row, VEC), row, xt, constants, gradient)
        grad_x0 -= share_x0 * mass.to(f32)
        grad_xt -= share_xt * mass.to(f32)
        store_apart(row, grad_x0, grad_x0 * 0 if MIXED else tl.where(moved, grad_xt, grad_x0))
        if MIXED:
            store_at(row, tl.where(apart, xt, -1), grad_xt)
    return a * (tl.sum(gaps, 0).to(tl.float64) + tl.sum(edge_gap, 0)) + value


# ---------------------------------------------------------------------------------------------------------
# The kernel.


@triton.jit(do_not_specialize=["all_states"])
def row_loss_kernel(
    Z,  # [rows, V], row r at (r // inner) * stride_outer + (r % inner) * stride_inner
    X0,  # int64 [rows]
    XT,  # int64 [rows] or None
    MASK,  # bool [rows] or None
    SIGMA,  # float64 [rows] or None
    WEIGHT,  # float64 [rows] or None
    ENTROPY_WEIGHT,  # float64 [rows] or None
    EXTRA,  # float64 [rows] or None
    SCALE,  # float64 [], a factor of every loss
    LOSS,  # float32 or float64 [rows]
    GRAD,  # [rows, V] contiguous; anything without gradient
    STATS,  # float32 [4, rows] or None
    V,
    all_states,  # V, or of how many numbers a row of Z is a part: then x0 and XT may be negative, as row_losses_ has it
    inner,
    stride_outer,
    stride_inner,
    mask_index,
    ignore_index,
    penalty,
    FUNCTOR: tl.constexpr,
    EXCLUDE_MASK: tl.constexpr,
    SCALE_BY_SIGMA: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    IN_PLACE: tl.constexpr,  # whether GRAD is Z
    CONTIGUOUS: tl.constexpr,  # whether rows of Z lie as those of GRAD, and are aligned alike
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    SOFTMAX: tl.constexpr = FUNCTOR == "dce" or FUNCTOR == "loo"
    AFFINE: tl.constexpr = FUNCTOR == "dse_uniform_logits" or FUNCTOR == "d3pm_uniform" or FUNCTOR == "mixture"
    # Masks are scored, or all tokens; the id that is treated apart is the mask, or x_t.
    MASKED: tl.constexpr = FUNCTOR == "dce" or FUNCTOR == "dse_absorb" or FUNCTOR == "csm_absorb"
    x0 = tl.load(X0 + r)
    scored = x0 != ignore_index
    if MASK is not None:
        scored &= tl.load(MASK + r) != 0
    xt = tl.full((), -1, tl.int64)
    if XT is not None:
        xt = tl.load(XT + r)
        if MASKED and MASK is None:
            scored &= xt == mask_index
    excluded = xt
    if MASKED or FUNCTOR == "mixture":
        excluded = tl.full((), -1, tl.int64)
        if EXCLUDE_MASK:
            excluded += mask_index + 1
    least = tl.where(all_states == V, 0, -1)
    x0 = tl.where((x0 >= least) & (x0 < V), x0, -2).to(tl.int32)  # no such id: the loss will be NaN
    excluded = tl.where((excluded >= -1) & (excluded < V), excluded, -3).to(tl.int32)
    xt = tl.where((xt >= -1) & (xt < V), xt, -3).to(tl.int32)

    start, grad_start = (r // inner) * stride_outer + (r % inner) * stride_inner, r * V
    head = tl.minimum((VEC - start % VEC) % VEC, V)
    groups = ((V - head) // VEC).to(tl.int32)
    grad_aligned = GRAD + (grad_start + head)
    if CONTIGUOUS:
        grad_aligned = GRAD + tl.multiple_of(grad_start + head, VEC)
    z_aligned = Z + tl.multiple_of(start + head, VEC)
    row = (Z + start, GRAD + grad_start, z_aligned, grad_aligned, head.to(tl.int32), groups, V, x0, excluded)

    loss = tl.full((), 0.0, tl.float64)
    logsumexp, entropy, correct, nll = loss, loss, loss, loss
    if scored:
        weight = tl.load(SCALE)
        if WEIGHT is not None:
            weight *= tl.load(WEIGHT + r)
        zero = tl.full((), 0.0, tl.float64)
        sigma, extra, offset, entropy_weight = zero, zero, zero, zero
        if SIGMA is not None:
            sigma = tl.load(SIGMA + r)
        if EXTRA is not None:
            extra = tl.load(EXTRA + r)
        if SOFTMAX:
            if SIGMA is not None:
                _, _, inv_e1 = survival(sigma)
                if FUNCTOR == "loo":
                    offset = log1p_(V * inv_e1)
                else:  # conditionals as scores: DSE of log c - log e1 is DCE / e1
                    weight *= inv_e1
            WITH_ENTROPY: tl.constexpr = ENTROPY_WEIGHT is not None
            if WITH_ENTROPY:
                entropy_weight = tl.load(SCALE) * tl.load(ENTROPY_WEIGHT + r)
            loss, logsumexp, entropy, correct, nll = softmax_row(
                row, weight, entropy_weight, penalty, offset, FUNCTOR == "loo", WITH_GRAD, STATS is not None,
                WITH_ENTROPY, BLOCK, VEC,
            )  # fmt: skip
        elif AFFINE:
            loss = affine_row(row, xt, weight, sigma, extra, penalty, FUNCTOR, WITH_GRAD, BLOCK, VEC)
        else:
            loss = scores_row(row, weight, sigma, all_states, FUNCTOR, SCALE_BY_SIGMA, WITH_GRAD, IN_PLACE, BLOCK, VEC)
    elif WITH_GRAD:
        zero_grad(row, BLOCK, VEC)
    tl.store(LOSS + r, loss.to(LOSS.dtype.element_ty))
    if STATS is not None:
        rows = tl.num_programs(0)
        tl.store(STATS + r, logsumexp.to(tl.float32))
        tl.store(STATS + rows + r, entropy.to(tl.float32))
        tl.store(STATS + 2 * rows + r, correct.to(tl.float32))
        tl.store(STATS + 3 * rows + r, nll.to(tl.float32))


@triton.jit
def scale_kernel(GRAD, FACTOR, size, BLOCK: tl.constexpr):
    """Multiplies in place, and returns at once if the factor is 1."""
    factor = tl.load(FACTOR)
    if factor != 1:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        exists = offsets < size
        x = tl.load(GRAD + offsets, mask=exists).to(tl.float32)
        tl.store(GRAD + offsets, x * factor.to(tl.float32), mask=exists)


# ---------------------------------------------------------------------------------------------------------
# Launches.

# Numbers of a row that a program holds at a time, and its warps: two 16-byte loads a thread before the first use, and
# few enough registers that nothing spills. Vocabularies of one block (bytes, characters, DNA) take a small one.
SMALL = dict(BLOCK=1024, num_warps=4)
LARGE = {2: dict(BLOCK=4096, num_warps=8), 4: dict(BLOCK=2048, num_warps=8)}  # by the bytes of a number
SCALE = dict(BLOCK=4096, num_warps=8)
# Whose constants take registers, too; a large block spills some, which rows so long need for the digits of their sums.
AFFINE = ("dse_uniform_logits", "d3pm_uniform", "mixture")


def config(functor: str, num_states: int, size: int) -> dict[str, int]:
    """Of the kernel, for numbers of so many bytes."""
    few = num_states < 2**18 if functor in AFFINE else num_states <= SMALL["BLOCK"]
    return SMALL if few else LARGE[size]


def launch_row_loss(
    z: Tensor,
    x0: Tensor,
    xt: Tensor | None,
    mask: Tensor | None,
    sigma: Tensor | None,
    weight: Tensor | None,
    entropy_weight: Tensor | None,
    extra: Tensor | None,
    scale: Tensor,
    loss: Tensor,
    grad: Tensor | None,
    stats: Tensor | None,
    functor: str,
    mask_index: int,
    exclude_mask: bool,
    ignore_index: int,
    scale_by_sigma: bool,
    penalty: float,
    all_states: int,
) -> None:
    num_states = z.shape[-1]
    row_loss_kernel[(x0.numel(),)](
        z, x0, xt, mask, sigma, weight, entropy_weight, extra, scale, loss, z if grad is None else grad, stats,
        num_states, all_states, *row_strides(z), mask_index, ignore_index, penalty,
        FUNCTOR=functor, EXCLUDE_MASK=exclude_mask, SCALE_BY_SIGMA=scale_by_sigma, WITH_GRAD=grad is not None,
        IN_PLACE=grad is z, CONTIGUOUS=z.is_contiguous(),
        **for_rows(config(functor, num_states, z.element_size()), z.element_size()),
    )  # fmt: skip


def row_strides(z: Tensor) -> tuple[int, int, int]:
    """How rows lie: row r at (r // inner) * stride_outer + (r % inner) * stride_inner."""
    return max(z.shape[-2], 1), 0 if z.dim() == 2 else z.stride(0), z.stride(-2)


def launch_scale(grad: Tensor, factor: Tensor) -> None:
    scale_kernel[(triton.cdiv(grad.numel(), SCALE["BLOCK"]),)](grad, factor, grad.numel(), **SCALE)
