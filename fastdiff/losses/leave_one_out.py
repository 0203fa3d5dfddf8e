"""Cross-entropy of networks that predict a token from all others (DiffusionGemma), for uniform noise."""

from functools import partial
from typing import Any, Literal, overload

from torch import Tensor

from fastdiff import reference
from fastdiff.checks import Number
from fastdiff.losses.linear_losses import last_layer, last_layer_loss
from fastdiff.losses.row_losses import RowStats, checked_rows, logits_loss, row_stats
from fastdiff.ops.functors import FUNCTORS, Functor
from fastdiff.ops.row_loss import Rows

FUNCTORS["loo"] = Functor(
    lambda r: reference.dce(r.z, r.x0, r.mask, None, r.penalty),
    masked=False,
    apart="xt",
    logits=lambda r: reference.leave_one_out(r.z, r.sigma, r.xt),
)


@overload
def loo_loss(
    logits: Tensor,
    sigma: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    return_stats: Literal[False] = ...,
    **options: Any,
) -> Tensor: ...
@overload
def loo_loss(
    logits: Tensor, sigma: Number | Tensor, xt: Tensor, x0: Tensor, *, return_stats: Literal[True], **options: Any
) -> tuple[Tensor, RowStats]: ...
def loo_loss(  # type: ignore[misc]  # the overloads only tell apart what comes back
    logits: Tensor,
    sigma: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Number | Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """Cross-entropy `w (logsumexp_v l_v - l_x0)` of l = logits, plus log(1 + V / expm1(sigma)) at x_t, in nats.

    The logits tell the clean token from all others but its own noised one; what that tells under uniform noise is added
    here. Every token is scored, noised or not.

    Args:
        logits: [..., V] as in `dce_loss`.
        sigma: total noise, > 0: 1 - exp(-sigma) of the tokens are drawn again from all V ids. A number or a tensor over
            a prefix of the token shape ([B] is one per sequence), or one that broadcasts to it. It has no gradient.
        xt, x0: [...] int64 noised and clean tokens. Where x0 = ignore_index the loss is 0.
        mask: [...] bool, the scored positions; None is all.
        weight: w, shaped as sigma. DiffusionGemma's loss weighs all levels alike; dsigma reweighs them.
        z_loss: adds z_loss * logsumexp_v(l_v)^2 to what w weighs.
        reduction, num_items, return_stats: as in `dce_loss`; statistics are of softmax(l).

    Returns:
        float32 (float64 for float64 logits) [...] or [].

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; on the CPU also if an id is outside [0, V) or
            sigma is out of range.
        BackendUnavailable: the backend named cannot run here.
    """
    options: dict[str, Any] = dict(mask=mask, weight=weight, ignore_index=ignore_index, z_loss=z_loss)
    make_rows = partial(loo_rows, reduction=reduction, num_items=num_items, **options)
    loss, stats = logits_loss("logits", logits, make_rows, (sigma, xt, x0), None, backend, return_stats)
    return (loss, row_stats(stats)) if return_stats else loss


def linear_loo_loss(
    hidden: Tensor,
    lm_head: Tensor,
    sigma: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    return_stats: bool = False,
    summed: bool = False,
    capacity: int | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """`loo_loss` of the logits hidden @ lm_head.T + bias, which are never whole in memory.

    Args:
        hidden, lm_head, bias, softcap, summed, capacity: as in `linear_dce_loss`.
        sigma, xt, x0, options, return_stats, backend: as in `loo_loss`, with [...] the shape of hidden without D.

    Returns:
        float32 (float64 for float64 inputs) [...] or [], or (loss, RowStats).

    Raises:
        ValueError, TypeError: as `loo_loss`; shapes, types or devices of hidden, lm_head and bias do not fit.
        BackendUnavailable: the backend named cannot run here.
    """
    head = last_layer(hidden, lm_head, bias, softcap, capacity, None)
    make_rows = partial(loo_rows, **options)
    loss, stats = last_layer_loss(head, make_rows, (sigma, xt, x0), backend, summed, return_stats)
    return (loss, row_stats(stats)) if return_stats else loss


def loo_rows(
    z: Tensor,
    sigma: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Number | Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
) -> Rows:
    """The checked arguments of the loss over rows z, of which only type, shape and device are looked at."""
    options: dict[str, Any] = dict(xt=xt, sigma=sigma, mask=mask, weight=weight, reduction=reduction)
    options |= dict(ignore_index=ignore_index, num_items=num_items, exclude_mask=False)
    return checked_rows("loo", z, x0, penalty=z_loss, **options)
