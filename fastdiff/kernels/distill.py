"""Distillation in Triton, one program a pair of rows. Twin of csrc/distill.h and csrc/cpu/distill.cpp, which say more.

Rows are walked as rows.py says; the teacher's may start anywhere beside the student's. Later passes find both in
the second-level cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.maths import LOG2_E, log1p_
from fastdiff.kernels.rows import LOWEST, SMALL, row_strides
from fastdiff.kernels.targets import for_rows

INF = tl.constexpr(float("inf"))

# ---------------------------------------------------------------------------------------------------------
# The mathematics, of float32 along a row and of float64.


@triton.jit
def near_phi(d):
    """expm1(d) - d for |d| < 1."""
    series = 1 / 720 + d * (1 / 5040 + d * (1 / 40320 + d * (1 / 362880 + d * (1 / 3628800))))
    return d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * series))))


@triton.jit
def kl_term(p, q, d):
    """p phi(d) and q - p, d = log q - log p. Infinite where q is 0 and p is not."""
    difference, phi = q - p, near_phi(d)
    near = tl.abs(d) < 1
    value = tl.where(near, p * phi, difference - p * tl.where(d > 1000, 1000.0, d))  # where p is 0
    return tl.where(d == -INF, INF, value), tl.where(near, p * (phi + d), difference)


@triton.jit
def log_ratio(log_q, log_p):
    return tl.where(log_q == log_p, 0.0, log_q - log_p)


@triton.jit
def online(m, s, x, rate):
    """Adds 2^(rate x) to the sum s 2^(rate m), number by number. Scaled are differences alone, as on the CPU."""
    e = tl.exp2(-tl.abs(x - m) * rate)
    larger = x > m
    return tl.where(larger, x, m), tl.where(larger, s * e + 1, s + e)


# ---------------------------------------------------------------------------------------------------------
# Walking a pair. `pair` is (z, teacher, grad, their first aligned groups, head, groups, V, excluded, scale,
# scale * log2(e)).


@triton.jit
def block_of(pair, i, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Pointers into both rows and the gradient, ids, and which exist, of block i of the groups."""
    offsets = i * BLOCK + tl.arange(0, BLOCK)
    return pair[3] + offsets, pair[4] + offsets, pair[5] + offsets, pair[6] + offsets, offsets // VEC < pair[7]


@triton.jit
def edge_of(pair, VEC: tl.constexpr):
    """The same of what lies before the first group and after the last."""
    i = tl.arange(0, 2 * VEC)
    before = i < VEC
    ids = tl.where(before, i, pair[6] + pair[7] * VEC + i - VEC)
    return pair[0] + ids, pair[1] + ids, pair[2] + ids, ids, tl.where(before, i < pair[6], ids < pair[8])


@triton.jit
def num_blocks(pair, BLOCK: tl.constexpr, VEC: tl.constexpr):
    return tl.cdiv(pair[7] * VEC, BLOCK)


