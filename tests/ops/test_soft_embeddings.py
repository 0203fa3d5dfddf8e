"""Mean embeddings from hidden states against float64 softmax and product of whole logits, with chunks of a few rows."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, assert_near, linear_problem

import fastdiff.ops.chunks as op
from fastdiff import linear_soft_embeddings

LEAVES = ("hidden", "lm_head", "embedding", "bias")
SLACK = {torch.float64: 1, torch.float32: 4, torch.bfloat16: 4, torch.float16: 4}  # logits are rounded in their type


@pytest.fixture
def chunked(monkeypatch):
    monkeypatch.setitem(op.TILE_BYTES, "cpu", 3 * 27 * 12)
    monkeypatch.setattr(op.Chunks, "_sum_bytes", lambda self: 0)


def soft_problem(dtype=torch.float32, shape=(3, 5), num_states=27, width=6):
    p = linear_problem(shape, num_states, dtype)
    g = torch.Generator().manual_seed(5)
    embedding, upstream = (torch.randn(*size, width, generator=g).to(dtype) for size in ((num_states,), shape))
    return {k: p[k] for k in LEAVES if k != "embedding"} | dict(
        embedding=embedding, upstream=upstream, mask=p["weight"] < 0.7
    )


def by_hand(p, softcap, temperature, mask_index):
    z = F.linear(p["hidden"].double(), p["lm_head"].double(), p["bias"].double())
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    z = z if mask_index is None else z.index_fill(-1, torch.tensor(mask_index), -torch.inf)
    return ((torch.softmax(z, -1) @ p["embedding"].double()) * p["mask"].unsqueeze(-1)).to(p["embedding"].dtype)


def with_grads(call, p):
    leaves = [p[leaf].clone().requires_grad_() for leaf in LEAVES]
    soft = call(p | dict(zip(LEAVES, leaves, strict=True)))
    return soft.detach(), *torch.autograd.grad((soft * p["upstream"]).sum(), leaves)


def fused(p, **options):
    return linear_soft_embeddings(*(p[leaf] for leaf in LEAVES[:3]), bias=p["bias"], mask=p["mask"], **options)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_agrees_with_whole_logits(dtype, chunked):
    p = soft_problem(dtype)
    for softcap, temperature, mask_index in product((0.0, 2.0), (1.0, 0.7), (None, 3)):
        how = (softcap, temperature, mask_index)
        expected = with_grads(lambda q, how=how: by_hand(q, *how), p)
        options = dict(softcap=softcap, temperature=temperature)
        options |= dict(exclude_mask=False) if mask_index is None else dict(mask_index=mask_index)
        for more in (dict(), dict(capacity=15), dict(backend="reference")):
            got = with_grads(lambda q, given=options | more: fused(q, **given), p)
            for name, a, b in zip(("soft", *LEAVES), got, expected, strict=True):
                assert_near(a, b, dtype, name, SLACK[dtype])


def test_float16_at_both_ends():
    """A hundred thousand ids alike, and one alone."""
    hidden = torch.tensor([[0.0], [1.0]]).half()
    lm_head = torch.zeros(100_000, 1).half()
    lm_head[7] = 100.0
    embedding = torch.full((100_000, 2), 3.0).half()
    embedding[7] = -4.0
    soft = linear_soft_embeddings(hidden, lm_head, embedding)
    torch.testing.assert_close(soft, torch.tensor([[3.0, 3.0], [-4.0, -4.0]]).half(), rtol=2e-3, atol=0)


def test_gradcheck_and_tied_weights(chunked):
    p = soft_problem(torch.float64, (2, 3), 7)
    leaves = [p[leaf].requires_grad_() for leaf in LEAVES]
    assert torch.autograd.gradcheck(lambda *x: fused(p | dict(zip(LEAVES, x, strict=True))), leaves)
    hidden, lm_head = leaves[:2]
    assert torch.autograd.gradcheck(linear_soft_embeddings, (hidden, lm_head))


def test_only_rows_of_the_mask_are_multiplied_a_tile_at_a_time(chunked, monkeypatch):
    p = soft_problem()
    clean, seen, multiply = with_grads(fused, p), [], op.Chunks._product
    monkeypatch.setattr(op.Chunks, "_product", lambda self, z, *given: seen.append(len(z)) or multiply(self, z, *given))
    p["hidden"][~p["mask"]] = torch.nan
    torch.testing.assert_close(with_grads(fused, p), clean)
    assert max(seen) <= 3
    assert sum(seen) == 2 * p["mask"].sum()


def test_how_many_rows(chunked):
    p = soft_problem()
    got = with_grads(lambda q: fused(q, capacity=int(p["mask"].sum()) - 1), p)
    assert got[0].isnan().all()
    assert all(grad.isnan().any() for grad in got[1:])
    p["mask"] = torch.zeros_like(p["mask"])
    assert not any(x.any() for x in with_grads(fused, p))


def test_autocast_compile_and_opcheck(chunked):
    p = soft_problem()
    with torch.autocast("cpu", torch.bfloat16):
        got = with_grads(fused, p)
    low = with_grads(fused, {k: x.bfloat16() if x.is_floating_point() else x for k, x in p.items()})
    for a, b in zip(got, low, strict=True):
        assert a.dtype == torch.float32
        assert_near(a.bfloat16(), b, torch.bfloat16, "autocast", 2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: fused(q, capacity=15), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_grads(compiled, p), with_grads(fused, p))
    inputs = [p[leaf].requires_grad_() for leaf in ("hidden", "lm_head", "bias", "embedding")] + [p["mask"]]
    constants = (26, 0.0, -1, torch.float32, "", 27)
    torch.library.opcheck(torch.ops.fastdiff.linear_soft.cpu, (*inputs, *constants))
    saved = torch.ops.fastdiff.linear_soft.cpu(*inputs, *constants)
    inputs, saved = ([x.detach() for x in xs] for xs in (inputs, saved))
    backward = torch.ops.fastdiff.linear_soft_backward.cpu
    torch.library.opcheck(backward, (p["upstream"], *saved, *inputs, *constants, [True, True, False, True]))


def test_bad_input():
    hidden, lm_head = torch.zeros(2, 3, 4), torch.zeros(9, 4)
    for message, error, given in (
        (r"embedding: expected shape \[V=9, D'\], got \(8, 4\)", ValueError, dict(embedding=torch.zeros(8, 4))),
        ("embedding: expected torch.float32 as lm_head is", TypeError, dict(embedding=torch.zeros(9, 4).half())),
        ("mask: expected a bool tensor", TypeError, dict(mask=torch.zeros(2, 3))),
        ("mask: expected shape", ValueError, dict(mask=torch.ones(2, 4, dtype=torch.bool))),
        ("mask_index: expected an id", ValueError, dict(mask_index=9)),
        ("temperature: expected a finite number > 0", ValueError, dict(temperature=0)),
    ):
        with pytest.raises(error, match=message):
            linear_soft_embeddings(hidden, lm_head, **given)
    soft = linear_soft_embeddings(hidden.requires_grad_(), lm_head)
    (grad,) = torch.autograd.grad(soft.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not give double backward"):
        torch.autograd.grad(grad.sum(), hidden)
