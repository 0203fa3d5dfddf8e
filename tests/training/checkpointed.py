"""What the tests of checkpoints share: runs and values that are saved, and what goes wrong with files."""

import copy
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastdiff.training.checkpoints import Checkpoints


class Network(nn.Module):
    """Sizes that no number of ranks divides, one type more, and a buffer."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 7), nn.Linear(7, 3, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        return self.outer(self.inner(x).tanh().bfloat16()).float() * self.scale


class Run:
    """A network, its average and AdamW, on one process ("plain") or many ("DDP", "FSDP", "HSDP")."""

    def __init__(self, how="plain", *, steps=0):
        torch.manual_seed(steps)  # a run that loads starts from other numbers than the one that has saved
        self.network = Network()
        self.averaged = copy.deepcopy(self.network)
        if how == "DDP":
            self.network = nn.parallel.DistributedDataParallel(self.network)
        elif how != "plain":
            shape, names = ((dist.get_world_size(),), ("shard",)) if how == "FSDP" else ((2, 2), ("replicate", "shard"))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            for network in (self.network, self.averaged):
                for part in (network.inner, network.outer, network):
                    fully_shard(part, mesh=mesh)
        matrices = [p for p in self.network.parameters() if p.dim() == 2]
        vectors = [p for p in self.network.parameters() if p.dim() < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
        self.train(steps)

    def train(self, steps):
        for step in range(steps):
            x = torch.linspace(-1, 1 + step, 20).view(4, 5)
            self.network(x).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.9
            with torch.no_grad():
                for average, raw in zip(self.averaged.parameters(), self.network.parameters(), strict=True):
                    average.lerp_(raw, 0.1)

    def state(self):
        model, optimizer = get_state_dict(self.network, self.optimizer)
        return {"model": model, "averaged": get_model_state_dict(self.averaged), "optimizer": optimizer}

    def load(self, checkpoints, step):
        state = self.state()
        extra = checkpoints.load(step, state)
        parts = dict(model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        set_state_dict(self.network, self.optimizer, **parts)
        return extra

    def values(self):
        return whole(self.state())


def whole(value):
    """A copy of nested values, with tensors that are in parts put together."""
    if isinstance(value, dict):
        return {name: whole(v) for name, v in value.items()}
    if isinstance(value, list):
        return [whole(v) for v in value]
    if isinstance(value, torch.Tensor):
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    return value


def assert_equal(a, b, place=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for name in a:
            assert_equal(a[name], b[name], f"{place}.{name}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{place}.{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, place
        assert torch.equal(a, b), place
    else:
        assert a == b, place


def filled(step):
    return {"model": {f"w{i}": torch.full((100, i + 1), float(step)) for i in range(3)}, "optimizer": {"lr": step}}


def assert_whole(folder):
    """Every checkpoint loads, to what was saved at its step; the newest step."""
    checkpoints = Checkpoints(folder)
    for path in folder.glob("step-*"):
        if path.suffix == "":
            step, state = int(path.name.removeprefix("step-")), filled(-1)
            assert checkpoints.load(step, state) == {"step": step}
            assert_equal(state, filled(step))
    return checkpoints.latest()


@contextmanager
def limit(size):
    """A limit on the size of a file stands in for a full disk; the system then says as little about the file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if how == "flip" else content[: len(content) // 2])


def shared():
    return Path(os.environ["FASTDIFF_TEST_FOLDER"])
