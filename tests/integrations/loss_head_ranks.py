"""Run by torchrun on two ranks with names of functions: a model with LossHead is trained as by one process's logits."""

import copy
from functools import partial

import torch
import torch.distributed as dist
import torchrun
from loss_heads import B, L, Network, Scaled, V, batch, scaled_and_capped, with_layer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fastdiff.integrations.loss_head as loss_head
from fastdiff import dce_loss
from fastdiff.integrations.loss_head import LossHead

RANKS, STEPS = 2, 2
NETWORKS = (Network, lambda: Network(bias=False, tail=scaled_and_capped), lambda: with_layer(Scaled))


def parameters(model):
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return [p.detach().clone() for p in model.parameters()]
    return [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def trained(model, loss_of, rows, scale):
    """Parameters after steps of SGD on some rows of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        xt, x0, options = batch(seed=step)
        options = {name: value[rows] for name, value in options.items()}
        for reduction in ("mean", "none"):
            loss = loss_of(model, xt[rows], x0[rows], **options, reduction=reduction)
            (loss.sum() * scale / (x0.numel() if reduction == "none" else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


def by_logits(model, xt, x0, **options):
    return dce_loss(model(xt).logits, x0, **with_num_items(options))


def by_head(model, xt, x0, **options):
    with LossHead(model).dce_loss(x0, **with_num_items(options)) as loss_of:
        loss = loss_of(model(xt).logits)
    assert model(xt).logits.shape[:2] == xt.shape
    return loss


def with_num_items(options):
    return options | (dict(num_items=B * L) if options["reduction"] == "mean" else {})


def same_as_one_process(wrap, *, networks=NETWORKS, data_parallel=True, rtol=1e-10):
    """Under data parallelism, which means gradients, a rank has every other row; otherwise ranks have the same."""
    loss_head.TILE_BYTES["cpu"] = 5 * V * 8  # several parts
    rows = slice(dist.get_rank(), None, RANKS) if data_parallel else slice(None)
    for make in networks:
        whole = make()
        model = wrap(copy.deepcopy(whole))
        got = trained(model, by_head, rows, RANKS if data_parallel else 1)
        for a, b in zip(got, trained(whole, by_logits, slice(None), 1), strict=True):
            torch.testing.assert_close(a.to(b.dtype), b, rtol=rtol, atol=rtol * 10)


def ddp():
    same_as_one_process(nn.parallel.DistributedDataParallel)


def fsdp2():
    def wrap(model):
        fully_shard(model.body)
        return fully_shard(model)

    same_as_one_process(wrap)


def fsdp2_with_the_head_by_itself():
    def wrap(model):
        fully_shard(model.lm_head, reshard_after_forward=True)
        return fully_shard(model)

    same_as_one_process(wrap)


def fsdp2_with_a_part_of_the_head_by_itself():
    def wrap(model):
        fully_shard(model.lm_head.inner, reshard_after_forward=True)
        return fully_shard(model)

    same_as_one_process(wrap, networks=NETWORKS[2:])


def hsdp():
    for shape in ((RANKS, 1), (1, RANKS)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        same_as_one_process(lambda model, mesh=mesh: fully_shard(model, mesh=mesh))


def fsdp1():
    for use_orig_params in (False, True):
        wrap = partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        same_as_one_process(wrap)
        same_as_one_process(partial(fsdp1_with_the_head_by_itself, wrap))


def fsdp1_with_the_head_by_itself(wrap, model):
    model.lm_head = wrap(model.lm_head)
    return wrap(model)


def tensor_parallel():
    mesh = init_device_mesh("cpu", (RANKS,))
    for output, local in ((Shard(-1), False), (Shard(-1), True), (Replicate(), False), (Replicate(), True)):
        plan = ColwiseParallel(output_layouts=output, use_local_output=local)
        same_as_one_process(
            lambda model, plan=plan: parallelize_module(model, mesh, {"lm_head": plan}),
            networks=NETWORKS[:2],
            data_parallel=False,
        )


def fsdp2_and_tensor_parallel():
    """On a mesh of both: the last layer's weights are cut twice."""
    plan = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    for shape in ((RANKS, 1), (1, RANKS)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))

        def wrap(model, mesh=mesh):
            parallelize_module(model, mesh["tensor"], {"lm_head": plan})
            fully_shard(model.lm_head, mesh=mesh["data"])
            return fully_shard(model, mesh=mesh["data"])

        same_as_one_process(wrap, networks=NETWORKS[:2], data_parallel=shape[0] == RANKS)


if __name__ == "__main__":
    torchrun.run(globals())
