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
from fastdiff.kernels.rows import LARGE, LOWEST, row_strides
from fastdiff.kernels.targets import for_rows
from fastdiff.ops.row_sample import RACE_CLASSES
from fastdiff.philox import Purpose

RACE = tl.constexpr(int(Purpose.RACE))
STEP = tl.constexpr(int(Purpose.STEP))
CLASSES = tl.constexpr(RACE_CLASSES)
MEMBERS = tl.constexpr(128)  # ids of a class that race at a time
WAYS = tl.constexpr(8)  # into which a read divides the keys among which a threshold is
NO_ID = tl.constexpr(2**31 - 1)

# ---------------------------------------------------------------------------------------------------------
# Walking a row. `row` is (z, aligned, head, groups, V, exclude, num_excluded, num_struck, xt): where the row and its
# first aligned group start, how many numbers come before that, how many groups follow; then the ids that are left out,
# which with a law are one more than the excluded ones: x_t.


@triton.jit
def strike(x, ids, first, last, absent, row):
    """`absent` in the place of ids that are left out. They are few: a branch for each is less than to compare all."""
    _, _, _, _, _, exclude, num_excluded, num_struck, xt = row
    for i in range(num_struck):
        struck = tl.load(exclude + i, mask=i < num_excluded, other=xt)
        if (struck >= first) & (struck < last):
            x = tl.where(ids == struck.to(tl.int32), absent, x)
    return x


@triton.jit
def tile_of(row, i, absent, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """The numbers and ids of tile i of the groups."""
    _, aligned, head, groups, _, _, _, _, _ = row
    offsets = i * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(aligned + offsets, mask=offsets // VEC < groups, other=absent, eviction_policy="evict_last")
    first = head + i * BLOCK
    return strike(x.to(tl.float32), head + offsets, first, first + BLOCK, absent, row), head + offsets


@triton.jit
def edge_of(row, i, absent, VEC: tl.constexpr):
    """What lies before the groups (0) or after them (1), in the lanes of its classes."""
    z, _, head, groups, V, _, _, _, _ = row
    end = groups * VEC
    first = head + tl.where(i == 0, -CLASSES, end // CLASSES * CLASSES)
    ids = first + tl.arange(0, CLASSES)
    exists = ((ids >= 0) & (ids < head)) | ((ids >= head + end) & (ids < V))
    x = tl.load(z + ids, mask=exists, other=absent).to(tl.float32)
    return strike(x, ids, first, first + CLASSES, absent, row), ids


@triton.jit
def num_tiles(row, BLOCK: tl.constexpr, VEC: tl.constexpr):
    return tl.cdiv(row[3] * VEC, BLOCK)


@triton.jit
def first_edge(row):
    return tl.where(row[2] == 0, 1, 0)


# ---------------------------------------------------------------------------------------------------------
# The first read: lane by lane m, the largest z; s, the sum of exp((z - m) / temperature); if asked for s1, the same at
# temperature 1, and u, the sum of exp(z - m) (z - m); the second largest z; the first id of the largest.


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


# ---------------------------------------------------------------------------------------------------------
# Reads that follow, from the second-level cache: `how` is (origin, scale, least, cut, log_largest).


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


# ---------------------------------------------------------------------------------------------------------
# The race.


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
