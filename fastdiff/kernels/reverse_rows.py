"""Laws of reverse steps as rows of probabilities in Triton, one program a row. Twin of csrc/cpu/row_sample.cpp.

Rows are walked, and `row` is what it is, as in rows.py: the probabilities stand for the gradient, x_t for both ids
that are treated apart.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.maths import LOG2_E
from fastdiff.kernels.row_sample import law_terms
from fastdiff.kernels.rows import (
    EXCLUDED,
    LARGE,
    SIZE,
    SMALL,
    block_of,
    edge_of,
    load_at,
    load_others,
    num_blocks,
    row_strides,
    store_apart,
    sum_exp,
    zero_grad,
)
from fastdiff.kernels.targets import for_rows


@triton.jit
def jump_probs(part, row, how):
    """exp(z - origin) unit - cut where that is positive, from the cache; NaN if that is NaN."""
    origin, unit, cut = how
    p = tl.exp2((load_others(part, row) - origin) * LOG2_E) * unit - cut
    return tl.where(p < 0, 0.0, p)


@triton.jit
def sum_jumps(row, how, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Their sum over the ids other than x_t, for a cut above 0: x_t and what is not there are -inf, which gives 0."""
    s = tl.zeros((BLOCK,), tl.float32)
    for i in range(num_blocks(row, BLOCK, VEC)):
        s += jump_probs(block_of(row, i, BLOCK, VEC), row, how)
    return (tl.sum(s, 0) + tl.sum(jump_probs(edge_of(row, VEC), row, how), 0)).to(tl.float64)


@triton.jit
def write_law(row, law, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Reads a row and writes the probabilities. With theta above 0 the sum of the jumps is a reading of its own."""
    theta, _, _, log_here = law
    xt = row[EXCLUDED]
    f32 = tl.float32
    top, others = sum_exp(row, BLOCK, VEC)
    here = tl.where((log_here == log_here) & (xt >= 0), log_here, load_at(row, xt))
    shift, e_top, stay, jump, total, cut = law_terms(law, here, top, others)
    origin, unit = shift, tl.full((), 1.0, tl.float64)
    if theta == 0:  # the jumps may all be far below x_t, and x_t not stay
        origin, unit = top, e_top
    jump -= cut * (row[SIZE] - 1)
    if theta > 0:
        jump = sum_jumps(row, (origin.to(f32), unit.to(f32), cut.to(f32)), BLOCK, VEC)
    mass = tl.where(total > 0, stay + jump, float("nan"))
    stuck = mass == 0
    unit, cut = tl.where(stuck, 0.0, unit / mass), tl.where(stuck, 0.0, cut / mass)
    how = (origin.to(f32), unit.to(f32), cut.to(f32))
    for i in range(num_blocks(row, BLOCK, VEC)):
        part = block_of(row, i, BLOCK, VEC)
        tl.store(part[1], jump_probs(part, row, how), mask=part[3])
    part = edge_of(row, VEC)
    tl.store(part[1], jump_probs(part, row, how), mask=part[3])
    at_xt = tl.where(stuck, 1.0, stay / mass).to(f32)
    store_apart(row, at_xt, at_xt)


@triton.jit
def reverse_rows_kernel(
    Z,  # [rows, V], row r at (r // inner) * stride_outer + (r % inner) * stride_inner
    XT,  # int64 [rows]
    LIVE,  # bool [rows]
    LAW,  # float64 [rows, 4]
    PROBS,  # float32 [rows, V] contiguous
    V,
    inner,
    stride_outer,
    stride_inner,
    CONTIGUOUS: tl.constexpr,  # whether rows of Z lie as those of PROBS do
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    xt = tl.load(XT + r)
    xt = tl.where((xt >= 0) & (xt < V), xt, -1).to(tl.int32)  # no such id: the row will be NaN
    start, to = (r // inner) * stride_outer + (r % inner) * stride_inner, r * V
    head = tl.minimum((VEC - start % VEC) % VEC, V)
    groups = ((V - head) // VEC).to(tl.int32)
    # Groups are aligned in Z, which comes from memory. Where rows of PROBS lie alike they are aligned there too, and
    # stores are 16 bytes wide (2-byte numbers go through shared memory first, so that a warp's stores have no gaps);
    # elsewhere stores are 4 bytes wide, a warp's side by side.
    to_aligned = PROBS + (to + head)
    if CONTIGUOUS:
        to_aligned = PROBS + tl.multiple_of(to + head, VEC)
    z_aligned = Z + tl.multiple_of(start + head, VEC)
    row = (Z + start, PROBS + to, z_aligned, to_aligned, head.to(tl.int32), groups, V, xt, xt)
    if tl.load(LIVE + r) != 0:
        law = (tl.load(LAW + 4 * r), tl.load(LAW + 4 * r + 1), tl.load(LAW + 4 * r + 2), tl.load(LAW + 4 * r + 3))
        write_law(row, law, BLOCK, VEC)
    else:
        zero_grad(row, BLOCK, VEC)
        one = tl.full((), 1.0, tl.float32)
        store_apart(row, one, one)


def launch_reverse_rows(z: Tensor, xt: Tensor, live: Tensor, law: Tensor, probs: Tensor) -> None:
    num_states = z.shape[-1]
    reverse_rows_kernel[(xt.numel(),)](
        z, xt, live, law, probs, num_states, *row_strides(z),
        CONTIGUOUS=z.is_contiguous(),
        **for_rows(SMALL if num_states <= SMALL["BLOCK"] else LARGE[z.element_size()], z.element_size()),
    )  # fmt: skip
