"""Run by torchrun on a few ranks with names of functions: each holds the losses of all ranks against one process's."""

from copy import deepcopy
from functools import partial

import pytest
import sampled
import torch
import torch.distributed as dist
import torchrun
from cases import assert_near, linear_problem, loss_and_grads, loss_of, problem
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils.checkpoint import checkpoint

import fastdiff.ops.chunks as op
from fastdiff import BackendUnavailable, dce_loss, linear_dce_loss, linear_token_logps, time_free_nll, token_logps
from fastdiff.model import DiffusionTransformer, ModelConfig

LEAVES = ("hidden", "lm_head", "bias")
SHARDED = ["dce", "dce_all", "dce_z", "absorb", "absorb_logits", "absorb_scaled", "uniform", "uniform_scaled"]
SHARDED += ["csm_absorb", "csm_uniform"]


def own(tensor, dim=0):
    """This rank's part."""
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()


def agree(name, p, parts, dims, leaves, **options):
    """Loss and gradients from this rank's part of some tensors against those from the whole ones."""
    dtype = p[leaves[0]].dtype
    whole = loss_and_grads(name, p, *leaves, **{k: v for k, v in options.items() if k != "group"})
    got = loss_and_grads(name, p | parts, *leaves, **options)
    for leaf, a, b in zip(("loss", *leaves), got, whole, strict=True):
        if isinstance(a, DTensor):
            a, expected = a.full_tensor(), b
        else:
            expected = own(b, dims[leaf]) if leaf in dims else b
        assert_near(a, expected, dtype, f"{leaf} in {name}", slack=8)


def vocabulary_parallel():
    op.TILE_BYTES["cpu"] = 4 * 4 * 100  # several chunks
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for num_states in (4, 12, 508):
            p = linear_problem((3, 5), num_states, dtype)
            parts = {name: own(p[name]) for name in ("lm_head", "bias")}
            for name in SHARDED:
                for reduction in ("none", "sum", "mean"):
                    options = dict(reduction=reduction, group=dist.group.WORLD)
                    agree(name, p, parts, dict(lm_head=0, bias=0), LEAVES, **options)


def options_of_the_last_layer():
    p = linear_problem((3, 5), 12)
    parts = {name: own(p[name]) for name in ("lm_head", "bias")}
    for options in (dict(softcap=1.5), dict(capacity=15), dict(softcap=2.0, capacity=20)):
        agree("dce", p, parts, dict(lm_head=0, bias=0), LEAVES, reduction="sum", group=dist.group.WORLD, **options)


def statistics():
    """Of whole rows, also where large numbers are alike, on one rank or on both; over several chunks."""
    op.TILE_BYTES["cpu"] = 4 * 4 * 100
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        p = linear_problem((3, 5), 12, dtype)
        p |= {name: (2 * p[name]).round() for name in LEAVES}  # exact, and with ties
        parts = {name: own(p[name]) for name in ("lm_head", "bias")}
        q = problem((3, 5), 12, dtype, spread=0.0)
        q["z"][2] = 1e-3 * torch.arange(12)
        for name in ("dce_all", "dce_z"):
            for options in (dict(), dict(reduction="sum"), dict(softcap=9.0, capacity=15)):
                given = dict(options, return_stats=True)
                got = loss_of(name, p | parts, group=dist.group.WORLD, **given)
                torch.testing.assert_close(got, loss_of(name, p, **given), rtol=2e-6, atol=2e-6)
            got = loss_of(name, q | dict(z=own(q["z"], 2)), return_stats=True, group=dist.group.WORLD)
            torch.testing.assert_close(got, loss_of(name, q, return_stats=True), rtol=2e-6, atol=2e-6)


def log_probabilities():
    """And entropies, with gradients, of sharded weights and of sharded logits; over several chunks."""
    op.TILE_BYTES["cpu"] = 4 * 4 * 100
    for dtype, spread in ((torch.float64, 1.0), (torch.float32, 1.0), (torch.float32, 30.0), (torch.bfloat16, 1.0)):
        p, q = linear_problem((3, 5), 12, dtype), problem((3, 5), 12, dtype, spread=spread, mask_index=3)
        q["z"][0, :, :6] = -torch.inf  # a part without weight
        q["x0"][0] = 7
        mask = p["weight"] < 0.8

        def of_hidden(hidden, lm_head, bias, group=None, p=p, mask=mask):
            options = dict(bias=bias, softcap=3.0, temperature=0.7, mask=mask, return_entropy=True, group=group)
            return linear_token_logps(hidden, lm_head, p["x0"], **options)

        def of_logits(z, group=None, q=q):
            return token_logps(z, q["x0"], mask_index=3, return_entropy=True, group=group)

        for call, whole, cut in ((of_hidden, [p[leaf] for leaf in LEAVES], [None, 0, 0]), (of_logits, [q["z"]], [2])):
            parts = [x if dim is None else own(x, dim) for x, dim in zip(whole, cut, strict=True)]
            results = []
            for leaves, group in ((whole, None), (parts, dist.group.WORLD)):
                leaves = [x.clone().requires_grad_() for x in leaves]
                logps, entropy = call(*leaves, group=group)
                upstream = torch.linspace(-1, 2, 15, dtype=logps.dtype).view(3, 5)
                loss = (logps * upstream + entropy * upstream.flip(0)).sum()
                results.append((logps.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)))
            for got, expected, dim in zip(*results[::-1], [None, None, *cut], strict=True):
                assert_near(got, expected if dim is None else own(expected, dim), dtype, str(call), slack=8)