@triton.jit
def load(pointers, part, pair):
    """Numbers of a row that is read again; -inf at the excluded id, and where there is none."""
    x = tl.load(pointers, mask=part[4], other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
    return tl.where(part[3] == pair[9], float("-inf"), x)


@triton.jit
def merged(m, s, m_edge, s_edge, rate):
    """Maximum of all lanes, and the sum, float64; NaN for a row that has +inf or only -inf."""
    top = tl.maximum(tl.max(m, 0), tl.max(m_edge, 0))
    total = tl.sum(s * tl.exp2((m - top) * rate), 0) + tl.sum(s_edge * tl.exp2((m_edge - top) * rate), 0)
    return top, total.to(tl.float64)


@triton.jit
def store_zeros(pair, BLOCK: tl.constexpr, VEC: tl.constexpr):
    for i in range(num_blocks(pair, BLOCK, VEC)):
        part = block_of(pair, i, BLOCK, VEC)
        tl.store(part[2], tl.zeros((BLOCK,), tl.float32), mask=part[4])
    part = edge_of(pair, VEC)
    tl.store(part[2], tl.zeros((2 * VEC,), tl.float32), mask=part[4])


# ---------------------------------------------------------------------------------------------------------
# Two rows.


@triton.jit
def sums_of(part, pair, m, s, m_teacher, s_teacher):
    m, s = online(m, s, load(part[0], part, pair), pair[11])
    m_teacher, s_teacher = online(m_teacher, s_teacher, load(part[1], part, pair), pair[11])
    return m, s, m_teacher, s_teacher


@triton.jit
def probabilities(part, pair, constants):
    """q, p and log q - log p."""
    top, factor, top_teacher, factor_teacher, base, base_teacher, shift = constants
    z, t = load(part[0], part, pair), load(part[1], part, pair)
    q, p = tl.exp2((z - top) * pair[11]) * factor, tl.exp2((t - top_teacher) * pair[11]) * factor_teacher
    x, y = z - base, t - base_teacher
    return q, p, tl.where(x == y, -shift, (x - y) * pair[10] - shift)


@triton.jit
def terms_of(part, pair, constants, REVERSE: tl.constexpr):
    """The loss's terms and, of the forward one, its slopes."""
    q, p, d = probabilities(part, pair, constants)
    if REVERSE:
        return kl_term(q, p, -d)
    return kl_term(p, q, d)


@triton.jit
def reverse_slopes(part, pair, constants, loss):
    q, _, d = probabilities(part, pair, constants)
    return tl.where(q == 0, 0.0, q * (d - loss))


@triton.jit
def distill_row(pair, weight, REVERSE: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    m, s = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    m_edge, s_edge = tl.full((2 * VEC,), LOWEST, tl.float32), tl.zeros((2 * VEC,), tl.float32)
    m_teacher, s_teacher, m_teacher_edge, s_teacher_edge = m, s, m_edge, s_edge
    for i in range(num_blocks(pair, BLOCK, VEC)):
        m, s, m_teacher, s_teacher = sums_of(block_of(pair, i, BLOCK, VEC), pair, m, s, m_teacher, s_teacher)
    edge = edge_of(pair, VEC)
    m_edge, s_edge, m_teacher_edge, s_teacher_edge = sums_of(edge, pair, m_edge, s_edge, m_teacher_edge, s_teacher_edge)
    f32 = tl.float32
    top, total = merged(m, s, m_edge, s_edge, pair[11])
    top_teacher, total_teacher = merged(m_teacher, s_teacher, m_teacher_edge, s_teacher_edge, pair[11])
    apart = (top.to(tl.float64) - top_teacher) * pair[10]
    far = tl.abs(apart) > 100  # then log q - log p comes from what each number is less its top
    base, base_teacher = tl.where(far, top, 0.0), tl.where(far, top_teacher, 0.0)
    shift = tl.where(far, 0.0, apart) + (tl.log(total) - tl.log(total_teacher))
    factor, factor_teacher = (
        1 / tl.where(total > 0, total, float("nan")),
        1 / tl.where(total_teacher > 0, total_teacher, float("nan")),
    )
    constants = (top, factor.to(f32), top_teacher, factor_teacher.to(f32), base, base_teacher, shift.to(f32))
    size = (weight * pair[10]).to(f32)

    # In place, a number must be read by all warps, which all read the edges, before any writes there.
    edge_values, edge_slopes = terms_of(edge, pair, constants, REVERSE)
    values = tl.zeros((BLOCK,), tl.float32)
    for i in range(num_blocks(pair, BLOCK, VEC)):
        part = block_of(pair, i, BLOCK, VEC)
        value, slope = terms_of(part, pair, constants, REVERSE)
        values += value
        if WITH_GRAD and not REVERSE:
            tl.store(part[2], size * slope, mask=part[4])
    loss = tl.sum(values, 0).to(tl.float64) + tl.sum(edge_values, 0)
    if WITH_GRAD:
        if REVERSE:
            edge_slopes = reverse_slopes(edge, pair, constants, loss.to(f32))
            for i in range(num_blocks(pair, BLOCK, VEC)):
                part = block_of(pair, i, BLOCK, VEC)
                tl.store(part[2], size * reverse_slopes(part, pair, constants, loss.to(f32)), mask=part[4])
        tl.debug_barrier()
        tl.store(edge[2], size * edge_slopes, mask=edge[4])
    return weight * loss


# ---------------------------------------------------------------------------------------------------------
# A row, and the teacher's log-probabilities at some ids, in rising order; all others are one outcome.


@triton.jit
def rest_of(pair, IDS, many, chosen, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Maximum and sum of exponentials of the ids that are not chosen."""
    edge = edge_of(pair, VEC)
    x_edge = load(edge[0], edge, pair)
    x_edge = tl.where(tl.sum((edge[3][:, None] == chosen[None, :]).to(tl.int32), 1) > 0, float("-inf"), x_edge)
    m_edge, s_edge = tl.full((2 * VEC,), LOWEST, tl.float32), tl.zeros((2 * VEC,), tl.float32)
    m_edge, s_edge = online(m_edge, s_edge, x_edge, pair[11])
    m, s = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    next_one = tl.sum((chosen < pair[6]).to(tl.int32), 0)  # after those in the edge before
    for i in range(num_blocks(pair, BLOCK, VEC)):
        part = block_of(pair, i, BLOCK, VEC)
        x = load(part[0], part, pair)
        end = pair[6] + (i + 1) * BLOCK
        id = tl.load(IDS + next_one, mask=next_one < many, other=end)
        while id < end:
            x = tl.where(part[3] == id, float("-inf"), x)
            next_one += 1
            id = tl.load(IDS + next_one, mask=next_one < many, other=end)
        m, s = online(m, s, x, pair[11])
    return merged(m, s, m_edge, s_edge, pair[11])


@triton.jit
def slope_of(log_p, log_q, loss, REVERSE: tl.constexpr):
    q, d = tl.exp(log_q), log_ratio(log_q, log_p)
    if REVERSE:
        return tl.where(q == 0, 0.0, q * (d - loss))
    _, slope = kl_term(tl.exp(log_p), q, d)
    return slope


@triton.jit
def value_of(log_p, log_q, REVERSE: tl.constexpr):
    p, q, d = tl.exp(log_p), tl.exp(log_q), log_ratio(log_q, log_p)
    value, _ = kl_term(p, q, d)
    if REVERSE:
        value, _ = kl_term(q, p, -d)
    return value


@triton.jit
def store_share(part, pair, top, factor):
    x = load(part[0], part, pair)
    tl.store(part[2], factor * tl.exp2((x - top) * pair[11]), mask=part[4])


@triton.jit
def distill_row_at(
    pair, IDS, TEACHER, many, weight,
    REVERSE: tl.constexpr, WITH_GRAD: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, MANY)
    given = j < many
    chosen = tl.load(IDS + j, mask=given, other=2**31 - 1)
    exists = given & (chosen >= 0) & (chosen < pair[8])
    log_p = tl.load(TEACHER + j, mask=given, other=float("-inf"))
    z = tl.load(pair[0] + chosen, mask=exists, other=float("nan")).to(tl.float64)
    z = tl.where(given, z, float("-inf"))
    top, rest = rest_of(pair, IDS, many, chosen, BLOCK, VEC)
    highest = tl.maximum(top.to(tl.float64), tl.max(z, 0))
    total = rest * tl.exp((top - highest) * pair[10]) + tl.sum(tl.exp((z - highest) * pair[10]), 0)
    log_total = tl.log(tl.where(total > 0, total, float("nan")))
    sum_p = tl.sum(tl.exp(log_p), 0)
    are_all = many == pair[8] - tl.where(pair[9] >= 0, 1, 0)  # or above 1: off by rounding
    log_p -= tl.where(are_all | (sum_p > 1), tl.log(sum_p), 0.0)
    log_q = (z - highest) * pair[10] - log_total
    log_p_rest = tl.where(are_all | (sum_p >= 1), -INF, log1p_(-tl.where(sum_p < 1, sum_p, 0.5)))
    log_q_rest = (top - highest) * pair[10] + tl.log(rest) - log_total
    loss = tl.sum(value_of(log_p, log_q, REVERSE), 0) + value_of(log_p_rest, log_q_rest, REVERSE)
    if WITH_GRAD:
        factor = weight * pair[10]
        share = tl.where(rest == 0, 0.0, factor * slope_of(log_p_rest, log_q_rest, loss, REVERSE) / rest)
        share = share.to(tl.float32)
        edge = edge_of(pair, VEC)
        x_edge = load(edge[0], edge, pair)
        tl.debug_barrier()  # a gradient in the place of its row must not come before this
        for i in range(num_blocks(pair, BLOCK, VEC)):
            store_share(block_of(pair, i, BLOCK, VEC), pair, top, share)
        tl.store(edge[2], share * tl.exp2((x_edge - top) * pair[11]), mask=edge[4])
        tl.debug_barrier()
        slopes = factor * slope_of(log_p, log_q, loss, REVERSE)
        tl.store(pair[2] + chosen, slopes.to(tl.float32), mask=exists)
    return weight * loss


# ---------------------------------------------------------------------------------------------------------
# The kernel and its launch.


@triton.jit
def row_distill_kernel(
    Z,  # [rows, V], row r at (r // inner) * stride_outer + (r % inner) * stride_inner
    TEACHER,  # the same with strides of its own; with IDS float64 [rows, many]
    IDS,  # int64 [rows, many] or None
    MASK,  # bool [rows] or None
    WEIGHT,  # float64 [rows] or None
    SHARE,  # float64 [], a factor of every loss
    LOSS,  # float32 or float64 [rows]
    GRAD,  # [rows, V] contiguous; anything without gradient
    V,
    many,
    inner,
    stride_outer,
    stride_inner,
    teacher_inner,
    teacher_stride_outer,
    teacher_stride_inner,
    mask_index,
    scale,
    REVERSE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # whether rows of Z lie as those of GRAD, and are aligned alike
    ALIKE: tl.constexpr,  # the same of Z and TEACHER
    MANY: tl.constexpr,  # a power of 2 >= many
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    start, grad_start = (r // inner) * stride_outer + (r % inner) * stride_inner, r * V
    head = tl.minimum((VEC - start % VEC) % VEC, V)
    groups = ((V - head) // VEC).to(tl.int32)
    z_aligned = Z + tl.multiple_of(start + head, VEC)
    grad_aligned = GRAD + (grad_start + head)
    if CONTIGUOUS:
        grad_aligned = GRAD + tl.multiple_of(grad_start + head, VEC)
    teacher, teacher_aligned = Z + start, z_aligned  # not read with IDS
    if IDS is None:
        teacher_start = (r // teacher_inner) * teacher_stride_outer + (r % teacher_inner) * teacher_stride_inner
        teacher, teacher_aligned = TEACHER + teacher_start, TEACHER + (teacher_start + head)
        if ALIKE:
            teacher_aligned = TEACHER + tl.multiple_of(teacher_start + head, VEC)
    pair = (
        Z + start, teacher, GRAD + grad_start, z_aligned, teacher_aligned, grad_aligned,
        head.to(tl.int32), groups, V, mask_index, scale, scale * LOG2_E,
    )  # fmt: skip
    scored = r >= 0
    if MASK is not None:
        scored = tl.load(MASK + r) != 0
    loss = tl.full((), 0.0, tl.float64)
    if scored:
        weight = tl.load(SHARE)
        if WEIGHT is not None:
            weight *= tl.load(WEIGHT + r)
        if IDS is None:
            loss = distill_row(pair, weight, REVERSE, WITH_GRAD, BLOCK, VEC)
        else:
            loss = distill_row_at(
                pair, IDS + r * many, TEACHER + r * many, many, weight, REVERSE, WITH_GRAD, MANY, BLOCK, VEC
            )
    elif WITH_GRAD:
        store_zeros(pair, BLOCK, VEC)
    tl.store(LOSS + r, loss.to(LOSS.dtype.element_ty))


# Of each row one 16-byte load a thread before the first use. By the bytes of a number; maxnreg as in row_sample.py.
LARGE = {2: dict(BLOCK=2048, num_warps=8, maxnreg=128), 4: dict(BLOCK=1024, num_warps=8)}


def launch_row_distill(
    z: Tensor,
    teacher: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    share: Tensor,
    loss: Tensor,
    grad: Tensor | None,
    reverse: bool,
    mask_index: int,
    scale: float,
) -> None:
    num_states, many = z.shape[-1], teacher.shape[-1]
    row_distill_kernel[(loss.numel(),)](
        z, teacher, ids, mask, weight, share, loss, z if grad is None else grad,
        num_states, many, *row_strides(z), *row_strides(teacher), mask_index, scale,
        REVERSE=reverse, WITH_GRAD=grad is not None, CONTIGUOUS=z.is_contiguous(),
        ALIKE=z.is_contiguous() and teacher.is_contiguous(),
        MANY=1 if ids is None else triton.next_power_of_2(many),
        **for_rows(SMALL if num_states <= SMALL["BLOCK"] else LARGE[z.element_size()], z.element_size()),
    )  # fmt: skip
