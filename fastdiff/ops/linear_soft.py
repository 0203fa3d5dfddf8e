"""The last linear layer and the mean embedding under its softmax in one operation: a few rows of logits at a time."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.backends import KERNELS, resolve
from fastdiff.ops.chunks import Chunks, Head, reference_logits
from fastdiff.ops.library import define, implement, library, no_derivative, no_forward_mode
from fastdiff.ops.parallel import Shard
from fastdiff.ops.row_loss import loss_dtype, new_stats
from fastdiff.ops.scored_rows import scored_rows

# hidden [..., D], lm_head [V, D], bias [V], embedding [V, D'], mask bool [...]; mask_index: an id that has no
# probability, or -1; the others as linear_loss has them. Returns the embeddings, in the type of a loss, [..., D'], and
# the log-sum-exp of the logits, float64 [...]; 0 where the mask is False.
_LINEAR = (
    "Tensor hidden, Tensor lm_head, Tensor? bias, Tensor embedding, Tensor mask, int mask_index, float softcap, "
    "SymInt capacity, ScalarType dtype, str group, SymInt all_states"
)
_TENSORS = 5  # of the arguments


def linear_soft(head: Head, embedding: Tensor, mask: Tensor, mask_index: int, backend: str | None) -> Tensor:
    """Mean embeddings in the type of a loss, [..., D'], 0 where the mask is False."""
    backend = resolve(backend, head.hidden.device, "linear_loss", head.num_states)
    if backend == "reference":
        return _reference(head, embedding, mask, mask_index)
    inputs = (head.hidden, head.lm_head, head.bias, embedding)
    no_forward_mode("linear_soft", inputs)
    return _linear_soft[backend](*inputs, mask, mask_index, head.softcap, head.capacity, head.dtype, *head.shard)[0]


# ---------------------------------------------------------------------------------------------------------
# The operators: shapes under tracing, and autograd.


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    hidden, embedding, mask, dtype = arguments[0], arguments[3], arguments[4], arguments[-3]
    soft = hidden.new_empty((*mask.shape, embedding.shape[1]), dtype=loss_dtype(dtype))
    return soft, hidden.new_empty(mask.shape, dtype=torch.float64)


def _fake_grads(grad: Tensor, soft: Tensor, logsumexp: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs = zip(arguments[-1], arguments[:4], strict=True)
    return tuple(x.new_empty(x.shape) if want and x is not None else grad.new_empty(0) for want, x in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.constants = inputs[_TENSORS:]
    ctx.save_for_backward(*output, *inputs[:_TENSORS])


def _backward(backend: str, ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    wanted, made = list(ctx.needs_input_grad[:4]), [None] * 4
    if grad is not None:
        grads = _linear_soft_backward[backend](grad, *ctx.saved_tensors, *ctx.constants, wanted)
        made = [x if want else None for x, want in zip(grads, wanted, strict=True)]
    return (*made, *(None,) * 7)


_linear_soft = define("linear_soft", f"({_LINEAR}) -> (Tensor, Tensor)", _fake)
_linear_soft_backward = define(
    "linear_soft_backward",
    f"(Tensor grad, Tensor soft, Tensor logsumexp, {_LINEAR}, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_grads,
)


# ---------------------------------------------------------------------------------------------------------
# The computation.


def _forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    head, embedding, mask, mask_index = _unpack(*arguments)
    index, count, missing = _rows(backend, head, mask, False)
    with torch.autocast(mask.device.type, enabled=False):  # head.dtype has the last word
        chunks = _Means(backend, head, embedding, mask_index, missing)
        logsumexp = chunks.losses(index, count)[0]
    soft = (chunks.soft[:-1] + missing).view(*mask.shape, embedding.shape[1])
    return soft.to(loss_dtype(head.dtype)), logsumexp.view(mask.shape)


def _recompute(backend: str, grad: Tensor, soft: Tensor, logsumexp: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    head, embedding, mask, mask_index = _unpack(*arguments[:-1])
    index, count, missing = _rows(backend, head, mask, arguments[-1][0])
    with torch.autocast(mask.device.type, enabled=False):
        chunks = _Gradients(backend, head, embedding, mask_index, missing, (grad, soft, logsumexp), arguments[-1])
        chunks.losses(index, count)
        return (*chunks.grads(), chunks.finished_embedding())


def _unpack(
    hidden: Tensor, lm_head: Tensor, bias: Tensor | None, embedding: Tensor, mask: Tensor, mask_index: int, *rest: Any
) -> tuple[Head, Tensor, Tensor, int]:
    softcap, capacity, dtype, group, all_states = rest
    shard = Shard(group, all_states)
    own = mask_index - shard.first if group else mask_index
    head = Head(hidden, lm_head, bias, softcap, capacity, dtype, shard)
    return head, embedding, mask, own if 0 <= own < len(lm_head) and mask_index >= 0 else -1


def _rows(backend: str, head: Head, mask: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The list of rows, how many there are, and 0, or NaN if the list is too short; over ranks checked to be alike."""
    index, count = scored_rows(mask, None if head.capacity < 0 else min(head.capacity, mask.numel()), backend)
    if head.shard.group:
        told = [torch.full_like(count, mask.numel()), count, index.sum(), torch.full_like(count, with_grad)]
        expected = "the same positions (and requires_grad of hidden) on every rank of the group, got different ones"
        head.shard.check_alike(head.num_states, torch.stack(told), f"mask: expected {expected}")
    return index, count, torch.where(count > len(index), torch.nan, 0.0)


class _Softmax(Chunks):
    """Chunks of logits that become probabilities, in the type of a loss."""

    def __init__(
        self, backend: str, head: Head, embedding: Tensor, mask_index: int, missing: Tensor, wanted: list[bool]
    ) -> None:
        super().__init__(backend, head, None, wanted, missing, False)
        self.embedding, self.mask_index = embedding.to(head.dtype), mask_index

    def _sums_suffice(self) -> bool:
        return False

    def _row_bytes(self) -> int:
        return super()._row_bytes() + 2 * self._num_ids() * self.exact.itemsize

    def _numbers(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        z, slope = self._logits(hidden)
        x = z.to(self.exact)
        if self.mask_index >= 0:
            x[:, self.mask_index] = -torch.inf
        return x, slope

    def _mm(self, a: Tensor, b: Tensor) -> Tensor:
        """A product of head.dtype, summed and kept in the type of a loss where that is to be had."""
        options: dict[str, Any] = {"out_dtype": self.exact} if a.is_cuda and self.head.dtype != self.exact else {}
        return torch.mm(a.to(self.head.dtype), b, **options).to(self.exact)


class _Means(_Softmax):
    """What the forward pass makes of chunks: their log-sum-exps, and `soft`, a row more than there are."""

    def __init__(self, backend: str, head: Head, embedding: Tensor, mask_index: int, missing: Tensor) -> None:
        super().__init__(backend, head, embedding, mask_index, missing, [False] * 3)
        self.soft = self.hidden.new_zeros((len(self.hidden) + 1, embedding.shape[1]), dtype=self.exact)

    def _chunk(self, part: Tensor) -> tuple[Tensor, Tensor]:
        exists, shard = part < len(self.hidden), self.head.shard
        x, _ = self._numbers(self.hidden[torch.where(exists, part, 0)].to(self.head.dtype))
        top = shard.max(x.amax(1)) if shard.group else x.amax(1)
        weights = x.sub_(top.unsqueeze(1)).exp_()
        total = shard.sum(weights.sum(1)) if shard.group else weights.sum(1)
        root = total.rsqrt().unsqueeze(1)  # before and after the product: no end of float16 is near
        soft = self._mm(weights.mul_(root), self.embedding) * root
        self.soft[part] = shard.sum(soft) if shard.group else soft
        logsumexp = top.double() + total.double().log()
        return logsumexp, new_stats(logsumexp, self.head.dtype, False)


class _Gradients(_Softmax):
    """What backward makes of chunks. With upstream g of a mean, that of a logit is p_v (g E_v - g soft), that of an
    embedding p_v g."""

    def __init__(
        self,
        backend: str,
        head: Head,
        embedding: Tensor,
        mask_index: int,
        missing: Tensor,
        saved: tuple[Tensor, Tensor, Tensor],
        wanted: list[bool],
    ) -> None:
        super().__init__(backend, head, embedding, mask_index, missing, wanted[:3])
        grad, soft, logsumexp = saved
        self.grad, self.logsumexp = grad.reshape(-1, grad.shape[-1]), logsumexp.flatten()
        self.inner = (grad * soft).sum(-1, dtype=torch.float64).flatten()
        self.grad_embedding: Tensor | None = None
        self.wants_embedding, self.like = wanted[3], embedding

    def _chunk(self, part: Tensor) -> tuple[Tensor, Tensor]:
        exists = part < len(self.hidden)
        at = torch.where(exists, part, 0)
        hidden = self.hidden[at].to(self.head.dtype)
        x, slope = self._numbers(hidden)
        p = x.sub_(self.logsumexp[at].unsqueeze(1)).exp_()
        grad = torch.where(exists.unsqueeze(1), self.grad[at], 0) + self.missing.to(self.exact)
        if self.wants_embedding:
            self.grad_embedding = self._plus_product(
                self.grad_embedding, p.to(self.head.dtype), grad.to(self.head.dtype)
            )
        if self.with_grad:
            inner = torch.where(exists, self.inner[at], 0).to(self.exact).unsqueeze(1)
            slopes = self._mm(grad, self.embedding.t()).sub_(inner).mul_(p)
            self._add_grads((slopes if slope is None else slopes.mul_(slope)).to(self.head.dtype), hidden, part)
        return self.logsumexp[at], new_stats(self.logsumexp[at], self.head.dtype, False)

    def finished_embedding(self) -> Tensor:
        return self._finished(self.grad_embedding, self.like) if self.wants_embedding else self.like.new_empty(0)


def _reference(head: Head, embedding: Tensor, mask: Tensor, mask_index: int) -> Tensor:
    """The same in plain PyTorch and float64, logits and all."""
    z = reference_logits(head)
    if mask_index >= 0:
        z = z.index_fill(-1, torch.tensor(mask_index, device=z.device), -torch.inf)
    soft = F.linear(torch.softmax(z, -1), embedding.double().t())
    return torch.where(mask.unsqueeze(-1), soft, 0).to(loss_dtype(head.dtype))


for _backend in KERNELS:
    torch.library.register_autograd(
        f"fastdiff::linear_soft.{_backend}", partial(_backward, _backend), setup_context=_setup_context, lib=library
    )
    implement(f"linear_soft.{_backend}", partial(_forward, _backend))
    implement(f"linear_soft_backward.{_backend}", partial(_recompute, _backend))
    no_derivative(f"linear_soft_backward.{_backend}", "double backward")
