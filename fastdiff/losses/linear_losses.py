"""The losses over hidden @ lm_head.T: the last linear layer and the loss in one operation, without the logits."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from fastdiff.checks import Number, check_rows, check_tensor
from fastdiff.losses.row_losses import RowStats, dce_rows, dse_rows, row_stats
from fastdiff.ops.chunks import Head
from fastdiff.ops.linear_loss import linear_loss
from fastdiff.ops.parallel import replicated, shard_of
from fastdiff.ops.row_loss import Rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def linear_dce_loss(
    hidden: Tensor, lm_head: Tensor, x0: Tensor, *, return_stats: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def linear_dce_loss(
    hidden: Tensor, lm_head: Tensor, x0: Tensor, *, return_stats: Literal[True], **options: Any
) -> tuple[Tensor, RowStats]: ...
def linear_dce_loss(  # type: ignore[misc]  # the overloads only tell apart what comes back
    hidden: Tensor,
    lm_head: Tensor,
    x0: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    xt: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Number | Tensor | None = None,
    mask_index: int = -1,
    exclude_mask: bool = True,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
    return_stats: bool = False,
    summed: bool = False,
    capacity: int | None = None,
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """`dce_loss` of the logits hidden @ lm_head.T + bias, which are never whole in memory.

    Only the scored rows are multiplied, forward and backward. For "sum" and "mean" the forward pass makes the
    gradients too; for "none" backward multiplies the logits once more. Under autocast it multiplies in autocast's type.

    Args:
        hidden: [..., D] float32, float64, bfloat16 or float16.
        lm_head: [V, D] of hidden's type (any, under autocast), as `nn.Linear.weight`. Its gradient is summed in
            float32.
        x0, xt, mask, weight, mask_index, exclude_mask, ignore_index, z_loss, reduction, num_items, backend: as in
            `dce_loss`, with [...] the shape of hidden without D.
        bias: [V], added to the logits.
        softcap: if not 0, the logits are softcap * tanh(logits / softcap).
        return_stats: return (loss, RowStats), of the logits with bias and softcap, which are read where they lie.
        summed: with "none", only the sum of all losses, or their mean, has a gradient, which the forward pass makes, as
            for "sum". If they weigh differently in what backward starts from, that is a ValueError; on a GPU, or in
            compiled code, gradients are NaN.
        capacity: the most scored rows there can be. Then nothing waits for the device, as in a CUDA graph, and this
            many rows are multiplied; if there are more, loss, gradients and statistics are NaN. None counts them.
        group: the ranks over whose ids lm_head (and bias) are cut, in equal parts in the order of ranks; lm_head may
            also be a DTensor sharded along V. Hidden states and tokens are the same on all ranks, and so is the loss.

    Returns:
        float32 (float64 for float64 inputs) [...] or [].

    Raises:
        ValueError, TypeError: as `dce_loss`; shapes, types or devices of hidden, lm_head and bias do not fit; on every
            rank of a group, if one refuses its tokens, or tokens or parts of lm_head do not belong together.
        BackendUnavailable: the backend named cannot run here.
    """
    head = last_layer(hidden, lm_head, bias, softcap, capacity, group)
    rest = (x0, xt, mask, weight, mask_index, exclude_mask, ignore_index, z_loss, reduction, num_items)
    loss, stats = last_layer_loss(head, dce_rows, rest, backend, summed, return_stats)
    return (loss, row_stats(stats)) if return_stats else loss


def linear_dse_loss(
    hidden: Tensor,
    lm_head: Tensor,
    sigma: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    graph: str = "absorb",
    dsigma: Number | Tensor | None = None,
    mask_index: int = -1,
    parametrization: str = "log_score",
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
    summed: bool = False,
    capacity: int | None = None,
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """`dse_loss` of what hidden @ lm_head.T + bias gives, which is never whole in memory.

    Args:
        hidden, lm_head, bias, softcap, summed, capacity, group: as in `linear_dce_loss`.
        sigma, xt, x0, graph, dsigma, mask_index, parametrization, reduction, num_items, backend: as in `dse_loss`, with
            [...] the shape of hidden without D.

    Returns:
        float32 (float64 for float64 inputs) [...] or [].

    Raises:
        ValueError, TypeError: as `dse_loss`; shapes, types or devices of hidden, lm_head and bias do not fit.
        BackendUnavailable: the backend named cannot run here.
    """
    head = last_layer(hidden, lm_head, bias, softcap, capacity, group)
    rest = (sigma, xt, x0, graph, dsigma, mask_index, parametrization, reduction, num_items)
    return last_layer_loss(head, dse_rows, rest, backend, summed)[0]


def last_layer_loss(
    head: Head,
    make_rows: Callable[..., Rows],
    rest: tuple[Any, ...],
    backend: str | None,
    summed: bool,
    with_stats: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `logits_loss`, of what a last layer makes."""
    rows = head.shard.checked(head.hidden.device, make_rows, head.logits_like(), *rest)
    return linear_loss(head, rows, backend, with_stats, summed)


def last_layer(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    softcap: float,
    capacity: int | None,
    group: "ProcessGroup | None",
) -> Head:
    """The checked arguments of what a last layer makes of hidden states."""
    check_rows("hidden", hidden, "D")
    check_rows("lm_head", lm_head, "D")
    width = hidden.shape[-1]
    if lm_head.dim() != 2 or lm_head.shape[1] != width:
        raise ValueError(f"lm_head: expected shape [V, D={width}], got {tuple(lm_head.shape)}")
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != lm_head.shape[:1]:
            raise ValueError(f"bias: expected shape [V={len(lm_head)}], got {tuple(bias.shape)}")
        bias = shard_of("bias", bias, 0, group)[0]
    hidden, (lm_head, shard) = replicated("hidden", hidden), shard_of("lm_head", lm_head, 0, group)
    autocast = torch.is_autocast_enabled(hidden.device.type)
    for name, tensor in (("lm_head", lm_head), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected a tensor on {hidden.device}, got {tensor.device}")
        if tensor is not None and tensor.dtype != hidden.dtype and not autocast:
            raise TypeError(f"{name}: expected {hidden.dtype} as hidden is, got {tensor.dtype}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number >= 0, got {softcap}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity: expected a number of rows >= 0 or None, got {capacity}")
    cast = autocast and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(hidden.device.type) if cast else hidden.dtype
    return Head(hidden, lm_head, bias, float(softcap), -1 if capacity is None else capacity, dtype, shard)
