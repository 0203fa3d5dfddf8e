"""One step of SEDD's and RADD's loops: training, and evaluation with averaged parameters."""

from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn


class Halved:
    """In the place of an average of parameters."""

    def store(self, parameters):
        self.stored = [p.detach().clone() for p in parameters]

    def copy_to(self, parameters):
        for p in parameters:
            p.data.mul_(0.5)

    def restore(self, parameters):
        for p, stored in zip(parameters, self.stored, strict=True):
            p.data.copy_(stored)


def results(step_fn, model, batch):
    """Loss and gradients of a training step, and an evaluation's loss. step_fn(train, optimize_fn): `get_step_fn`'s."""
    torch.manual_seed(0)
    grads = []

    def optimize(optimizer, scaler, params, step):
        grads.extend(p.grad.clone() for p in params)

    optimizer, scaler = torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    state = dict(model=model, optimizer=optimizer, scaler=scaler, ema=mock.Mock(), step=0)
    loss = step_fn(True, optimize)(state, batch)
    evaluated = step_fn(False, optimize)(state | dict(ema=Halved()), batch)
    assert len(grads) == len([*model.parameters()])
    return [loss, evaluated, *grads]


@contextmanager
def in_ddp(model):
    """The model as the codebases wrap it, of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield nn.parallel.DistributedDataParallel(model, static_graph=True, find_unused_parameters=True)
    finally:
        dist.destroy_process_group()


def drawn(model):
    """With numbers in the layers that start with zeros."""
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    return model
