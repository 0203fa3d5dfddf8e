"""Tokens drawn from rows in Triton, one program a row. Twin of the reference in fastdiff/ops/row_sample.py.

Ids with the same v mod CLASSES are a class, and classes race first. A row is walked as in rows.py, in tiles of
BLOCK lanes, a multiple of CLASSES, so that a lane only meets ids of one class: the sums of the classes are what each
lane adds up for itself, and nothing is reduced before the end of the row.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.maths import LOG2_E, log1p_
from fastdiff.kernels.philox import draw, draw_at, stream, threshold
from fastdiff.kernels.rows import LARGE, row_strides
from fastdiff.kernels.survey import NO_ID, merge, survey
from fastdiff.kernels.targets import for_rows
from fastdiff.kernels.walk import CLASSES, strike
from fastdiff.kernels.weights import class_sums, least_kept, weights
from fastdiff.philox import Purpose

RACE = tl.constexpr(int(Purpose.RACE))
STEP = tl.constexpr(int(Purpose.STEP))
MEMBERS = tl.constexpr(128)  # ids of a class that race at a time


@triton.jit
def exponential(draws):
    """-log of a uniform, from whichever end of (0, 1) keeps its digits."""
    near_0 = draws < 2147483648
    u = (tl.where(near_0, draws, draws ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-32
    return tl.where(near_0, -log1p_(-u), -tl.log(u))


@triton.jit
def first_of_least(times, ids):
    return tl.min(tl.where(times == tl.min(times, 0), ids, NO_ID), 0)


@triton.jit
def race(row, sums, how, names, position, KEPT: tl.constexpr, LAW: tl.constexpr, TWO_SUMS: tl.constexpr):
    """An id, from the sums of the classes in their lanes."""
    z, head, V = row[0], row[2], row[4]
    k0, k1, sample, purpose_step = names
    classes = tl.arange(0, CLASSES)
    sums = tl.gather(sums, (classes - head) & (CLASSES - 1), 0)
    draws = draw(k0, k1, sample, purpose_step, 0, CLASSES, position)
    winner = first_of_least(exponential(draws) / sums, classes)
    absent: tl.constexpr = float("nan") if LAW else float("-inf")
    best, token = tl.full((), float("inf"), tl.float32), winner
    for first in range(winner, V, MEMBERS * CLASSES):
        ids = first + tl.arange(0, MEMBERS) * CLASSES
        x = tl.load(z + ids, mask=ids < V, other=absent).to(tl.float32)
        w = weights(strike(x, ids, 0, V, absent, row), how, KEPT, LAW, TWO_SUMS)[0]
        times = exponential(draw_at(k0, k1, sample, purpose_step, position, ids + CLASSES)) / w
        least, id = tl.min(times, 0), first_of_least(times, ids)
        token, best = tl.where(least < best, id, token), tl.minimum(least, best)
    return token


@triton.jit
def load_here(row, log_here):
    """log_here, or if it is NaN what stands at x_t, in float64."""
    z, _, _, _, V, exclude, num_excluded, _, xt = row
    here = tl.load(z + xt, mask=(xt >= 0) & (xt < V), other=float("nan")).to(tl.float64)
    for i in range(num_excluded):
        here = tl.where(tl.load(exclude + i) == xt, float("-inf"), here)
    return tl.where(log_here == log_here, log_here, here)


@triton.jit
def law_terms(law, here, top, others):
    """What a law makes of a row, in units of exp(shift), float64, from the z it has at x_t and the sum of exp(z - top)
    over the others: shift, exp(top), what x_t weighs, that sum, the total T, and theta T."""
    theta, kappa, lam, _ = law
    shift = tl.where(here > top, here, top).to(tl.float32).to(tl.float64)  # what the loops subtract, in float32
    e_top, e_here = tl.exp(top - shift), tl.exp(here - shift)
    others = others * e_top
    total = others + e_here
    stay = kappa * e_here - lam * total
    return shift, e_top, tl.where(stay < 0, 0.0, stay), others, total, theta * total


@triton.jit
def first_id(row, best):
    """The first of the largest numbers; if none is above LOWEST, the first that is not left out."""
    ids = tl.arange(0, MEMBERS)
    present = strike(tl.zeros((MEMBERS,), tl.float32), ids, 0, MEMBERS, float("nan"), row) == 0
    return tl.where(best == NO_ID, tl.min(tl.where(present, ids, NO_ID), 0), best).to(tl.int64)


@triton.jit
def reverse(
    row, m, s, top, total, law, scale, step_draw,
    TWO_SUMS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Under a law whether x_t is replaced, then the sums of classes and `how` of the race of what replaces it."""
    theta, _, _, log_here = law
    shift, e_top, stay, jump, total, cut = law_terms(
        law, load_here(row, log_here), top.to(tl.float64), total.to(tl.float64)
    )
    sums, origin, log_largest = s * tl.exp2((m - top) * scale), top, tl.full((), 0.0, tl.float32)
    if theta != 0:
        origin, log_largest = shift.to(tl.float32), tl.log2(e_top - cut).to(tl.float32)
        how = (origin, scale, float("-inf"), cut.to(tl.float32), log_largest)
        sums, sums1 = class_sums(row, how, False, True, TWO_SUMS, BLOCK, VEC)
        jump = tl.sum(sums1, 0).to(tl.float64)
    possible = (total > 0) & (stay + jump < float("inf")) & (jump > 0) & ((theta == 0) | (e_top > cut))
    moves = possible & (step_draw.to(tl.int64) >= threshold(stay / (stay + jump)))
    return moves, sums, (origin, scale, float("-inf"), cut.to(tl.float32), log_largest)


# ---------------------------------------------------------------------------------------------------------
# The kernel.


