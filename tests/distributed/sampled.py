"""Functions for ranks.py: tokens and mean embeddings of logits that are cut over ranks, against one process's."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import assert_near, linear_problem, problem
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import fastdiff.ops.parallel as ranks
from fastdiff import linear_sample_tokens, linear_soft_embeddings, sample, sample_tokens
from fastdiff.ops.chunks import TILE_BYTES

LAWS = [dict(), dict(temperature=0.0), dict(temperature=0.6, exclude=(0, 3)), dict(top_k=3, temperature=2.0)]
LAWS += [dict(top_p=0.7), dict(top_k=40, top_p=0.9, temperature=1.5), dict(exclude_mask=False)]


def own(tensor, dim=0):
    """This rank's part: as many ids as on every rank, or fewer on the last."""
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()


def alike(got, expected):
    """The same tokens, and statistics that are as near as those of kernels are."""
    (tokens, stats), (wanted, wanted_stats) = got, expected
    assert torch.equal(tokens, wanted)
    assert torch.equal(stats.argmax, wanted_stats.argmax)
    torch.testing.assert_close(stats[:3], wanted_stats[:3], rtol=2e-5, atol=2e-6)


def tokens_of_one_rank():
    """Of logits, short rows and long ones, over several chunks; some with ties, some without weight on a rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sizes = {torch.float64: 510, torch.float32: 7, torch.bfloat16: 2300, torch.float16: 2300}
    for dtype, num_states in sizes.items():  # 7: the last rank has fewer ids, as a DTensor may
        p = problem((4, 12), num_states, dtype)
        z = p["z"]
        z[:2] = z[:2].round()  # with ties
        z[:, 3, : num_states // 2] = -torch.inf
        TILE_BYTES["cpu"] = 20 * num_states * 20
        for law in LAWS:
            draw = partial(sample_tokens, xt=p["xt"], seed=3, step=5, mask=p["weight"] < 0.8, **law)
            whole = draw(z, return_stats=True)
            alike(draw(distribute_tensor(z, mesh, [Shard(2)]), return_stats=True), whole)
            if num_states == 510:
                assert torch.equal(draw(own(z, 2), group=dist.group.WORLD), whole[0])


def tokens_of_hidden_states():
    """Of a last layer in parts, plain and as a DTensor; and whole sequences, which a sampler fills."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dtype in (torch.float32, torch.bfloat16):
        p = linear_problem((4, 12), 1500, dtype)
        p |= {name: (2 * p[name]).round() for name in ("hidden", "lm_head", "bias")}  # exact in any order
        TILE_BYTES["cpu"] = 20 * 1500 * 20
        for law in LAWS:
            options = dict(xt=p["xt"], seed=7, return_stats=True, **law)
            whole = linear_sample_tokens(p["hidden"], p["lm_head"], bias=p["bias"], **options)
            parts = dict(lm_head=own(p["lm_head"]), bias=own(p["bias"]), group=dist.group.WORLD)
            alike(linear_sample_tokens(p["hidden"], **parts, **options), whole)
        parts = {name: distribute_tensor(p[name], mesh, [Shard(0)]) for name in ("lm_head", "bias")}
        hidden = distribute_tensor(p["hidden"], mesh, [Replicate()])
        alike(linear_sample_tokens(hidden, **parts, **options), whole)

    def body(xt):
        return p["hidden"].float().roll(xt.sum().item(), 1)

    for sampler in ("confidence", "ancestral"):
        layers = (p["lm_head"].float(), distribute_tensor(p["lm_head"].float(), mesh, [Shard(0)]))
        options = dict(num_samples=4, length=12, steps=4, mask_index=1499, sampler=sampler, seed=1)
        whole, got = (sample((body, lm_head), **options) for lm_head in layers)
        assert torch.equal(whole, got)


def top_p_of_flat_rows():
    """Sets that hold ids of every rank: how many of equal or nearly equal numbers are drawn."""
    z = torch.zeros(1, 4000, 12)
    z[..., ::2] = 1e-3
    xt = torch.full((1, 4000), 11)
    for law, ids in ((dict(top_p=0.2), 6), (dict(top_k=6), 6), (dict(top_k=7), 11), (dict(top_p=0.6), 11)):
        drawn = sample_tokens(own(z, 2), xt, seed=0, group=dist.group.WORLD, **law)
        assert len(drawn.unique()) == ids
        assert torch.equal(drawn, sample_tokens(z, xt, seed=0, **law))
    assert torch.equal(sample_tokens(own(z, 2), 0 * xt, group=dist.group.WORLD), 0 * xt)  # nothing to draw


