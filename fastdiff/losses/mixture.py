"""The loss of noise that is the mask in part and uniform in part (GIDD, von Ruette et al. 2025)."""

from functools import partial
from typing import Any

from torch import Tensor

from fastdiff import reference
from fastdiff.checks import Number, vocabulary_index
from fastdiff.losses.linear_losses import last_layer, last_layer_loss
from fastdiff.losses.row_losses import checked_rows, logits_loss
from fastdiff.ops.functors import FUNCTORS, Functor
from fastdiff.ops.row_loss import Rows

FUNCTORS["mixture"] = Functor(
    lambda r: reference.mixture(r.z, r.sigma, r.extra, r.xt, r.x0, r.mask_index),
    masked=False,
    clean=True,
    extra="share",
    extra_range=lambda r: (~((r.extra >= 0) & (r.extra <= 1)), "numbers in [0, 1]"),
)


def mixture_loss(
    logits: Tensor,
    sigma: Number | Tensor,
    share: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    weight: Number | Tensor | None = None,
    mask_index: int = -1,
    ignore_index: int = -100,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """GIDD's loss `w (KL(q_t(. | x0) || q_t(. | c)) + IS(x_t))` of every token, in nats.

    A token survives with alpha = exp(-sigma), becomes the mask with (1 - alpha)(1 - share), and is else drawn again
    from the V - 1 other ids: that is q_t(. | x0), and q_t(. | c) its mean under c = softmax(logits) without the mask.
    With r = q_t(x_t | x0) / q_t(x_t | c), IS = r - 1 - log r.

    Args:
        logits: [..., V] as in `dce_loss`; the mask's is not read.
        sigma: total noise, >= 0; a number or a tensor over a prefix of the token shape ([B] is one per sequence), or
            one that broadcasts to it. It has no gradient.
        share: of the noise that is uniform, in [0, 1], shaped as sigma. At 0 a masked token's loss is
            alpha times cross-entropy.
        xt, x0: [...] int64 noised and clean tokens; x0 is not the mask. Where x0 = ignore_index the loss is 0.
        weight: w, shaped as sigma: the rates of the noise, by which the loss is a bound of the likelihood, or GIDD's
            clipped and dynamic weights.
        mask_index: the mask's id, negative from the end.
        reduction, num_items: as in `dce_loss`.

    Returns:
        float32 (float64 for float64 logits) [...] or [].

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; on the CPU also if an id is outside [0, V), x0 is
            the mask, or sigma or share is out of range.
        BackendUnavailable: the backend named cannot run here.
    """
    options: dict[str, Any] = dict(weight=weight, mask_index=mask_index, ignore_index=ignore_index)
    make_rows = partial(mixture_rows, reduction=reduction, num_items=num_items, **options)
    return logits_loss("logits", logits, make_rows, (sigma, share, xt, x0), None, backend)[0]


def linear_mixture_loss(
    hidden: Tensor,
    lm_head: Tensor,
    sigma: Number | Tensor,
    share: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    summed: bool = False,
    capacity: int | None = None,
    backend: str | None = None,
    **options: Any,
) -> Tensor:
    """`mixture_loss` of the logits hidden @ lm_head.T + bias, which are never whole in memory.

    Args:
        hidden, lm_head, bias, softcap, summed, capacity: as in `linear_dce_loss`.
        sigma, share, xt, x0, options, backend: as in `mixture_loss`, with [...] the shape of hidden without D.

    Returns:
        float32 (float64 for float64 inputs) [...] or [].

    Raises:
        ValueError, TypeError: as `mixture_loss`; shapes, types or devices of hidden, lm_head and bias do not fit.
        BackendUnavailable: the backend named cannot run here.
    """
    head = last_layer(hidden, lm_head, bias, softcap, capacity, None)
    return last_layer_loss(head, partial(mixture_rows, **options), (sigma, share, xt, x0), backend, summed)[0]


def mixture_rows(
    z: Tensor,
    sigma: Number | Tensor,
    share: Number | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    weight: Number | Tensor | None = None,
    mask_index: int = -1,
    ignore_index: int = -100,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
) -> Rows:
    """The checked arguments of the loss over rows z, of which only type, shape and device are looked at."""
    if z.shape[-1] < 2:
        raise ValueError(f"logits: expected at least 2 states, got shape {tuple(z.shape)}")
    options: dict[str, Any] = dict(xt=xt, sigma=sigma, share=share, weight=weight, ignore_index=ignore_index)
    options |= dict(mask_index=vocabulary_index("mask_index", mask_index, z.shape[-1]))
    return checked_rows("mixture", z, x0, reduction=reduction, num_items=num_items, **options)
