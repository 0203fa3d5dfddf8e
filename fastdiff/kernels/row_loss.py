"""Row losses in Triton, one program a row. Twin of csrc/cpu, which says more."""

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.affine_rows import affine_row
from fastdiff.kernels.maths import log1p_, survival
from fastdiff.kernels.rows import LARGE, SMALL, row_strides, zero_grad
from fastdiff.kernels.score_rows import scores_row
from fastdiff.kernels.softmax_rows import softmax_row
from fastdiff.kernels.targets import for_rows


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


def launch_scale(grad: Tensor, factor: Tensor) -> None:
    scale_kernel[(triton.cdiv(grad.numel(), SCALE["BLOCK"]),)](grad, factor, grad.numel(), **SCALE)
