"""Two last layers and the divergence between what they give in one operation: scored rows only, a few at a time."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import KERNELS, resolve
from fastdiff.ops.chunks import Chunks, Head, reference_logits
from fastdiff.ops.distill import Pairs, reference_distill, row_distill_
from fastdiff.ops.library import define, implement, library, no_derivative, no_forward_mode
from fastdiff.ops.parallel import Shard
from fastdiff.ops.row_loss import loss_dtype, new_stats
from fastdiff.ops.saved_grads import save_grads, scaled
from fastdiff.ops.scored_rows import scored_rows

# hidden [..., D], lm_head [V, D], bias [V]; teacher [..., D'], teacher_lm_head [V, D'], teacher_bias [V], or with ids
# the log-probabilities [..., k] alone. Then as row_distill and linear_loss.
_LINEAR = (
    "Tensor hidden, Tensor lm_head, Tensor? bias, Tensor? teacher_lm_head, Tensor? teacher_bias, Tensor teacher, "
    "Tensor? ids, Tensor? mask, Tensor? weight, Tensor? num_items, bool reverse, int mask_index, float scale, "
    "str reduction, float softcap, float teacher_softcap, SymInt capacity, ScalarType dtype"
)
_TENSORS = 10  # of the arguments
_NONE = [False] * 3


def linear_distill(head: Head, teaching: Head | None, pairs: Pairs, backend: str | None) -> Tensor:
    """As `row_distill`, with the same fall-back on GPUs; pairs.z, and pairs.teacher if `teaching` makes it, stand for
    logits."""
    backend = resolve(backend, head.hidden.device, "linear_distill", head.num_states)
    if backend == "reference" or (backend != "cpu" and head.dtype == torch.float64):
        pairs.z = reference_logits(head)
        pairs.teacher = pairs.teacher if teaching is None else reference_logits(teaching).detach()
        return reference_distill(pairs).to(loss_dtype(head.dtype))
    inputs = (head.hidden, head.lm_head, head.bias)
    no_forward_mode("linear_distill", inputs)
    wanted = _NONE
    # In float16 a gradient needs the upstream loss scale at once, as it would underflow without.
    if torch.is_grad_enabled() and pairs.reduction != "none" and head.dtype != torch.float16:
        wanted = [x is not None and x.requires_grad for x in inputs]
    _, _, *rest = pairs.arguments()
    teacher: list[Any] = [None, None, pairs.teacher]
    if teaching is not None:
        teacher = [x if x is None else x.detach() for x in (teaching.lm_head, teaching.bias, teaching.hidden)]
    softcaps = (head.softcap, 0.0 if teaching is None else teaching.softcap)
    return _linear_distill[backend](*inputs, *teacher, *rest, *softcaps, head.capacity, head.dtype, wanted)[0]


# ---------------------------------------------------------------------------------------------------------
# The operators: shapes under tracing, and autograd.


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, (reduction, _, _, _, dtype, _) = arguments[0], arguments[-6:]
    loss = hidden.new_empty(hidden.shape[:-1] if reduction == "none" else (), dtype=loss_dtype(dtype))
    return loss, *_fake_grads(*arguments)


def _fake_grads(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs = zip(arguments[-1], (hidden, *arguments[:2]), strict=True)
    return tuple(x.new_empty(x.shape) if want and x is not None else hidden.new_empty(0) for want, x in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.constants = None if any(ctx.wanted) else inputs[_TENSORS:-1]
    if any(ctx.wanted):
        save_grads(ctx, [grad for grad, want in zip(output[1:], ctx.wanted, strict=True) if want], inputs[:3])
    else:
        ctx.save_for_backward(*inputs[:_TENSORS])


def _backward(backend: str, ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    made: list[Tensor | None] = [None, None, None]
    if grad_loss is not None and ctx.constants is not None:
        wanted = list(ctx.needs_input_grad[:3])
        grads = _linear_distill_backward[backend](grad_loss, *ctx.saved_tensors, *ctx.constants, wanted)
        made = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    elif grad_loss is not None:
        saved = iter(scaled(backend, ctx, grad_loss))
        made = [next(saved) if want else None for want in ctx.wanted]
    return (*made, *(None,) * (len(ctx.needs_input_grad) - 3))


_linear_distill = define("linear_distill", f"({_LINEAR}, bool[3] wanted) -> (Tensor, Tensor, Tensor, Tensor)", _fake)
_linear_distill_backward = define(
    "linear_distill_backward",
    f"(Tensor grad_loss, {_LINEAR}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    lambda grad_loss, *arguments: _fake_grads(*arguments),
)


# ---------------------------------------------------------------------------------------------------------
# The computation.


def _forward(backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    return _compute(backend, *_unpack(*arguments[:-1]), arguments[-1])


def _recompute(backend: str, grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients for any upstream one."""
    head, teaching, pairs = _unpack(*arguments[:-1])
    pairs.weigh(grad_loss)
    return _compute(backend, head, teaching, pairs, arguments[-1])[1:]


