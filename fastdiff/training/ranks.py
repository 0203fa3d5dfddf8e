"""The processes that train together, which torchrun has started, or one alone; and a model over them."""

import copy
import dataclasses
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastdiff.model import DiffusionTransformer
from fastdiff.processes import agree, join
from fastdiff.training.config import TrainConfig

# Logits are one; nothing is done to them in place.
warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(.*\) returned a view tensor")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's number, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Of each rank's values, on their device, without waiting for it."""
        if self.size > 1:
            dist.all_reduce(values.div_(self.size))
        return values

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.size > 1 else None

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error of one rank in the block, where none waits for another, is raised on every rank."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised

        def result() -> None:
            if error is not None:
                raise error

        agree(self.group, result)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """All processes that train, in a process group that is there already, or is made for the block.

    After an error it stays: who waits for others to take it down might wait for ever.
    """
    own = not dist.is_initialized()
    if own and os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks()
        return
    if own:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        join(backend)
    yield Ranks(dist.get_rank(), dist.get_world_size())
    if own:
        dist.destroy_process_group()


def check_topology(config: TrainConfig, ranks: Ranks) -> None:
    """Raises a ValueError where the ranks cannot share a batch, or a model, in equal parts."""
    if config.batch_size % (ranks.size * config.accumulation):
        expected = f"a multiple of ranks x accumulation = {ranks.size} x {config.accumulation}"
        raise ValueError(f"batch_size: expected {expected}, got {config.batch_size}")
    if config.sharding == "hybrid" and ranks.size % _shards(config):
        raise ValueError(f"shards: expected a divisor of the {ranks.size} ranks, got {_shards(config)}")


def over_ranks(
    model: DiffusionTransformer, config: TrainConfig, ranks: Ranks
) -> tuple[nn.Module, DiffusionTransformer]:
    """What to call in the place of a model, which is given to the ranks in place; and a copy of it for its average.

    All ranks begin with the weights of the first.
    """
    averaged = _without_weights(model)
    called: nn.Module = model
    device = model.lm_head.weight.device
    if ranks.size > 1 and config.sharding == "none":
        called = DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif ranks.size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        mesh = _mesh(config, ranks, device)
        for each in (model, averaged):
            _shard(each, mesh, config.dtype)
        register_fsdp_forward_method(averaged, "body")  # the estimators call it
    averaged.to_empty(device=device)
    with torch.no_grad():
        for copied, tensor in zip(_tensors(averaged), _tensors(model), strict=True):
            copied.copy_(tensor)
    return called, averaged


def synchronising(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around a part of a batch: copies of a model sum their gradients with those of the last part.

    Ranks that share a copy sum them after each, or every rank would keep them whole until the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """In the block, the weights that are not in a block are whole: the estimators read those of the last layer."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    yield
    model.reshard()


@contextmanager
def blocks_as(config: TrainConfig, model: DiffusionTransformer) -> Iterator[None]:
    """In the block, the model's blocks run as the settings say."""
    for block in model.blocks:
        forward: Any = block.forward
        if config.recompute:
            forward = partial(checkpoint, forward, use_reentrant=False)
        if config.compile:
            forward = torch.compile(forward)
        block.forward = forward
    try:
        yield
    finally:
        for block in model.blocks:
            del block.forward


def _shards(config: TrainConfig) -> int:
    return config.shards or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _mesh(config: TrainConfig, ranks: Ranks, device: torch.device) -> DeviceMesh:
    if config.sharding == "full":
        return init_device_mesh(device.type, (ranks.size,), mesh_dim_names=("shard",))
    shape = ranks.size // _shards(config), _shards(config)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def _shard(model: DiffusionTransformer, mesh: DeviceMesh, dtype: str) -> None:
    bfloat16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)  # noise levels stay exact
    policy = bfloat16 if dtype == "bfloat16" else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _without_weights(model: DiffusionTransformer) -> DiffusionTransformer:
    """A copy for evaluation whose parameters take no memory yet."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, empty).eval()


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())
