"""Losses of discrete diffusion, per token or reduced, in nats: fused forward and gradient, one read of each row."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.checks import (
    Number,
    check_bool,
    check_choice,
    check_integer,
    check_rows,
    check_tokens,
    per_token,
    vocabulary_index,
)
from fastdiff.ops.chunks import Head
from fastdiff.ops.functors import FUNCTORS, Functor
from fastdiff.ops.linear_loss import linear_loss
from fastdiff.ops.parallel import shard_of
from fastdiff.ops.row_loss import IGNORE_NONE, Rows, row_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("none", "sum", "mean")
PARAMETRIZATIONS = ("log_score", "logits", "log_probs", "scale_by_sigma")

FUNCTORS["dce"] = Functor(
    lambda r: reference.dce(r.z, r.x0, r.mask, r.mask_index if r.exclude_mask else None, r.penalty, r.sigma),
    over_ranks="softmax",
    from_sums=True,
)
FUNCTORS["dse_absorb"] = Functor(
    lambda r: reference.dse_absorb(r.z, r.sigma, r.xt, r.x0, r.mask_index),
    of_scores=True,
    over_ranks="sum",
    from_sums=True,
)
FUNCTORS["dse_uniform"] = Functor(
    lambda r: reference.dse_uniform(r.z, r.sigma, r.xt, r.x0),
    masked=False,
    apart="xt",
    of_scores=True,
    clean=True,
    over_ranks="sum",
)
FUNCTORS["dse_uniform_logits"] = Functor(
    lambda r: reference.dse_uniform_logits(r.z, r.sigma, r.xt, r.x0), masked=False, apart="xt"
)


class RowStats(NamedTuple):
    """Statistics of softmax(logits) per token, shaped as x0, without gradient; 0 where a token is not scored.

    logsumexp is over the same ids as the loss, entropy is in nats, correct is True where x0 is the argmax, nll is the
    cross-entropy `logsumexp - z_x0` in nats, without weight and z_loss.
    """

    logsumexp: Tensor
    entropy: Tensor
    correct: Tensor
    nll: Tensor


@overload
def dce_loss(logits: Tensor, x0: Tensor, *, return_stats: Literal[False] = ..., **options: Any) -> Tensor: ...
@overload
def dce_loss(logits: Tensor, x0: Tensor, *, return_stats: Literal[True], **options: Any) -> tuple[Tensor, RowStats]: ...
def dce_loss(  # type: ignore[misc]  # the overloads only tell apart what comes back
    logits: Tensor,
    x0: Tensor,
    *,
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
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """Masked cross-entropy `w (logsumexp_v z_v - z_x0)` at masked positions, 0 elsewhere, in nats.

    Args:
        logits: [..., V] float32, float64, bfloat16 or float16. Never changed. A strided last dimension is copied. In
            float16 backward reads them again, so that a loss scale comes in before the gradient is rounded.
        x0: [...] int64 clean tokens. Where x0 = ignore_index the loss is 0.
        xt: [...] noised tokens; positions with xt = mask_index are scored.
        mask: [...] bool, the scored positions, instead of xt. With neither, every position is scored.
        weight: w, a number or a tensor over a prefix of the token shape ([B] is one per sequence), or one that
            broadcasts to it. It has no gradient.
        mask_index: the mask's id, negative from the end.
        exclude_mask: leave v = mask_index out of the sum over v (SEDD, RADD, MDLM, Duo) or keep it (LLaDA). False is
            for vocabularies without a mask, too: True would leave out their last id.
        z_loss: adds z_loss * logsumexp_v(z_v)^2 to what w weighs, which keeps logits from drifting; 1e-4 is usual.
        reduction: "none" for [...] losses, "sum", or "mean" over the scored tokens (0 if there are none).
        num_items: with "mean", divide the sum by this number (or tensor of one element) instead.
        return_stats: return (loss, RowStats), from the same read of the logits.
        group: the ranks over which V is cut, in equal parts in the order of ranks; logits may also be a DTensor sharded
            along V. Tokens are the same on all ranks, and so is the loss.

    Returns:
        float32 (float64 for float64 logits) [...] or [].

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; on the CPU also if an id is outside [0, V), x0
            is the mask where it is scored, or xt is neither x0 nor the mask.
        BackendUnavailable: the backend named cannot run here.
    """
    rest = (x0, xt, mask, weight, mask_index, exclude_mask, ignore_index, z_loss, reduction, num_items)
    loss, stats = logits_loss("logits", logits, dce_rows, rest, group, backend, return_stats)
    return (loss, row_stats(stats)) if return_stats else loss


def logits_loss(
    name: str,
    logits: Tensor,
    make_rows: Callable[..., Rows],
    rest: tuple[Any, ...],
    group: "ProcessGroup | None",
    backend: str | None,
    with_stats: bool = False,
) -> tuple[Tensor, Tensor]:
    """What the operators return for make_rows(logits, *rest); `name` is what messages call the logits."""
    check_rows(name, logits)
    logits, shard = shard_of(name, logits, -1, group)
    if not shard.group:
        return row_loss(make_rows(logits, *rest), backend, with_stats)
    head = Head(logits, None, None, 0.0, -1, logits.dtype, shard)
    rows = shard.checked(logits.device, make_rows, head.logits_like(), *rest)
    return linear_loss(head, rows, backend, with_stats)


def row_stats(stats: Tensor) -> RowStats:
    """By name and without gradient, what the operators return, [4, ...]."""
    logsumexp, entropy, correct, nll = stats.detach()
    return RowStats(logsumexp, entropy, correct == 1, nll)


def dse_loss(
    log_score: Tensor,
    sigma: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    graph: str = "absorb",
    dsigma: Number | Tensor | None = None,
    mask_index: int = -1,
    parametrization: str = "log_score",
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """Denoising score entropy (Lou, Meng, Ermon 2024), in nats per unit of sigma, times dsigma if that is given.

    Absorbing, where x_t = M, with e1 = expm1(sigma):
        `sum_{y != M} exp(s_y) - s_x0 / e1 + (1/e1) (log(1/e1) - 1)`
    Uniform over N states, everywhere, with a_y = p(y|x0) / p(x_t|x0) and phi(d) = expm1(d) - d:
        `(1/N) sum_{y != x_t} a_y phi(s_y - log a_y)`

    Args:
        log_score: [..., V], as the logits of `dce_loss`.
        sigma: total noise, > 0 where a token is masked or moved (everywhere, for logits of the uniform graph); a number
            or a tensor over a prefix of the token shape ([B] is one per sequence), or one that broadcasts to it. It has
            no gradient.
        xt, x0: [...] int64 noised and clean tokens.
        graph: "absorb" or "uniform".
        dsigma: the rate of sigma, a factor on the loss, shaped as sigma.
        mask_index: the absorbing graph's mask, negative from the end.
        parametrization: what log_score holds. "log_score"; "logits" or "log_probs" of x0, c = softmax: absorbing, over
            y != M, the log score is log c_y - log e1 and the loss cross-entropy / e1; uniform, the log score is
            log(1 + k c_y) - log(1 + k c_xt) with k = N / e1, and dsigma times the loss is Duo's NELBO;
            "scale_by_sigma": SEDD's output before its tail, the log score is out - log e1 - log(V - 1).
        reduction: "none" for [...] losses, "sum", or "mean" over the scored tokens (0 if there are none).
        num_items: with "mean", divide the sum by this number (or tensor of one element) instead.
        group: as in `dce_loss`; not with conditionals of the uniform graph.

    Returns:
        float32 (float64 for float64 log_score) [...] or [].

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; on the CPU also if an id is outside [0, V), sigma
            is out of range, or (absorbing) x0 is the mask or xt is neither x0 nor the mask.
        BackendUnavailable: the backend named cannot run here.
    """
    rest = (sigma, xt, x0, graph, dsigma, mask_index, parametrization, reduction, num_items)
    return logits_loss("log_score", log_score, dse_rows, rest, group, backend)[0]


def dce_rows(
    z: Tensor,
    x0: Tensor,
    xt: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Number | Tensor | None = None,
    mask_index: int = -1,
    exclude_mask: bool = True,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
) -> Rows:
    """The checked arguments of a cross-entropy over rows z, of which only type, shape and device are looked at."""
    if xt is not None and mask is not None:
        raise ValueError("mask: expected one of xt and mask, got both")
    mask_index = check_integer("mask_index", mask_index)
    if exclude_mask or (xt is not None and mask_index < 0):
        mask_index = vocabulary_index("mask_index", mask_index, z.shape[-1])
    options: dict[str, Any] = dict(mask_index=mask_index, exclude_mask=exclude_mask, ignore_index=ignore_index)
    options |= dict(xt=xt, mask=mask, weight=weight, penalty=z_loss, reduction=reduction, num_items=num_items)
    return checked_rows("dce", z, x0, **options)


def dse_rows(
    z: Tensor,
    sigma: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    graph: str = "absorb",
    dsigma: Number | Tensor | None = None,
    mask_index: int = -1,
    parametrization: str = "log_score",
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
) -> Rows:
    """The checked arguments of a score entropy over rows z, of which only type, shape and device are looked at."""
    check_choice("graph", graph, ("absorb", "uniform"))
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    conditionals = parametrization in ("logits", "log_probs")
    if z.shape[-1] < 2:
        raise ValueError(f"log_score: expected at least 2 states, got shape {tuple(z.shape)}")
    functor = f"dse_{graph}" if not conditionals else "dce" if graph == "absorb" else "dse_uniform_logits"
    options: dict[str, Any] = dict(xt=xt, sigma=sigma, dsigma=dsigma, reduction=reduction, num_items=num_items)
    options |= dict(mask_index=vocabulary_index("mask_index", mask_index, z.shape[-1]))
    return checked_rows(functor, z, x0, scale_by_sigma=parametrization == "scale_by_sigma", **options)


def checked_rows(
    functor: str,
    z: Tensor,
    x0: Tensor,
    *,
    xt: Tensor | None = None,
    mask: Tensor | None = None,
    mask_index: int = -1,
    exclude_mask: bool = True,
    ignore_index: int = IGNORE_NONE,
    scale_by_sigma: bool = False,
    penalty: float = 0.0,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
    **per_row: Number | Tensor | None,
) -> Rows:
    """Rows of a functor, once shapes, types and devices fit. mask_index is an id, or no id where there is no mask.

    per_row: sigma, weight or dsigma, and what the functor calls its extra numbers, each a number or a tensor over a
    prefix of the token shape, and with these names in messages.
    """
    check_tokens("x0", x0, z.shape[:-1], z.device)
    shape, device = x0.shape, z.device
    if xt is not None:
        check_tokens("xt", xt, shape, device)
    if mask is not None:
        check_bool("mask", mask, shape, device)
    check_choice("reduction", reduction, REDUCTIONS)
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(f"num_items: needs reduction='mean', got reduction={reduction!r}")
        if isinstance(num_items, Tensor) and num_items.numel() == 1:
            num_items = num_items.reshape(())
        num_items = per_token("num_items", num_items, torch.Size(), device)
    given = {k: per_token(k, v, shape, device).contiguous() for k, v in per_row.items() if v is not None}
    return Rows(
        z=z,
        x0=x0.long().contiguous(),
        xt=None if xt is None else xt.long().contiguous(),
        mask=None if mask is None else mask.contiguous(),
        sigma=given.get("sigma"),
        weight=given.get("weight", given.get("dsigma")),
        entropy_weight=None,
        extra=given.get(FUNCTORS[functor].extra or ""),
        num_items=num_items,
        functor=functor,
        mask_index=mask_index,
        exclude_mask=exclude_mask,
        ignore_index=check_integer("ignore_index", ignore_index),
        scale_by_sigma=scale_by_sigma,
        penalty=float(penalty),
        reduction=reduction,
    )
