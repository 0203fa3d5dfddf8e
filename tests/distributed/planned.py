"""Run by torchrun on 4 ranks: the bytes that a step exchanges and keeps are those of its plan."""

import weakref

import pytest
import torch
import torch.distributed as dist
import torchrun
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import TrainConfig, diffusion_loss, noise
from fastdiff.training.planning import Plan
from fastdiff.training.ranks import Ranks, blocks_as, over_ranks, synchronising

LENGTH = 16
SHAPE = ModelConfig(5001, LENGTH, 64, 3, 2, learned_positions=False)


class Received(TorchDispatchMode):
    """Counts what collectives move to a rank, in a ring of those that take part."""

    def __init__(self, shards):
        super().__init__()
        self.shards, self.bytes = shards, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("c10d::").split(".")[0]
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            self._add(name, args[name == "_reduce_scatter_base_"], 1 - 1 / self.shards)
        elif name == "allreduce_":
            ranks = dist.get_world_size() if self.shards == 1 else dist.get_world_size() // self.shards
            for tensor in args[0]:
                self._add(name, tensor, 2 * (1 - 1 / ranks))
        return function(*args, **(kwargs or {}))

    def _add(self, name, tensor, share):
        self.bytes[name] = self.bytes.get(name, 0) + share * tensor.numel() * tensor.itemsize


def exchanged():
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    for sharding, shards, dtype, parts, recompute in (
        ("none", 0, "bfloat16", 1, False),
        ("none", 0, "float32", 2, False),
        ("full", 0, "bfloat16", 1, True),
        ("full", 0, "float32", 2, False),
        ("hybrid", 2, "bfloat16", 2, False),
    ):
        config = TrainConfig(
            batch_size=8, sharding=sharding, shards=shards, dtype=dtype, accumulation=parts, recompute=recompute
        )
        plan = Plan(SHAPE, config, ranks.size, LENGTH)
        model = DiffusionTransformer(SHAPE)
        called, _ = over_ranks(model, config, ranks)
        step(called, config)  # the loss asks the model once what is behind its last layer
        with Received(plan.shards) as received:
            step(called, config)
        found, planned = received.bytes, plan.exchanged
        gathered = planned.get("all-gather, forward", 0) + planned.get("all-gather, backward", 0)
        case = sharding, dtype, parts
        assert found.get("_allgather_base_", 0) == pytest.approx(gathered, rel=0.03), case
        assert found.get("_reduce_scatter_base_", 0) == pytest.approx(planned.get("reduce-scatter", 0), rel=0.03), case
        assert found.get("allreduce_", 0) == pytest.approx(planned.get("all-reduce", 0), rel=0.03), case
        own = sum(p._local_tensor.numel() if plan.sharded else p.numel() for p in model.parameters())
        if ranks.first:
            assert 4 * own == plan.memory["weights"], case


class Taken(TorchDispatchMode):
    """Counts the memory of tensors made in it, while they live."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        if storage.nbytes() and storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, name):
        self.now -= self.live.pop(name)


def most_memory():
    """Not above the plan, and not far below; without the logits, which are made inside an operator."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    for length, sequences, sharding, dtype, recompute, parts in (
        (32, 2, "hybrid", "bfloat16", False, 2),  # weights take most
        (32, 2, "none", "float32", True, 2),
        (128, 8, "none", "float32", False, 1),  # activations
        (128, 8, "none", "bfloat16", True, 2),
        (128, 8, "full", "float32", False, 2),
        (128, 8, "full", "bfloat16", True, 1),
    ):
        shape = ModelConfig(5001, length, 128, 4, 4, learned_positions=False)
        training = {"sharding": sharding, "dtype": dtype, "recompute": recompute, "accumulation": parts}
        training["shards"] = 2 if sharding == "hybrid" else 0
        config = TrainConfig(batch_size=sequences * ranks.size * parts, **training)
        plan = Plan(shape, config, ranks.size, length)
        model = DiffusionTransformer(shape)
        called, _ = over_ranks(model, config, ranks)
        with blocks_as(config, model):
            step(called, config, shape)
            model.zero_grad()
            with Taken() as taken:  # DDP makes its buckets anew in its second step
                step(called, config, shape)
        before = sum(plan.memory[name] for name in ("weights", "AdamW", "averaged weights"))
        planned = plan.total - before - (plan.logits if "activations" in plan.memory else 0)
        assert 0.6 < taken.most / planned < 1.05, config


def step(called, config, shape=SHAPE):
    x0 = torch.randint(0, 5000, (config.batch_size // dist.get_world_size(), shape.max_length))
    parts = x0.chunk(config.accumulation)
    for part in parts:
        with (
            synchronising(called, last=part is parts[-1]),
            torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"),
        ):
            batch = noise(part, config.loss, shape.num_states, seed=0, step=0)
            diffusion_loss(called, batch, config.loss, reduction="mean", num_items=x0.numel()).backward()


if __name__ == "__main__":
    torchrun.run(globals())
