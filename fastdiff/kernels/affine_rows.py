"""Losses that are affine in conditionals: two sums in sequence, then the gradient. AffineRow of csrc/affine.h has the
formulas."""

import triton
import triton.language as tl

from fastdiff.kernels.maths import LOG2_E, gap_at, log1p_, log_gap, survival
from fastdiff.kernels.rows import (
    EXCLUDED,
    SIZE,
    X0,
    block_of,
    edge_of,
    load_at,
    load_part,
    num_blocks,
    store_apart,
    store_at,
    sum_exp,
)


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
    live = exists & (ids != row[X0]) & (ids != row[EXCLUDED]) & (ids != xt)
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
    moved = row[X0] != xt
    apart = moved & (xt != row[EXCLUDED]) if MIXED else moved
    at_x0, at_xt, n = load_at(row, row[X0]), tl.where(apart, load_at(row, xt), float("-inf")), row[SIZE].to(tl.float64)
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