def _unpack(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    teacher_lm_head: Tensor | None,
    teacher_bias: Tensor | None,
    teacher: Tensor,
    *rest: Any,
) -> tuple[Head, Head | None, Pairs]:
    *constants, softcap, teacher_softcap, capacity, dtype = rest
    shard = Shard("", len(lm_head))
    head, teaching = Head(hidden, lm_head, bias, softcap, capacity, dtype, shard), None
    if teacher_lm_head is not None:
        teaching = Head(teacher, teacher_lm_head, teacher_bias, teacher_softcap, capacity, dtype, shard)
    return head, teaching, Pairs(head.logits_like(), teacher, *constants)


def _compute(backend: str, head: Head, teaching: Head | None, pairs: Pairs, wanted: list[bool]) -> tuple[Tensor, ...]:
    scored = pairs.scored()
    index, count = scored_rows(scored, None if head.capacity < 0 else min(head.capacity, scored.numel()), backend)
    missing = torch.where(count > len(index), torch.nan, 0.0)  # for all to see, should the list be too short
    items = 1 if pairs.reduction != "mean" else count.clamp_min(1) if pairs.num_items is None else pairs.num_items
    weight = torch.ones_like(scored, dtype=torch.float64) if pairs.weight is None else pairs.weight
    pairs.weight = weight / items + missing
    with torch.autocast(scored.device.type, enabled=False):  # head.dtype has the last word
        chunks = _Pairs(backend, head, teaching, pairs, wanted, missing)
        losses = (chunks.losses(index, count)[0] + missing).view(scored.shape)
        grads = list(chunks.grads())
    loss = losses if pairs.reduction == "none" else losses.sum()
    return loss.to(loss_dtype(head.dtype)), *grads


class _Pairs(Chunks):
    """Chunks of the student's logits beside the teacher's."""

    def __init__(
        self, backend: str, head: Head, teaching: Head | None, pairs: Pairs, wanted: list[bool], missing: Tensor
    ) -> None:
        super().__init__(backend, head, pairs, wanted, missing, False)
        self.teacher = None if teaching is None else Chunks(backend, teaching, pairs, _NONE, missing, False)

    def losses(self, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        found = super().losses(index, count)
        self.teacher = None  # and its tile, before gradients are copied into their type
        return found

    def _sums_suffice(self) -> bool:
        return False

    def _chunk(self, part: Tensor) -> tuple[Tensor, Tensor]:
        exists = part < len(self.hidden)
        at = torch.where(exists, part, 0)
        pairs, hidden = self.rows.at(at), self.hidden[at].to(self.head.dtype)
        pairs.mask = exists
        pairs.z, slope = self._logits(hidden)
        if (teacher := self.teacher) is not None:
            if teacher.tile is None:  # of its own, for all chunks, of which the first is the longest
                teacher.tile = self._fresh((len(at), self.head.num_states), self.head.dtype)
            pairs.teacher = teacher._logits(teacher.hidden[at].to(self.head.dtype))[0].to(pairs.z.dtype)
        losses = row_distill_(pairs, self.backend, self.with_grad)
        if self.with_grad:
            self._add_grads(pairs.z if slope is None else pairs.z.mul_(slope).to(self.head.dtype), hidden, part)
        return losses, new_stats(losses, self.head.dtype, False)


for _backend in KERNELS:
    torch.library.register_autograd(
        f"fastdiff::linear_distill.{_backend}", partial(_backward, _backend), setup_context=_setup_context, lib=library
    )
    implement(f"linear_distill.{_backend}", partial(_forward, _backend))
    implement(f"linear_distill_backward.{_backend}", partial(_recompute, _backend))
    no_derivative(f"linear_distill_backward.{_backend}", "double backward")
