"""The last layer for some of its rows at a time: their losses, and the sums of their gradients.

Logits are made, turned into their gradient where they lie, multiplied into the gradients and forgotten.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.backends import BackendUnavailable
from fastdiff.ops.functors import FUNCTORS
from fastdiff.ops.parallel import Shard, sharded_losses_
from fastdiff.ops.row_loss import loss_dtype, new_stats, reference_loss, row_losses_

# Bytes of logits that exist at a time. On a GPU a chunk must be large enough to keep the multiplier busy.
TILE_BYTES = {"cpu": 52 << 20, "cuda": 512 << 20}
# Ids multiplied at a time, in products that are faster in parts, by device and bytes of a number: logits on the CPU,
# whose blocks then stay in cache, and 16-bit gradients, there and on their way into a float32 sum.
IDS = {("cpu", 8): 512, ("cpu", 4): 512, ("cpu", 2): 8192, ("cuda", 2): 8192}
ROWS = 512  # of logits' gradients, multiplied at a time on the CPU: in bfloat16 that is faster than all at once


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


def reference_logits(head: Head) -> Tensor:
    """Of a whole last layer, in float64: [..., V]."""
    if head.shard.group or head.lm_head is None:
        raise BackendUnavailable("backend 'reference': cannot be sharded over a group")
    bias = None if head.bias is None else head.bias.double()
    z = F.linear(head.hidden.double(), head.lm_head.double(), bias)
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


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
        ids = len(lm_head) if hidden.is_cuda else IDS["cpu", hidden.itemsize]
        for first in range(0, len(lm_head), ids):
            some = slice(first, first + ids)
            if self.bias is None:
                torch.mm(hidden, lm_head[some].t(), out=z[:, some])
            else:
                torch.addmm(self.bias[some], hidden, lm_head[some].t(), out=z[:, some])
        return z

    def _add_grads(self, grad: Tensor, hidden: Tensor, part: Tensor) -> None:
        if self.grad_hidden is not None:
            rows = len(grad) if grad.is_cuda else ROWS
            for at, some in zip(part.split(rows), grad.split(rows), strict=True):
                product = some if self.lm_head is None else some @ self.lm_head
                self.grad_hidden[at] = product.to(self.grad_hidden.dtype)
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
        same = grad.dtype == total.dtype
        if same and (grad.is_cuda or grad.itemsize > 2):
            return torch.addmm(total, grad.t(), hidden, beta=0 if first else 1, out=total)
        options: dict[str, Any] = {"out_dtype": total.dtype} if grad.is_cuda else {}
        ids = IDS[grad.device.type, grad.itemsize]
        for some, columns in zip(total.split(ids), grad.split(ids, 1), strict=True):
            if same:  # of one chunk
                torch.mm(columns.t(), hidden, out=some)
                continue
            product = torch.mm(columns.t(), hidden, **options)
            some.copy_(product) if first else some.add_(product)
        return total
