"""The last linear layer and the row loss in one operation: scored rows only, a few of them at a time (`Chunks`)."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import KERNELS, resolve
from fastdiff.ops.chunks import Chunks, Head, reference_logits
from fastdiff.ops.functors import FUNCTORS
from fastdiff.ops.library import define, implement, library, no_derivative, no_forward_mode
from fastdiff.ops.parallel import Shard
from fastdiff.ops.row_loss import (
    ENTROPY,
    IGNORE_NONE,
    ROWS,
    Rows,
    check_row_values,
    loss_dtype,
    new_stats,
    reference_loss,
    reference_stats,
    scored_tokens,
)
from fastdiff.ops.saved_grads import save_grads, scaled
from fastdiff.ops.scored_rows import scored_rows

# hidden [..., D], lm_head [V, D], bias [V]; or no lm_head, and hidden holds the logits. Then as row_loss, over logits
# softcap * tanh(z / softcap) if softcap > 0; capacity: most scored rows, or -1 to count them; dtype: what to multiply
# in; group: whose ranks have a part of all_states ids each, or ""; wanted: which of the first three get a gradient.
# Returns the loss, float32 (float64 for a float64 dtype); those gradients of its sum or mean, or empty; and the
# statistics, as new_stats has them.
_LINEAR = (
    f"Tensor hidden, Tensor? lm_head, Tensor? bias, {ROWS}, float softcap, SymInt capacity, ScalarType dtype, "
    "str group, SymInt all_states"
)
_TENSORS = 11  # of the arguments
_NONE = [False] * 3


def linear_loss(
    head: Head, rows: Rows, backend: str | None, with_stats: bool = False, summed: bool = False
) -> tuple[Tensor, Tensor]:
    """As `row_loss`, with the same fall-back on GPUs; rows.z stands for the logits.

    summed: losses per token will weigh alike, so that the forward pass can make the gradients of their sum.
    """
    backend = resolve(backend, head.hidden.device, "linear_loss", head.num_states)
    if backend == "reference" or (backend != "cpu" and head.dtype == torch.float64):
        return _reference(head, rows, with_stats)
    if head.shard.group and FUNCTORS[rows.functor].over_ranks is None:
        raise ValueError(f"group: the loss {rows.functor} cannot be cut over ranks")
    inputs = (head.hidden, head.lm_head, head.bias)
    no_forward_mode("linear_loss", (*inputs, *rows.arguments()))
    wanted = _NONE
    # In float16 a gradient needs the upstream loss scale at once, as it would underflow without.
    if torch.is_grad_enabled() and (summed or rows.reduction != "none") and head.dtype != torch.float16:
        wanted = [x is not None and x.requires_grad for x in inputs]
    constants = (*rows.arguments()[1:], head.softcap, head.capacity, head.dtype, *head.shard)
    loss, *_, stats = _linear_loss[backend](*inputs, *constants, wanted, with_stats)
    return loss, stats


# ---------------------------------------------------------------------------------------------------------
# The operators: shapes under tracing, and autograd.


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, x0, (reduction, _, _, dtype, _, _, _, with_stats) = arguments[0], arguments[3], arguments[-8:]
    loss = hidden.new_empty(x0.shape if reduction == "none" else (), dtype=loss_dtype(dtype))
    return loss, *_fake_grads(*arguments[:-1]), new_stats(x0, dtype, with_stats)


def _fake_grads(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs = zip(arguments[-1], (hidden, *arguments[:2]), strict=True)
    return tuple(x.new_empty(x.shape) if want and x is not None else hidden.new_empty(0) for want, x in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[-2]
    with_entropy = inputs[-8] == "none" and not any(ctx.wanted) and inputs[-1]
    ctx.mark_non_differentiable(*output[1 : 4 if with_entropy else 5])
    ctx.set_materialize_grads(False)
    ctx.constants = None if any(ctx.wanted) else inputs[_TENSORS:-2]
    if any(ctx.wanted):
        save_grads(ctx, [grad for grad, want in zip(output[1:4], ctx.wanted, strict=True) if want], inputs[:3])
    else:
        ctx.save_for_backward(*inputs[:_TENSORS])


def _backward(backend: str, ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    made: Sequence[Tensor | None] = (None, None, None)
    grad_entropy = None if others[-1] is None else others[-1][ENTROPY]
    if ctx.constants is not None and not (grad_loss is None and grad_entropy is None):
        wanted = list(ctx.needs_input_grad[:3])
        made = _linear_loss_backward[backend](grad_loss, grad_entropy, *ctx.saved_tensors, *ctx.constants, wanted)
        made = [grad if want else None for grad, want in zip(made, wanted, strict=True)]
    elif grad_loss is not None:
        saved = iter(scaled(backend, ctx, _alike(grad_loss)))
        made = [next(saved) if want else None for want in ctx.wanted]
    return (*made, *(None,) * (len(ctx.needs_input_grad) - 3))


def _alike(grad_loss: Tensor) -> Tensor:
    """The one number [] that it is for every loss, or NaN."""
    if grad_loss.dim() == 0:
        return grad_loss
    first = grad_loss.flatten()[:1].sum()
    alike = (grad_loss == first).all()
    if type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and not alike:
        raise ValueError("summed: expected losses that weigh alike in what backward starts from, got others")
    return torch.where(alike, first, math.nan)


_linear_loss = define(
    "linear_loss", f"({_LINEAR}, bool[3] wanted, bool with_stats) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _fake
)
_linear_loss_backward = define(
    "linear_loss_backward",
    f"(Tensor? grad_loss, Tensor? grad_entropy, {_LINEAR}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    lambda grad_loss, grad_entropy, *arguments: _fake_grads(*arguments),
)


library.define("advise_huge_pages(Tensor(a!) fresh) -> ()")

for _backend in KERNELS:
    torch.library.register_autograd(
        f"fastdiff::linear_loss.{_backend}", partial(_backward, _backend), setup_context=_setup_context, lib=library
    )
    no_derivative(f"linear_loss_backward.{_backend}", "double backward")


# ---------------------------------------------------------------------------------------------------------
# The computation.


def _forward(backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    *rest, wanted, with_stats = arguments
    return _compute(backend, *_unpack(*rest), wanted, with_stats)


def _recompute(
    backend: str, grad_loss: Tensor | None, grad_entropy: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    """Gradients for any upstream ones."""
    head, rows = _unpack(*arguments[:-1])
    rows.weigh(grad_loss, grad_entropy)
    return _compute(backend, head, rows, arguments[-1], False)[1:4]


def _unpack(hidden: Tensor, lm_head: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Head, Rows]:
    *constants, softcap, capacity, dtype, group, all_states = rest
    head = Head(hidden, lm_head, bias, softcap, capacity, dtype, Shard(group, all_states))
    return head, Rows(head.logits_like(), *constants)


def _compute(backend: str, head: Head, rows: Rows, wanted: list[bool], with_stats: bool) -> tuple[Tensor, ...]:
    head.shard.checked(rows.x0.device, check_row_values, rows)
    scored = scored_tokens(rows)
    index, count = scored_rows(scored, None if head.capacity < 0 else min(head.capacity, scored.numel()), backend)
    if head.shard.group:
        options = wanted[0] + 2 * with_stats + 4 * (rows.entropy_weight is not None)
        told = [torch.full_like(count, scored.numel()), count, rows.x0.sum(), torch.full_like(count, options)]
        head.shard.check_alike(
            head.num_states,
            torch.stack(told),
            "x0: expected the same tokens (and requires_grad of hidden, and return_stats) on every rank of the group, "
            "got different ones. Under FSDP, call the loss in the forward of the module that holds lm_head, where that "
            "is whole.",
        )
    missing = torch.where(count > len(index), math.nan, 0.0)  # for all to see, should the list be too short
    _reduce(rows, count, missing)
    with torch.autocast(scored.device.type, enabled=False):  # head.dtype has the last word
        rows = dataclasses.replace(rows, ignore_index=IGNORE_NONE)
        chunks = Chunks(backend, head, rows, wanted, missing, with_stats)
        losses, stats = chunks.losses(index, count)
        losses, stats = (losses + missing).view(scored.shape), (stats + missing).view(len(stats), *scored.shape)
        grads = list(chunks.grads())
    loss = losses if rows.reduction == "none" else losses.sum()
    return loss.to(loss_dtype(head.dtype)), *grads, stats


def _reduce(rows: Rows, count: Tensor, missing: Tensor) -> None:
    """Makes the weights include what the reduction divides by, and what is missing."""
    weight = torch.ones_like(rows.x0, dtype=torch.float64) if rows.weight is None else rows.weight
    items = 1 if rows.reduction != "mean" else count.clamp_min(1) if rows.num_items is None else rows.num_items
    rows.weight = weight / items + missing
    rows.entropy_weight = None if rows.entropy_weight is None else rows.entropy_weight / items


def _reference(head: Head, rows: Rows, with_stats: bool) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch and float64, logits and all."""
    rows.z = reference_logits(head)
    dtype = loss_dtype(head.dtype)
    return reference_loss(rows).to(dtype), reference_stats(rows, with_stats).to(dtype)


for _backend in KERNELS:
    implement(f"linear_loss.{_backend}", partial(_forward, _backend))
    implement(f"linear_loss_backward.{_backend}", partial(_recompute, _backend))
