"""Losses of log scores: a sum of terms, loss and gradient from one pass."""

import triton
import triton.language as tl

from fastdiff.kernels.maths import log1p_, scaled_phi, survival, weight_parts
from fastdiff.kernels.rows import EXCLUDED, X0, block_of, edge_of, load_at, num_blocks, store_apart


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
    return tl.where(exists & (ids != row[X0]) & (ids != row[EXCLUDED]), value, 0.0)


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
        moved, k = row[X0] != row[EXCLUDED], all_states * inv_e1
        log_r = tl.where(k < float("inf"), -log1p_(k), 0.0)  # with sigma = 0 r is 0, and log r is not needed
        a, log_a = tl.where(moved, 1.0, 1 / (1 + k)), tl.where(moved, 0.0, log_r)
        a_x0, log_a_x0 = 1 + k, -log_r
    else:
        a, log_a, a_x0, log_a_x0 = shift * 0, shift * 0, inv_e1, -log_e1
    if FUNCTOR == "dse_uniform":
        weight /= all_states

    s_x0 = load_at(row, row[X0])
    if WITH_GRAD:
        tl.debug_barrier()  # a gradient in the place of its row must not come before this
    shift_x0, a_x0, factor = shared(shift, a_x0, weight, SQUARED)
    at_x0, slope_x0 = score_term(s_x0 - shift_x0, s_x0 - shift - log_a_x0, a_x0, 1e-2, SQUARED)
    at_x0 = tl.where((row[X0] == row[EXCLUDED]) | (row[X0] == -1), 0.0, at_x0)
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