def what_differs_or_does_not_fit_raises_on_every_rank():
    p, rank, group = problem((3, 5), 12), dist.get_rank(), dist.group.WORLD
    last, part = rank == dist.get_world_size() - 1, own(p["z"], 2)
    call = partial(sample_tokens, group=group)
    for given in (dict(seed=rank), dict(step=rank), dict(temperature=1.0 + rank), dict(exclude=(rank,)),
                  dict(sample_ids=torch.arange(3) + rank), dict(return_stats=last), dict(seed=0 if last else None),
                  dict(mask=torch.arange(15).view(3, 5) % 3 == rank)):  # fmt: skip
        with pytest.raises(ValueError, match="xt: expected the same tokens, places to draw"):
            call(part, p["xt"], **dict(dict(seed=0), **given))
    with pytest.raises(ValueError, match="xt: expected the same tokens"):
        call(part, p["xt"] * (rank + 1), seed=0)
    for message, given in (("top_p: expected a number in", dict(top_p=2.0)), ("top_k: ", dict(top_k=0)),
                           ("temperature: ", dict(temperature=-1)), ("exclude: expected an id", dict(exclude=(12,))),
                           ("mask: expected a bool", dict(mask=p["xt"])), ("seed: ", dict(seed="1"))):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            call(part, p["xt"], **dict(dict(seed=0), **(given if last else {})))
    with pytest.raises(ValueError, match="group: expected shards of"):
        call(p["z"][..., : 4 + rank].contiguous(), p["xt"] % 4, seed=0)
    for bad in (torch.nan, torch.inf):
        broken = part.clone()
        broken[p["xt"] == 11] = bad if last else 0.0
        with pytest.raises(ValueError, match="logits: expected finite numbers"):
            call(broken, p["xt"], seed=0)
    torch.manual_seed(rank)  # without a seed the first rank's is drawn
    z, xt = torch.zeros(1, 200, 12), torch.full((1, 200), 11)
    drawn = call(own(z, 2), xt)
    torch.manual_seed(0)
    assert torch.equal(drawn, sample_tokens(z, xt))


def soft_embeddings():
    """With gradients, of tied weights and of an embedding of its own, in equal parts and as DTensors."""
    mesh, group = init_device_mesh("cpu", (dist.get_world_size(),)), dist.group.WORLD
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for num_states, dtensors in ((12, False), (13, True)):
            TILE_BYTES["cpu"] = 4 * num_states * 12
            p = linear_problem((3, 5), num_states, dtype)
            names, mask = ("hidden", "lm_head", "bias", "embedding"), p["weight"] < 0.8
            p["embedding"] = p["lm_head"].flip(0, 1)[:, :7].contiguous()
            upstream = torch.linspace(-1, 2, 105, dtype=dtype).view(3, 5, 7)
            for mask_index in (-1, 3):
                results = []
                for cut in (False, True):
                    leaves = [p[name].clone() for name in names]
                    if cut and dtensors:
                        leaves = leaves[:1] + [distribute_tensor(x, mesh, [Shard(0)]) for x in leaves[1:]]
                    elif cut:
                        leaves = leaves[:1] + [own(x) for x in leaves[1:]]
                    hidden, lm_head, bias, embedding = leaves = [x.requires_grad_() for x in leaves]
                    options = dict(bias=bias, mask=mask, temperature=0.8, mask_index=mask_index, softcap=5.0)
                    options["group"] = group if cut and not dtensors else None
                    soft = linear_soft_embeddings(hidden, lm_head, embedding, **options)
                    grads = torch.autograd.grad((soft * upstream).sum(), leaves)
                    results.append((soft.detach(), *(x.full_tensor() if isinstance(x, DTensor) else x for x in grads)))
                for name, whole, got in zip(("soft", *names), *results, strict=True):
                    part = whole if dtensors or name in ("soft", "hidden") else own(whole)
                    assert_near(got, part, dtype, name, slack=8)
    mine = mask if dist.get_rank() else ~mask
    with pytest.raises(ValueError, match="mask: expected the same positions"):
        linear_soft_embeddings(hidden, lm_head, embedding, mask=mine)
    with pytest.raises(ValueError, match="mask_index: expected an id"):
        linear_soft_embeddings(hidden, lm_head, embedding, mask_index=13 if dist.get_rank() else 0)


def what_is_exchanged():
    """Of a row, as docs/sampling.md has it: never as many numbers as there are logits."""
    TILE_BYTES["cpu"] = 52 << 20
    counts, methods = [], {name: getattr(ranks.Shard, name) for name in ("gather", "sum")}
    z, xt = torch.randn(1, 64, 6000), torch.zeros(1, 64, dtype=torch.long)
    for name, method in methods.items():
        setattr(ranks.Shard, name, lambda self, x, f=method: counts.append(x.numel() / 64) or f(self, x))
    for expected, given in {
        2: dict(temperature=0),
        5: dict(temperature=0, return_stats=True),
        2 + 1024 + 3: dict(),
        2 + 4 * 256 + 1024 + 3: dict(top_k=50),
        5 + 2 * 4 * 256 + 1 + 1024 + 3: dict(top_k=50, top_p=0.9, return_stats=True),
    }.items():
        counts.clear()
        sample_tokens(own(z, 2), xt, mask_index=0, seed=0, group=dist.group.WORLD, **given)
        assert sum(n for n in counts if n >= 1) == expected  # less are those that compare the ranks' arguments
    for name, method in methods.items():
        setattr(ranks.Shard, name, method)