@triton.jit(do_not_specialize=["num_excluded", "temperature", "top_k", "top_p"])
def row_sample_kernel(
    Z,  # [rows, V], row r at (r // inner) * stride_outer + (r % inner) * stride_inner
    XT,  # int64 [rows]
    LIVE,  # bool [rows]
    LAW,  # float64 [rows, 4] or None
    EXCLUDE,  # int64 [num_excluded]
    SEED,  # int64 []
    STEP_NUMBER,  # int64 []
    SAMPLE_IDS,  # int64 [rows]
    POSITIONS,  # int64 [rows]
    TOKENS,  # int64 [rows]
    ARGMAX,  # int64 [rows] or None
    STATS,  # float32 [3, rows] or None
    V,
    num_excluded,
    inner,
    stride_outer,
    stride_inner,
    temperature,  # 1 if GREEDY
    top_k,
    top_p,
    GREEDY: tl.constexpr,
    TWO_SUMS: tl.constexpr,  # whether sums at the temperature are not all: those at temperature 1 are needed too
    KEPT: tl.constexpr,  # whether top_k or top_p is on
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    xt = tl.load(XT + r)
    token, argmax = xt, xt
    probability = tl.full((), 0.0, tl.float32)
    gap, negentropy = probability, probability
    if tl.load(LIVE + r) != 0:
        start = (r // inner) * stride_outer + (r % inner) * stride_inner
        head = tl.minimum((VEC - start % VEC) % VEC, V)
        head = tl.where(V <= CLASSES, 0, head).to(tl.int32)  # short rows are all edge
        groups = tl.where(V <= CLASSES, 0, (V - head) // VEC)
        aligned = Z + tl.multiple_of(start + head, VEC)
        apart, num_struck = tl.full((), -1, tl.int32), num_excluded
        if LAW is not None:
            apart, num_struck = tl.where((xt >= 0) & (xt < V), xt, -1).to(tl.int32), num_excluded + 1
        row = (Z + start, aligned, head, groups, V, EXCLUDE, num_excluded, num_struck, apart)

        scale = LOG2_E / temperature
        state = survey(row, scale, TWO_SUMS, GREEDY or STATS is not None, STATS is not None, BLOCK, VEC)
        top, total, total1, u, second, best = merge(state, scale, TWO_SUMS)
        goes = (total > 0) & (total < float("inf"))
        seed, step, sample_id = tl.load(SEED), tl.load(STEP_NUMBER), tl.load(SAMPLE_IDS + r)
        position = tl.load(POSITIONS + r)
        how = (top, scale, float("-inf"), 0.0, 0.0)
        if LAW is not None:
            law = (tl.load(LAW + 4 * r), tl.load(LAW + 4 * r + 1), tl.load(LAW + 4 * r + 2), tl.load(LAW + 4 * r + 3))
            k0, k1, sample, purpose_step = stream(seed, STEP, step, sample_id)
            step_draw = draw_at(k0, k1, sample, purpose_step, 0, position)
            goes, sums, how = reverse(row, state[0], state[1], top, total1, law, scale, step_draw, TWO_SUMS, BLOCK, VEC)
        if goes:
            if GREEDY:
                token = first_id(row, best)
            else:
                if KEPT:
                    least = least_kept(row, top, total, scale, top_k, top_p, Z.dtype.element_ty, BLOCK, VEC)
                    how = (top, scale, least, 0.0, 0.0)
                    sums = class_sums(row, how, True, False, False, BLOCK, VEC)[0]
                elif LAW is None:
                    sums = state[1] * tl.exp2((state[0] - top) * scale)
                names = stream(seed, RACE, step, sample_id)
                token = race(row, sums, how, names, position.to(tl.uint32), KEPT, LAW is not None, TWO_SUMS)
                token = token.to(tl.int64)
            if STATS is not None:
                argmax = first_id(row, best)
                z_token = tl.load(Z + start + token).to(tl.float32)
                probability = tl.exp2((z_token - top) * LOG2_E) / total1
                gap = (1 - tl.exp2((second - top) * LOG2_E)) / total1
                negentropy = u / total1 - tl.log(total1)
    tl.store(TOKENS + r, token)
    if STATS is not None:
        tl.store(ARGMAX + r, argmax)
        rows = tl.num_programs(0).to(tl.int64)
        tl.store(STATS + r, probability)
        tl.store(STATS + rows + r, gap)
        tl.store(STATS + 2 * rows + r, negentropy)


# ---------------------------------------------------------------------------------------------------------
# Launches.

# Lanes and warps of a program with more in its registers than a maximum and a sum for each lane. Left to itself the
# assembler takes fewer registers, to run more programs at a time, and then spills.
CAREFUL = dict(BLOCK=2048, num_warps=8, maxnreg=128)


def launch_row_sample(
    z: Tensor,
    xt: Tensor,
    live: Tensor,
    law: Tensor | None,
    exclude: Tensor | None,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    positions: Tensor,
    tokens: Tensor,
    argmax: Tensor | None,
    stats: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    greedy, careful = temperature == 0, stats is not None or law is not None
    kept = top_k > 0 or top_p < 1
    row_sample_kernel[(xt.numel(),)](
        z, xt, live, law, xt if exclude is None else exclude, seed, step, sample_ids, positions, tokens, argmax, stats,
        z.shape[-1], 0 if exclude is None else len(exclude), *row_strides(z),
        1.0 if greedy else temperature, top_k, max(top_p, 2.0**-126),
        GREEDY=greedy, TWO_SUMS=temperature not in (0, 1) and careful, KEPT=kept,
        **for_rows(CAREFUL if careful or kept else LARGE[z.element_size()], z.element_size()),
    )  # fmt: skip
