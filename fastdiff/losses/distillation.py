"""Distillation on masked positions: the KL divergence between a teacher's and a student's conditionals, in nats."""

import math

import torch
from torch import Tensor

from fastdiff.checks import (
    Number,
    check_bool,
    check_choice,
    check_rows,
    check_tensor,
    check_tokens,
    check_values,
    per_token,
    values_are_checked,
    vocabulary_index,
)
from fastdiff.losses.linear_losses import last_layer
from fastdiff.losses.row_losses import REDUCTIONS
from fastdiff.ops.distill import Pairs, row_distill
from fastdiff.ops.linear_distill import linear_distill


def distill_loss(
    logits: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    xt: Tensor | None = None,
    weight: Number | Tensor | None = None,
    kl: str = "forward",
    temperature: float = 1.0,
    teacher_ids: Tensor | None = None,
    mask_index: int = -1,
    exclude_mask: bool = True,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL divergence of the teacher's p and the student's q = softmax(logits / temperature) at scored positions, 0
    elsewhere, in nats.

    "forward" is KL(p || q) = `sum_v p_v (log p_v - log q_v)`, "reverse" KL(q || p). Each row of both is read once, and
    for "sum" and "mean" the gradient is made by the same read. Where p and q are close, no digits cancel. A logit of
    -inf is a probability of 0: where the first of the two has none of it, it adds nothing; where only the second has
    none, the loss is infinite.

    With teacher_ids only the probabilities of k ids are known of the teacher, and all other ids count as one: the
    divergence of the two distributions over k + 1 outcomes, which is 0 if and only if the student gives the k ids the
    teacher's probabilities, and never more than that over all ids.

    Args:
        logits: [..., V] float32, float64, bfloat16 or float16 of the student. Never changed. A strided last dimension
            is copied. In float16 backward reads them again, as it does for "none".
        teacher: [..., V] logits of the same type, over the same vocabulary; p = softmax(teacher / temperature). With
            teacher_ids [..., k] log p at those ids, of any floating type, which temperature does not touch. It gets no
            gradient.
        mask: [...] bool, the scored positions. Without it, and without xt, every position is scored.
        xt: [...] noised tokens, instead of mask: positions with xt = mask_index are scored.
        weight: a factor of each loss; a number or a tensor over a prefix of the token shape ([B] is one per sequence),
            or one that broadcasts to it. It has no gradient.
        kl: "forward" or "reverse".
        temperature: > 0, divides the logits, which must stay within their type's range. The loss is not multiplied by
            its square, as some do to keep gradients of one size; weight can.
        teacher_ids: [..., k] int64 ids, in any order, different within a row. Their probabilities sum to at most 1. A
            sum that is off by rounding, above 1 or where there are no other ids, is divided by.
        mask_index: the mask's id, negative from the end.
        exclude_mask: leave v = mask_index out of both distributions. False is for vocabularies without a mask, too.
        reduction: "none" for [...] losses, "sum", or "mean" over the scored positions (0 if there are none).
        num_items: with "mean", divide the sum by this number (or tensor of one element) instead.

    Returns:
        float32 (float64 for float64 logits) [...] or [].

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; on the CPU also if an id of teacher_ids is outside
            [0, V), comes twice or is the mask, or their probabilities sum to more than 1.
        BackendUnavailable: the backend named cannot run here.
    """
    check_rows("logits", logits)
    if teacher_ids is None:
        check_rows("teacher", teacher)
        if teacher.shape[-1] != logits.shape[-1]:
            raise ValueError(f"teacher: expected the student's {logits.shape[-1]} ids, got {teacher.shape[-1]}")
        if teacher.dtype != logits.dtype:
            raise TypeError(f"teacher: expected {logits.dtype} as logits are, got {teacher.dtype}")
    pairs = _pairs(logits, mask, xt, weight, kl, temperature, mask_index, exclude_mask, reduction, num_items)
    _add_teacher(pairs, teacher, teacher_ids)
    return row_distill(pairs, backend)


def linear_distill_loss(
    hidden: Tensor,
    lm_head: Tensor,
    teacher: Tensor,
    teacher_lm_head: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float = 0.0,
    mask: Tensor | None = None,
    xt: Tensor | None = None,
    weight: Number | Tensor | None = None,
    kl: str = "forward",
    temperature: float = 1.0,
    teacher_ids: Tensor | None = None,
    mask_index: int = -1,
    exclude_mask: bool = True,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
    capacity: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`distill_loss` of the logits hidden @ lm_head.T and teacher @ teacher_lm_head.T, neither of them whole in memory.

    Only the scored rows are multiplied, a few at a time. For "sum" and "mean" the forward pass makes the gradients
    too; for "none" backward multiplies both logits once more.

    Args:
        hidden, lm_head, bias, softcap, capacity: as in `linear_dce_loss`.
        teacher: [..., D'] hidden states of the teacher, of hidden's type (any, under autocast); D' may differ from D.
            With teacher_ids [..., k] log-probabilities at those ids, as in `distill_loss`.
        teacher_lm_head: [V, D'] of hidden's type; not with teacher_ids. The teacher gets no gradient.
        teacher_bias, teacher_softcap: as bias and softcap, of the teacher.
        mask, xt, weight, kl, temperature, teacher_ids, mask_index, exclude_mask, reduction, num_items, backend: as in
            `distill_loss`, with [...] the shape of hidden without D.

    Returns:
        float32 (float64 for float64 inputs) [...] or [].

    Raises:
        ValueError, TypeError: as `distill_loss`; shapes, types or devices do not fit.
        BackendUnavailable: the backend named cannot run here.
    """
    head = last_layer(hidden, lm_head, bias, softcap, capacity, None)
    z = head.logits_like()
    pairs = _pairs(z, mask, xt, weight, kl, temperature, mask_index, exclude_mask, reduction, num_items)
    if (teacher_lm_head is None) == (teacher_ids is None):
        raise ValueError("teacher_lm_head: expected one of teacher_lm_head and teacher_ids")
    if teacher_lm_head is None:
        _add_teacher(pairs, teacher, teacher_ids)
        return linear_distill(head, None, pairs, backend)
    try:
        teaching = last_layer(teacher, teacher_lm_head, teacher_bias, teacher_softcap, None, None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"of the teacher, {error}") from None
    _add_teacher(pairs, teaching.logits_like(), None)
    if teaching.dtype != head.dtype:
        raise TypeError(f"teacher: expected {head.dtype} as hidden is, got {teaching.dtype}")
    if teaching.num_states != head.num_states:
        raise ValueError(f"teacher_lm_head: expected the student's {head.num_states} ids, got {teaching.num_states}")
    return linear_distill(head, teaching, pairs, backend)


def _pairs(
    z: Tensor,
    mask: Tensor | None,
    xt: Tensor | None,
    weight: Number | Tensor | None,
    kl: str,
    temperature: float,
    mask_index: int,
    exclude_mask: bool,
    reduction: str,
    num_items: Number | Tensor | None,
) -> Pairs:
    """The checked arguments but for the teacher's; of z only type, shape and device are looked at."""
    check_choice("kl", kl, ("forward", "reverse"))
    check_choice("reduction", reduction, REDUCTIONS)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
    if xt is not None and mask is not None:
        raise ValueError("mask: expected one of xt and mask, got both")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: needs reduction='mean', got reduction={reduction!r}")
    shape, device = z.shape[:-1], z.device
    if exclude_mask or xt is not None:
        mask_index = vocabulary_index("mask_index", mask_index, z.shape[-1])
    if xt is not None:
        check_tokens("xt", xt, shape, device)
        mask = xt == mask_index
    if mask is not None:
        check_bool("mask", mask, shape, device)
        mask = mask.contiguous()
    if weight is not None:
        weight = per_token("weight", weight, shape, device).contiguous()
    if isinstance(num_items, Tensor) and num_items.numel() == 1:
        num_items = num_items.reshape(())
    if num_items is not None:
        num_items = per_token("num_items", num_items, torch.Size(), device)
    left_out = mask_index if exclude_mask else -1
    return Pairs(z, z, None, mask, weight, num_items, kl == "reverse", left_out, 1 / temperature, reduction)


def _add_teacher(pairs: Pairs, teacher: Tensor, ids: Tensor | None) -> None:
    """Gives the pairs a teacher: logits, or log-probabilities at some ids, which are brought in order."""
    check_tensor("teacher", teacher)
    shape, device = pairs.z.shape[:-1], pairs.z.device
    if teacher.shape[:-1] != shape:
        raise ValueError(f"teacher: expected shape {tuple(shape)} and one more dimension, got {tuple(teacher.shape)}")
    if teacher.device != device:
        raise ValueError(f"teacher: expected a tensor on {device}, got {teacher.device}")
    pairs.teacher = teacher.detach()
    if ids is None:
        return
    check_rows("teacher", teacher, "k")
    check_tokens("teacher_ids", ids, teacher.shape, device)
    pairs.ids, order = ids.long().sort(-1)
    pairs.teacher = pairs.teacher.double().gather(-1, order)
    if values_are_checked(device):
        _check_ids(pairs, 8 * torch.finfo(teacher.dtype).eps)


def _check_ids(pairs: Pairs, rounding: float) -> None:
    """What ids and log-probabilities must be where a token is scored."""
    ids, log_p, num_states, scored = pairs.ids, pairs.teacher, pairs.z.shape[-1], pairs.scored()
    assert ids is not None
    each = scored.unsqueeze(-1)
    check_values("teacher_ids", ids, each & ((ids < 0) | (ids >= num_states)), f"ids in [0, {num_states})")
    check_values("teacher_ids", ids, each & (ids == pairs.mask_index), "ids other than the mask")
    same = each & (ids[..., 1:] == ids[..., :-1])
    check_values("teacher_ids", ids[..., 1:], same, "ids that differ within a row")
    total = log_p.exp().sum(-1)
    check_values("teacher", total, scored & ~(total <= 1 + rounding), "probabilities that sum to at most 1")
