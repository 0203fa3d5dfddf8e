"""Run by torchrun on two ranks with names of functions: each holds training over ranks against one process's."""

import copy
import tempfile
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
import torchrun
from cases import assert_near
from test_training_stack import L, V, make, tokens
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastdiff.training.objectives as objectives
from fastdiff import LogLinear, mask_tokens, sample_times
from fastdiff.training import Noised, diffusion_loss, noise

RANKS, PARTS, STEPS = 2, 2, 2


class WithLoss(nn.Module):
    """The loss is computed in the forward, where the parameters are whole."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch):
        return diffusion_loss(self.model, Noised(*batch), self.loss, reduction="mean", num_items=2 * L)


def trained(model, loss, parts, num_parts):
    """Parameters after steps of SGD on the mean over parts, each the rows of a batch and what makes its context."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index in range(STEPS):
        batch = noise(tokens(2 * RANKS * PARTS), loss, V, seed=5, step=index)
        for rows, context in parts:
            with context():
                (model(*(tensor[rows] for tensor in batch[:4])) / num_parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def same_as_one_process(wrap, hold_back):
    """`hold_back(model)`: the context in which gradients are not yet summed over ranks."""
    size = RANKS * PARTS
    for largest in (4096, 2):  # with logits, and without
        objectives.LARGE_VOCABULARY = largest
        for loss in ("dce-t", "dse-absorb", "dse-uniform"):
            whole = WithLoss(make(loss), loss)
            model = wrap(copy.deepcopy(whole))
            rows = [slice(k, None, size) for k in range(size)]
            contexts = [partial(hold_back, model)] * (PARTS - 1) + [nullcontext]
            mine = list(zip(rows[dist.get_rank() :: RANKS], contexts, strict=True))
            every = [(part, nullcontext) for part in rows]
            for a, b in zip(trained(model, loss, mine, PARTS), trained(whole, loss, every, size), strict=True):
                assert_near(a, b, torch.float32, loss, slack=8)


def ddp():
    same_as_one_process(nn.parallel.DistributedDataParallel, lambda model: model.no_sync())


def fsdp2():
    def wrap(model):
        for block in model.model.blocks:
            fully_shard(block)
        return fully_shard(model)

    same_as_one_process(wrap, deferred)


@contextmanager
def deferred(model):
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def trainer_over_ranks(**options):
    """One step of Trainer: its gradient is that of all ranks' parts over the labels of all."""
    from test_transformers import make
    from test_transformers_models import make as make_real

    for before in (make(), make_real("GPT2LMHeadModel")):  # the last layer on its own, and tied
        step_over_ranks(before, **options)


def step_over_ranks(before, **options):
    from test_transformers import data, published, trainer_of

    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders)  # the first rank saves
        before.save_pretrained(folders[0])
        dist.barrier()
        model = type(before).from_pretrained(folders[0], **options)
        assert all(isinstance(p, DTensor) for p in model.parameters()) == bool(options)
        trainer = trainer_of(model, own, data(8), gradient_accumulation_steps=PARTS)
        trainer.train()
    assert not any(trainer.with_logits)
    every = [None] * RANKS
    dist.all_gather_object(every, (trainer.given, trainer.shown))
    given, shown = (list(chain(*parts)) for parts in zip(*every, strict=True))
    for part in range(PARTS):  # the ranks draw what one process would of the whole batch
        x0, mask, weight = (torch.cat([given[r * PARTS + part][k] for r in range(RANKS)]) for k in range(3))
        names = dict(seed=trainer.args.seed, step=part)
        sigma, dsigma = LogLinear()(sample_times(len(x0), **names))
        whole = mask_tokens(x0, -torch.expm1(-sigma), mask_index=V, maskable=x0 != -100, **names).mask
        assert torch.equal(mask, whole)
        assert torch.equal(weight, dsigma / torch.expm1(sigma))
    assert len({int(num_items) for *_, num_items in given}) == 1
    published(before, given, shown).backward()
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        new = new.full_tensor() if isinstance(new, DTensor) else new
        assert_near(new.detach(), (old - old.grad).detach(), torch.float32, "parameter", slack=16)


def trainer_ddp():
    """As accelerate wraps it."""
    trainer_over_ranks()


def trainer_fsdp2():
    """As transformers shards it; accelerate does on GPUs alone."""
    from transformers.distributed import DistributedConfig

    trainer_over_ranks(distributed_config=DistributedConfig(fsdp_size=RANKS))


if __name__ == "__main__":
    torchrun.run(globals())
