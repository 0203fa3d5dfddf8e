"""The last linear layer and the row loss in one operation: scored rows only, a few of them at a time.

Logits are made, turned into their gradient where they lie, multiplied into the gradients and forgotten.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.backends import KERNELS, BackendUnavailable, resolve
from fastdiff.ops.functors import FUNCTORS
from fastdiff.ops.library import define, implement, library, no_derivative, no_forward_mode
from fastdiff.ops.parallel import Shard, sharded_losses_
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
    row_losses_,
    scored_tokens,
)
from fastdiff.ops.saved_grads import save_grads, scaled
from fastdiff.ops.scored_rows import scored_rows

# Bytes of logits that exist at a time. On a GPU a chunk must be large enough to keep the multiplier busy.
TILE_BYTES = {"cpu": 52 << 20, "cuda": 512 << 20}
# Ids multiplied at a time, in products that are faster in parts: the logits in float32 on the CPU, whose blocks then
# stay in cache, and 16-bit gradients on their way into a float32 sum.
IDS = {"cpu": 512, "cuda": 8192}

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


@dataclasses.dataclass
class Head:
    """The last layer: softcap * tanh((hidden @ lm_head.T + bias) / softcap), multiplied in dtype."""

    hidden: Tensor
    lm_head: Tensor | None
    bias: Tensor | None
    softcap: float
    capacity: int
    dtype: torch.dtype
    shard: Shard

    @property
    def num_states(self) -> int:
        """How many ids this rank has."""
        return self.hidden.shape[-1] if self.lm_head is None else len(self.lm_head)

    def logits_like(self) -> Tensor:
        """One number in the shape of the logits, which are never made."""
        shape = (*self.hidden.shape[:-1], self.shard.all_states)
        return self.hidden.detach().new_empty((), dtype=self.dtype).expand(shape)


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


class Chunks:
    """The scored rows, a chunk of logits at a time: their losses, and the sums of their gradients.

    rows: Rows, or what a subclass makes chunks of.
    """

    def __init__(
        self, backend: str, head: Head, rows: Any, wanted: list[bool], missing: Tensor, with_stats: bool
    ) -> None:
        self.backend, self.head, self.rows = backend, head, rows
        self.hidden = head.hidden.reshape(-1, head.hidden.shape[-1])
        self.lm_head = None if head.lm_head is None else head.lm_head.to(head.dtype)
        self.bias = None if head.bias is None else head.bias.to(head.dtype)
        self.exact = loss_dtype(head.dtype)
        num_rows, width = self.hidden.shape
        partial_sums = head.shard.group and head.lm_head is not None  # over this rank's ids
        dtype = self.exact if partial_sums else self.hidden.dtype
        self.missing = missing  # 0, or NaN: the gradients where no row is multiplied
        # One row more than there are: what fills the list up goes there.
        shape = (num_rows + 1, width)
        self.grad_hidden = self.hidden.new_empty(shape, dtype=dtype).fill_(missing) if wanted[0] else None
        self.grad_lm_head: Tensor | None = None  # until there is one
        self.grad_bias: Tensor | None = None
        self.tile: Tensor | None = None
        self.sum_dtype = self.exact
        self.wanted, self.with_grad, self.with_stats = wanted, any(wanted), with_stats

    def losses(self, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Of all rows, float64, and their statistics: those of the list, and 0."""
        losses = torch.zeros(len(self.hidden) + 1, dtype=torch.float64, device=index.device)
        stats = new_stats(losses, self.head.dtype, self.with_stats).zero_()
        if self.lm_head is not None and self._sums_suffice():
            losses[index] = self._from_sums(self.lm_head, index, count)
            return losses[:-1], stats[:, :-1]
        length = self._length(len(index))
        if self.head.lm_head is not None:
            # One tile for all chunks: a new one each time would cost its page faults.
            self.tile = self._fresh((length, self.head.num_states), self.head.dtype)
            if len(index) <= length:
                self.sum_dtype = self.head.lm_head.dtype  # one chunk: nothing to sum up
        for part in index.split(length) if len(index) else ():
            losses[part], stats[:, part] = self._chunk(part)
        self.tile = None  # before gradients are copied into their type
        return losses[:-1], stats[:, :-1]

    def _sums_suffice(self) -> bool:
        """Whether a kernel makes what is asked for from tiles of logits that are never stored."""
        more = self.with_grad or self.with_stats or self.rows.entropy_weight is not None
        sums = FUNCTORS[self.rows.functor].from_sums and not more
        return sums and self.head.dtype.itemsize == 2 and self.backend == "triton" and not self.head.shard.group

    def _from_sums(self, lm_head: Tensor, index: Tensor, count: Tensor) -> Tensor:
        """Losses from three numbers in the place of each row: log sum exp of the other ids, x0's, and the mask's."""
        from fastdiff.kernels.linear_loss import row_sums

        exists = index < len(self.hidden)
        at = torch.where(exists, index, 0)
        rows, excluded = self.rows.at(at), self.rows.mask_index if self.rows.exclude_mask else -1
        hidden = self.hidden.to(self.head.dtype)
        others, at_x0 = row_sums(hidden, lm_head, self.bias, at, count, rows.x0, excluded, self.head.softcap)
        z = torch.stack([others, at_x0, torch.full_like(at_x0, -math.inf)], 1)
        if rows.scale_by_sigma:  # by the number of states
            z = z + math.log(2) - math.log(self.head.num_states - 1)
        rows.z, rows.x0, rows.xt = z, torch.where(exists, 1, rows.ignore_index), torch.full_like(rows.x0, 2)
        rows.mask, rows.mask_index, rows.exclude_mask, rows.reduction = None, 2, True, "none"
        return reference_loss(rows)

    def grads(self) -> Iterator[Tensor]:
        if self.grad_hidden is not None:
            self.grad_hidden = self.grad_hidden[:-1]
            if self.head.shard.group and self.lm_head is not None:
                self.head.shard.sum(self.grad_hidden)
        sums = (self.grad_hidden, self.grad_lm_head, self.grad_bias)
        inputs = (self.head.hidden, self.head.lm_head, self.head.bias)
        for total, x, want in zip(sums, inputs, self.wanted, strict=True):
            if not want or x is None:
                yield self.hidden.new_empty(0)
            else:
                yield self._finished(total, x)

    def _finished(self, total: Tensor | None, like: Tensor) -> Tensor:
        if total is None:
            return torch.empty_like(like).fill_(self.missing)
        if total.dtype == like.dtype:
            return total.view(like.shape)
        return self._fresh(like.shape, like.dtype).copy_(total.view(like.shape))

    def _fresh(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """New memory, with few page faults."""
        fresh = self.hidden.new_empty(shape, dtype=dtype)
        if self.backend == "cpu":
            torch.ops.fastdiff.advise_huge_pages(fresh)
        return fresh

    def _length(self, num_rows: int) -> int:
        """Rows of a chunk, all alike, whose logits fit the tile; all of them if more chunks would need more memory."""
        row = self._row_bytes()
        if num_rows * row <= self._sum_bytes():
            return max(1, num_rows)
        most = max(1, TILE_BYTES[self.hidden.device.type] // row)
        return max(1, math.ceil(num_rows / max(1, math.ceil(num_rows / most))))

    def _num_ids(self) -> int:
        """Of a row, the same on all ranks."""
        return self.head.shard.size if self.head.shard.group else self.head.num_states

    def _row_bytes(self) -> int:
        """What a row of logits takes. A softcap keeps two more copies, in float32."""
        return self._num_ids() * (self.head.dtype.itemsize + (0 if self.head.softcap == 0 else 8))

    def _sum_bytes(self) -> int:
        """What the sum of lm_head's gradient over chunks takes, if that needs a wider type.

        0 over ranks: they must cut the same chunks, and one may want no such gradient.
        """
        weights = self.head.lm_head
        if weights is None or not self.wanted[1] or weights.dtype == self.exact or self.head.shard.group:
            return 0
        return weights.numel() * self.exact.itemsize

    def _chunk(self, part: Tensor) -> tuple[Tensor, Tensor]:
        exists = part < len(self.hidden)
        at = torch.where(exists, part, 0)
        rows = self.rows.at(at)
        rows.x0 = torch.where(exists, rows.x0, rows.ignore_index)
        hidden = self.hidden[at].to(self.head.dtype)
        rows.z, slope = self._logits(hidden)
        if self.head.shard.group:
            results = sharded_losses_(rows, self.backend, self.head.shard, self.with_grad, self.with_stats)
        else:
            results = row_losses_(rows, self.backend, self.head.num_states, self.with_grad, self.with_stats)
        if self.with_grad:
            self._add_grads(rows.z if slope is None else rows.z.mul_(slope).to(self.head.dtype), hidden, part)
        return results

    def _logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of some rows, and with a softcap its slope at each."""
        z, softcap = hidden, self.head.softcap
        if self.lm_head is not None and self.tile is not None:
            z = self._product(self.tile[: len(hidden)], hidden, self.lm_head)
        if softcap == 0:
            return z, None
        slope = (z.to(self.exact) / softcap).tanh_()
        z = slope * softcap
        return z, slope.square_().neg_().add_(1)

    def _product(self, z: Tensor, hidden: Tensor, lm_head: Tensor) -> Tensor:
        whole = hidden.dtype.itemsize == 2 or hidden.is_cuda
        ids = len(lm_head) if whole else IDS["cpu"]
        for first in range(0, len(lm_head), ids):
            some = slice(first, first + ids)
            if self.bias is None:
                torch.mm(hidden, lm_head[some].t(), out=z[:, some])
            else:
                torch.addmm(self.bias[some], hidden, lm_head[some].t(), out=z[:, some])
        return z

    def _add_grads(self, grad: Tensor, hidden: Tensor, part: Tensor) -> None:
        if self.grad_hidden is not None:
            self.grad_hidden[part] = (grad if self.lm_head is None else grad @ self.lm_head).to(self.grad_hidden.dtype)
        if self.wanted[1]:
            self.grad_lm_head = self._plus_product(self.grad_lm_head, grad, hidden)
        if self.wanted[2]:
            total = grad.sum(0, dtype=self.exact)
            self.grad_bias = total if self.grad_bias is None else self.grad_bias + total

    def _plus_product(self, total: Tensor | None, grad: Tensor, hidden: Tensor) -> Tensor:
        """total + grad.T @ hidden, in place; the product alone if there is no total yet.

        Where only a product of their own type is to be had, it is rounded once a chunk.
        """
        first = total is None
        if total is None:
            total = self._fresh((grad.shape[1], hidden.shape[1]), self.sum_dtype)
        if grad.dtype == total.dtype:
            return torch.addmm(total, grad.t(), hidden, beta=0 if first else 1, out=total)
        options: dict[str, Any] = {"out_dtype": total.dtype} if grad.is_cuda else {}
        ids = IDS[grad.device.type]
        for some, columns in zip(total.split(ids), grad.split(ids, 1), strict=True):
            product = torch.mm(columns.t(), hidden, **options)
            some.copy_(product) if first else some.add_(product)
        return total


def _reference(head: Head, rows: Rows, with_stats: bool) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch and float64, logits and all."""
    rows.z = reference_logits(head)
    dtype = loss_dtype(head.dtype)
    return reference_loss(rows).to(dtype), reference_stats(rows, with_stats).to(dtype)


def reference_logits(head: Head) -> Tensor:
    """Of a whole last layer, in float64: [..., V]."""
    if head.shard.group or head.lm_head is None:
        raise BackendUnavailable("backend 'reference': cannot be sharded over a group")
    bias = None if head.bias is None else head.bias.double()
    z = F.linear(head.hidden.double(), head.lm_head.double(), bias)
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


for _backend in KERNELS:
    implement(f"linear_loss.{_backend}", partial(_forward, _backend))
    implement(f"linear_loss_backward.{_backend}", partial(_recompute, _backend))
