"""Run by torchrun on two ranks with names of functions: the losses of every codebase from a network that is wrapped.

Each rank has half of a batch; gradients are those of the mean of both halves' published losses in one process.
"""

import copy
import importlib
from dataclasses import fields, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torchrun
from cases import assert_near
from standins import Network, problem
from test_losses import CODEBASES
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree

RANKS = 2
ENGINES = ("megatron", "torchtitan")  # They hand over the last layer, not the network; their tests have ranks.
_pytree.register_pytree_node(  # FSDP2 looks into what a model gives, where it knows how
    SimpleNamespace,
    lambda output: ([*vars(output).values()], [*vars(output)]),
    lambda values, names: SimpleNamespace(**dict(zip(names, values, strict=True))),
)


class Half(Network):
    """Has the hidden states of the whole batch, and gives logits of those from a sequence on."""

    first = 0

    def forward(self, input_ids, *_, **asked):
        rows = self.hidden[self.first :][: len(input_ids), : input_ids.shape[1]]
        return SimpleNamespace(logits=self.lm_head(rows))


class DDP(nn.parallel.DistributedDataParallel):
    """Shows its network's attributes to the stand-ins."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def halves(p):
    """The batch of each rank."""
    parts = {f.name: getattr(p, f.name).chunk(RANKS) for f in fields(p) if f.name != "num_states"}
    return [replace(p, **{name: part[rank] for name, part in parts.items()}) for rank in range(RANKS)]


def same_as_one_process(wrap):
    p = problem(4, 9, 33)
    for codebase in sorted({*CODEBASES} - {*ENGINES}):
        cases = [importlib.import_module(f"standins.{codebase}").cases(half) for half in halves(p)]
        for name in cases[0]:
            torch.manual_seed(0)
            whole = Half(p, 8, bias=True, dtype=torch.float64)
            network = wrap(copy.deepcopy(whole))
            for rank, half in enumerate(cases):
                whole.first = rank * len(p.x0) // RANKS
                (half[name][0](whole).sum() / RANKS).backward()
            getattr(network, "module", network).first = dist.get_rank() * len(p.x0) // RANKS
            cases[dist.get_rank()][name][1](network).sum().backward()
            for got, expected in zip(network.parameters(), whole.parameters(), strict=True):
                grad = got.grad.full_tensor() if isinstance(got, DTensor) else got.grad
                assert_near(grad, expected.grad, torch.float64, f"{codebase}: {name}")


def ddp():
    same_as_one_process(DDP)


def fsdp2():
    """The last layer in shards of its own, which are whole in its forward alone."""

    def wrap(network):
        fully_shard(network.lm_head)
        return fully_shard(network)

    same_as_one_process(wrap)


if __name__ == "__main__":
    torchrun.run(globals())
