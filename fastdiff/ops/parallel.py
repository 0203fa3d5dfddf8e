"""Rows cut across the ranks of a process group, each rank with as many consecutive ids, the last perhaps with fewer.

Tokens and hidden states are the same on all ranks; so are the losses, and the gradient of the hidden states.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.ops.functors import FUNCTORS
from fastdiff.ops.row_loss import ENTROPY, Rows, loss_dtype, row_losses_

T = TypeVar("T")


class Shard(NamedTuple):
    """A rank's part of `all_states` ids. The group goes by its name, as operators take no objects; "" is no group."""

    group: str
    all_states: int

    @property
    def process_group(self) -> "dist.ProcessGroup":
        return dist.distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        return -(-self.all_states // dist.get_world_size(self.process_group))

    @property
    def first(self) -> int:
        return self.size * dist.get_rank(self.process_group)

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.process_group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Of all ranks, [ranks, ...]."""
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.process_group))]
        dist.all_gather(parts, tensor, group=self.process_group)
        return torch.stack(parts)

    def checked(self, device: torch.device, check: Callable[..., T], *arguments: Any) -> T:
        """check(*arguments), ahead of `check_alike`: what it raises on one rank, all raise."""
        try:
            return check(*arguments)
        except (TypeError, ValueError) as error:
            if self.group:
                self.max(torch.ones(8, dtype=torch.int64, device=device))  # where the others are
                self._raise_on_all(error)
            raise

    def check_alike(self, num_states: int, mine: Tensor, expected: str) -> None:
        """Raises on all ranks if the ranks' parts do not belong together, when they would wait for ever, or if `mine`
        is not the same on all: int64 [4], of which the first is a number of tokens."""
        ranks = dist.get_world_size(self.process_group)
        met = self.max(torch.cat([-mine, mine])).tolist()
        if met[0] > 0:  # a number of tokens below 0: a rank is in `checked`
            self._raise_on_all(None)
        found = self.gather(torch.full_like(mine[0], num_states)).tolist()
        sizes = [min(self.size, self.all_states - self.size * rank) for rank in range(ranks)]
        if found != sizes or sizes[-1] < 1:
            raise ValueError(f"group: expected shards of {sizes} ids on its {ranks} ranks, got {found}")
        if any(high != -low for low, high in zip(met[:4], met[4:], strict=True)):
            raise ValueError(expected)

    def _raise_on_all(self, error: Exception | None) -> NoReturn:
        """The first rank's error, on all ranks."""
        errors = [None] * dist.get_world_size(self.process_group)
        dist.all_gather_object(errors, error, self.process_group)
        raise next(filter(None, errors))


def shard_of(name: str, tensor: Tensor, dim: int, group: "dist.ProcessGroup | None") -> tuple[Tensor, Shard]:
    """A rank's own part of a tensor sharded along `dim`: of a DTensor, or a plain tensor itself if a group is given."""
    if (sharded := _dtensor(tensor)) is not None:
        placements, mesh, dim = sharded.placements, sharded.device_mesh, dim % tensor.dim()
        if group is not None or mesh.ndim != 1 or not placements[0].is_shard(dim):
            raise ValueError(
                f"{name}: expected a DTensor sharded along its ids on a mesh of one dimension, and no group, "
                f"got {placements} on {mesh}"
            )
        group, num_states, tensor = mesh.get_group(), tensor.shape[dim], sharded.to_local()
    elif group is not None:
        if not dist.is_initialized():
            raise ValueError("group: expected torch.distributed to be initialised")
        num_states = tensor.shape[dim] * dist.get_world_size(group)
    if group is None or dist.get_world_size(group) == 1:
        return tensor, Shard("", tensor.shape[dim])
    return tensor, Shard(group.group_name, num_states)


def replicated(name: str, tensor: Tensor) -> Tensor:
    """A plain tensor; of a DTensor that every rank has, what it has."""
    if (dtensor := _dtensor(tensor)) is None:
        return tensor
    if not all(placement.is_replicate() for placement in dtensor.placements):
        raise ValueError(f"{name}: expected the same on all ranks, got a DTensor of {dtensor.placements}")
    return dtensor.to_local()


def sharded_losses_(rows: Rows, backend: str, shard: Shard, with_grad: bool, with_stats: bool) -> tuple[Tensor, Tensor]:
    """`row_losses_` of whole rows, of which rows.z holds this rank's part; ids count from the first of all."""
    part = _own(rows, shard)
    if FUNCTORS[rows.functor].over_ranks == "sum":  # a sum over ids, and what belongs to x0 is added where x0 is
        losses, none = row_losses_(part, backend, shard.all_states, with_grad)
        return shard.sum(losses), none
    scored, z = rows.x0 != rows.ignore_index, rows.z
    weight = torch.ones_like(scored, dtype=torch.float64) if rows.weight is None else rows.weight
    if rows.sigma is not None:
        weight = weight * torch.exp(-rows.sigma) / -torch.expm1(-rows.sigma)
    pull = rows.entropy_weight
    here, at = part.x0 >= 0, part.x0.clamp_min(0).unsqueeze(1)
    plain: dict[str, Any] = dict(sigma=None, weight=None, entropy_weight=None, penalty=0.0)
    others = dataclasses.replace(part, x0=torch.where(scored, -1, part.x0), **plain)
    own, stats = row_losses_(others, backend, shard.all_states, False, with_stats or pull is not None)
    top = shard.max(own.clone())
    at_x0 = torch.where(here, z.gather(1, at).squeeze(1).double(), 0)
    total, at_x0 = shard.sum(torch.stack([torch.exp(own - top), at_x0]))
    logsumexp = top + total.log()
    log_p, slope = at_x0 - logsumexp, 1 + 2 * rows.penalty * logsumexp
    share, p = torch.exp(own - logsumexp), log_p.exp()
    loss = weight * (rows.penalty * logsumexp**2 - log_p)
    if with_stats or pull is not None:  # a part's -sum p log p is its share of the sum times own_entropy
        own_entropy = torch.where(share == 0, 0, stats[ENTROPY] + logsumexp - own)
        entropy = shard.sum(share * own_entropy)
    stats = _whole_stats(part, rows.x0, shard, entropy, logsumexp, log_p) if with_stats else stats[:0]
    if pull is not None:
        loss = loss + pull * entropy
    if with_grad:
        others.weight = share * weight * slope
        entry = weight * (torch.expm1(log_p) + (slope - 1) * p)
        if pull is not None:
            others.entropy_weight = share * pull
            others.weight -= others.entropy_weight * (entropy - own_entropy)
            entry -= torch.where(p == 0, 0, pull * p * (log_p + entropy))
        row_losses_(others, backend, shard.all_states, True)
        z.scatter_(1, at, torch.where(here.unsqueeze(1), entry.unsqueeze(1).to(z.dtype), z.gather(1, at)))
    return torch.where(scored, loss, 0), torch.where(scored, stats, 0)


def _whole_stats(part: Rows, x0: Tensor, shard: Shard, entropy: Tensor, logsumexp: Tensor, log_p: Tensor) -> Tensor:
    """Statistics of whole rows, of which part.z is this rank's part."""
    z = part.z
    if part.exclude_mask:
        z[:, part.mask_index] = -torch.inf  # for now: its gradient is 0
    largest, at = z.double().max(1)
    first = torch.where(largest == shard.max(largest.clone()), at + shard.first, shard.all_states)
    correct = (-shard.max(-first) == x0) & ~logsumexp.isnan()
    return torch.stack([logsumexp, entropy, correct, -log_p]).to(loss_dtype(z.dtype))


def _own(rows: Rows, shard: Shard) -> Rows:
    """The rows with ids that count from the first of this part, as `row_losses_` wants them. All are scored."""
    first, num_states = shard.first, rows.z.shape[-1]

    def own(ids: Tensor, elsewhere: Tensor) -> Tensor:
        return torch.where((ids >= first) & (ids < first + num_states), ids - first, elsewhere)

    xt = None
    if rows.xt is not None and FUNCTORS[rows.functor].apart == "xt":
        xt = own(rows.xt, (rows.xt == rows.x0).long() - 2)
    return dataclasses.replace(
        rows,
        x0=own(rows.x0, torch.where(rows.x0 == rows.ignore_index, rows.ignore_index, -1)),
        xt=xt,
        mask=None,
        mask_index=rows.mask_index - first,
        exclude_mask=rows.exclude_mask and first <= rows.mask_index < first + num_states,
    )


def _dtensor(tensor: Tensor) -> Any:
    """The tensor if it is a DTensor, whose module is not imported here: it would take longer than all of fastdiff."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None