def sharded_logits():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        p = problem((3, 5), 510, dtype, mask_index=200)
        for name in SHARDED:
            for reduction in ("none", "mean"):
                options = dict(reduction=reduction, group=dist.group.WORLD)
                agree(name, p, dict(z=own(p["z"], 2)), dict(z=2), ("z",), **options)


def numbers_of_any_size():
    """Large ones beside small ones, a part without weight, and one without any number but the mask's."""
    p = problem((2, 4), 8, torch.float32, mask_index=0)
    p["z"][0] += 1e4
    p["z"][1, :, :4] = -torch.inf
    p["x0"][1] = 5
    p["xt"] = torch.zeros_like(p["xt"])
    for name in ("dce", "dce_all"):
        agree(name, p, dict(z=own(p["z"], 2)), dict(z=2), ("z",), reduction="sum", group=dist.group.WORLD)
    p["z"][0, 0, 3] = torch.nan
    whole, got = (
        loss_of("dce", p | dict(z=z), return_stats=True, group=group)
        for z, group in ((p["z"], None), (own(p["z"], 2), dist.group.WORLD))
    )
    assert torch.equal(whole[0].isnan(), got[0].isnan())
    assert got[0].isnan()[0, 0]
    torch.testing.assert_close(got[1], whole[1], equal_nan=True)


def dtensors():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = linear_problem((3, 5), 13)  # the last rank has fewer ids
    parts = {name: distribute_tensor(p[name], mesh, [Shard(0)]) for name in ("lm_head", "bias")}
    parts["hidden"] = distribute_tensor(p["hidden"], mesh, [Replicate()])
    for name in ("dce", "uniform"):
        for reduction in ("none", "sum"):
            agree(name, p, parts, dict(lm_head=0, bias=0), LEAVES, reduction=reduction)
    q = problem((3, 5), 13)
    agree("absorb", q, dict(z=distribute_tensor(q["z"], mesh, [Shard(2)])), dict(z=2), ("z",), reduction="sum")
    wrong = distribute_tensor(p["lm_head"], mesh, [Replicate()])
    with pytest.raises(ValueError, match="lm_head: expected a DTensor sharded"):
        linear_dce_loss(p["hidden"], wrong, p["x0"])


def wrong_calls_raise_on_every_rank():
    p, rank, group = linear_problem((3, 5), 12), dist.get_rank(), dist.group.WORLD
    part = own(p["lm_head"])
    call = partial(linear_dce_loss, p["hidden"], exclude_mask=False, group=group)
    with pytest.raises(ValueError, match="x0: expected the same tokens"):
        call(part, torch.full_like(p["x0"], rank))
    with pytest.raises(ValueError, match=r"group: expected shards of .* ids on its 2 ranks, got \[5, 6\]"):
        call(p["lm_head"][: 5 + rank], p["x0"] % 10)
    with pytest.raises(ValueError, match="group: the loss dse_uniform_logits cannot be cut over ranks"):
        loss_of("uniform_logits", p | dict(lm_head=part, bias=None), group=group)
    with pytest.raises(ValueError, match="return_stats"):
        dce_loss(p["hidden"], p["x0"] % 10, exclude_mask=False, return_stats=rank == 0, group=group)
    with pytest.raises(BackendUnavailable, match="sharded"):
        call(part, p["x0"], backend="reference")


def what_one_rank_refuses_raises_on_every_rank():
    """Arguments as of shape, type and value, of one rank: forward, and where backward multiplies once more."""
    p, last, group = linear_problem((3, 5), 12), dist.get_rank() == dist.get_world_size() - 1, dist.group.WORLD
    q = problem((3, 5), 12)
    parts = dict(lm_head=own(p["lm_head"]), bias=own(p["bias"])), dict(z=own(q["z"], 2))
    wrong = {
        "x0: expected ids in": dict(x0=p["x0"].index_fill(1, torch.tensor([2]), 12)),
        "x0: expected shape": dict(x0=p["x0"][:, 1:]),
        "x0: expected int64": dict(x0=p["x0"].float()),
        "xt: expected x0 or the mask": dict(xt=(p["x0"] + 1) % 11),
        "sigma: expected finite numbers >= 0": dict(sigma=-p["sigma"]),
        "sigma: expected a number or a shape": dict(sigma=torch.ones(4)),
        "(weight|dsigma): has no gradient here": dict(weight=p["weight"].clone().requires_grad_()),
    }
    for message, argument in wrong.items():
        for name in ("absorb",) if "sigma" in argument else ("dce", "absorb"):
            for given in (p | parts[0], q | parts[1]):
                with pytest.raises((ValueError, TypeError), match=message):
                    loss_of(name, given | argument if last else given, group=group)


class Head(nn.Module):
    """A body and a last layer; the loss is computed where the parameters are whole."""

    def __init__(self, p):
        super().__init__()
        self.body = nn.Linear(16, 16, bias=False)
        self.lm_head = nn.Linear(16, len(p["lm_head"]))
        nn.init.eye_(self.body.weight)
        self.lm_head.weight.data, self.lm_head.bias.data = p["lm_head"].clone(), p["bias"].clone()

    def forward(self, p, reduction):
        head = self.lm_head
        q = p | dict(hidden=self.body(p["hidden"]), lm_head=head.weight, bias=head.bias)
        loss = loss_of("dce", q, reduction=reduction)
        return (loss * p["upstream"]).sum() if reduction == "none" else loss


def data_parallel():
    """Each rank has sequences of its own; gradients are the mean over ranks, for DDP and FSDP2 alike."""
    ranks = dist.get_world_size()
    p = linear_problem((4 * ranks, 5), 27)
    p["upstream"] = torch.linspace(-1, 2, p["x0"].numel()).view(p["x0"].shape)
    mine = {k: own(v) if torch.is_tensor(v) and len(v) == 4 * ranks else v for k, v in p.items()}
    for reduction in ("none", "sum"):
        whole = Head(p)
        whole(p, reduction).backward()
        expected = {name: parameter.grad / ranks for name, parameter in whole.named_parameters()}
        wrapped = {"DDP": nn.parallel.DistributedDataParallel(Head(p)), "FSDP2": fully_shard(Head(p))}
        for how, model in wrapped.items():
            model(mine, reduction).backward()
            for name, parameter in model.named_parameters():
                grad = parameter.grad.full_tensor() if how == "FSDP2" else parameter.grad
                assert grad.abs().max() > 0
                assert_near(grad, expected[name.removeprefix("module.")], torch.float32, f"{name}, {how}", slack=8)


def double_backward_is_an_error():
    """Through a wrapped model, as for a penalty on the gradient, and through parts of the last layer."""
    p = linear_problem((4, 6), 12)
    p |= dict(hidden=p["hidden"].requires_grad_(), upstream=torch.ones(4, 6))
    part = p | dict(lm_head=own(p["lm_head"]), bias=own(p["bias"]))
    sharded = fully_shard(Head(p), reshard_after_forward=False)
    sharded.set_reshard_after_backward(False)  # torch could not go through it again
    for reduction in ("none", "sum"):
        losses = [model(p, reduction) for model in (nn.parallel.DistributedDataParallel(Head(p)), sharded)]
        for loss in (*losses, loss_of("dce", part, reduction=reduction, group=dist.group.WORLD).sum()):
            (grad,) = torch.autograd.grad(loss, p["hidden"], create_graph=True)
            with pytest.raises(RuntimeError, match="double backward"):
                torch.autograd.grad(loss + grad.square().sum(), p["hidden"])


def fsdp_with_a_last_layer_of_its_own():
    """Outside of its own forward the layer's weight is in parts, and tokens differ: an error, no wrong gradient."""
    p = linear_problem((4 * dist.get_world_size(), 5), 27)
    mine = {k: own(v) if torch.is_tensor(v) and len(v) == 4 * dist.get_world_size() else v for k, v in p.items()}
    model = Head(p)
    fully_shard(model.lm_head)
    fully_shard(model)
    with pytest.raises(ValueError, match="Under FSDP, call the loss in the forward"):
        model(mine, "sum")


def likelihoods_with_gradients():
    """Passes that backward runs again, under DDP, FSDP2 and checkpointing: the mean of the ranks' gradients."""
    torch.manual_seed(0)
    x0 = torch.randint(8, (2 * dist.get_world_size(), 6))
    network = DiffusionTransformer(ModelConfig(9, 6, 16, 2, 2)).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    options = dict(mask_index=8, num_samples=8, batch_size=3, differentiable=True)
    time_free_nll(network, x0, **options).nll.sum().backward()
    expected = {name: parameter.grad / dist.get_world_size() for name, parameter in network.named_parameters()}
    network.zero_grad()
    sharded, checkpointed = deepcopy(network), deepcopy(network)
    for block in sharded.blocks:
        fully_shard(block)
    for block in checkpointed.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    wrapped = {"DDP": nn.parallel.DistributedDataParallel(network), "FSDP2": fully_shard(sharded)}
    wrapped |= {"checkpointed": nn.parallel.DistributedDataParallel(checkpointed)}
    for how, model in wrapped.items():
        for times in (1, 2):  # gradients of several backwards add up
            time_free_nll(model, own(x0), sample_ids=own(torch.arange(len(x0))), **options).nll.sum().backward()
            for name, parameter in model.named_parameters():
                grad = parameter.grad.full_tensor() if how == "FSDP2" else parameter.grad
                wanted = times * expected[name.removeprefix("module.")]
                assert (grad - wanted).abs().max() < 1e-10, f"{name}, {how}"


if __name__ == "__main__":
    torchrun.run(globals() | vars(sampled))
