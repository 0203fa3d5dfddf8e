"""Distillation from hidden states against the same through float64 logits, with chunks of a few rows."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, assert_near
from distill_cases import KINDS, linear_problem, loss_and_grads, loss_of

import fastdiff.ops.chunks as op
from fastdiff import distill_loss, linear_distill_loss

LEAVES = ("hidden", "lm_head", "bias")
SLACK = {torch.float64: 1, torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}  # logits are rounded in their type


@pytest.fixture
def chunked(monkeypatch):
    monkeypatch.setitem(op.TILE_BYTES, "cpu", 3 * 4 * 27)
    monkeypatch.setattr(op.Chunks, "_sum_bytes", lambda self: 0)


def assert_agrees(p, **options):
    got = loss_and_grads(p, *LEAVES, **options)
    expected = loss_and_grads(p, *LEAVES, **{**options, "backend": "reference", "capacity": None})
    dtype = p["hidden"].dtype
    assert_near(got[0].to(dtype), expected[0].to(dtype), dtype, "loss", SLACK[dtype])
    for name, a, b in zip(LEAVES, got[1:], expected[1:], strict=True):
        assert_near(a, b, dtype, name, SLACK[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(kind, dtype, chunked):
    for reduction, capacity in (("none", None), ("sum", 15), ("mean", None)):
        p = linear_problem(kind, (3, 5), 27, dtype)
        assert_agrees(p, reduction=reduction, capacity=capacity, temperature=1.4)


@pytest.mark.parametrize("kind", KINDS)
def test_softcaps(kind, chunked):
    for softcap, dtype in product((0.0, 2.0), (torch.float32, torch.bfloat16)):
        p = linear_problem(kind, (3, 5), 27, dtype)
        if not kind.endswith("ids"):
            p |= dict(teacher_softcap=1.5, teacher_bias=torch.linspace(-1, 1, 27, dtype=dtype))
        assert_agrees(p, reduction="sum", softcap=softcap)


@pytest.mark.parametrize("kind", ["forward", "reverse at ids"])
def test_gradcheck(kind, chunked):
    p = linear_problem(kind, (2, 3), 7, torch.float64, width=4)
    for reduction in ("none", "sum"):

        def call(*leaves, reduction=reduction):
            return loss_of(p | dict(zip(LEAVES, leaves, strict=True)), reduction=reduction)

        assert torch.autograd.gradcheck(call, [p[leaf].requires_grad_() for leaf in LEAVES])


def test_equals_the_loss_of_logits(chunked):
    p = linear_problem("forward", (3, 5), 27)
    logits, teacher = F.linear(p["hidden"], p["lm_head"], p["bias"]), F.linear(p["teacher"], p["teacher_lm_head"])
    options = {name: p[name] for name in ("mask", "weight")}
    expected = distill_loss(logits, teacher, reduction="mean", **options)
    torch.testing.assert_close(loss_of(p, reduction="mean"), expected)
    torch.testing.assert_close(loss_of(p, reduction="mean", num_items=30), expected * p["mask"].sum() / 30)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("kind", ["forward", "forward at ids"])
def test_only_scored_rows_are_multiplied_a_tile_at_a_time(kind, reduction, chunked, monkeypatch):
    p = linear_problem(kind, (3, 5), 27)
    clean, seen = loss_and_grads(p, *LEAVES, reduction=reduction), []
    product = op.Chunks._product
    monkeypatch.setattr(op.Chunks, "_product", lambda self, z, *given: seen.append(z) or product(self, z, *given))
    for name in ("hidden",) if kind.endswith("ids") else ("hidden", "teacher"):
        p[name][~p["mask"]] = torch.nan
    for capacity in (None, 13):
        got = loss_and_grads(p, *LEAVES, reduction=reduction, capacity=capacity)
        for a, b in zip(got, clean, strict=True):
            torch.testing.assert_close(a, b)
    assert all(len(z) <= 3 for z in seen)
    tiles = {z.untyped_storage().data_ptr() for z in seen}
    assert len(tiles) < len(seen) / 2


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_more_rows_than_capacity_are_seen(reduction, chunked):
    p = linear_problem("forward", (3, 5), 27)
    got = loss_and_grads(p, *LEAVES, reduction=reduction, capacity=int(p["mask"].sum()) - 1)
    assert got[0].isnan().all()
    assert all(grad.isnan().any() for grad in got[1:])


@pytest.mark.parametrize("share", ["none", "empty"])
def test_nothing_to_do(share):
    p = linear_problem("forward", (0, 5) if share == "empty" else (2, 5), 27)
    p["mask"] = torch.zeros_like(p["mask"])
    for reduction, capacity in product(("none", "sum", "mean"), (None, 4)):
        assert not any(t.any() for t in loss_and_grads(p, *LEAVES, reduction=reduction, capacity=capacity))


def test_autocast_multiplies_in_its_type(chunked):
    p = linear_problem("reverse", (3, 5), 27)
    low = {name: x.bfloat16() if torch.is_tensor(x) and x.dtype == torch.float32 else x for name, x in p.items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_grads(p, *LEAVES, reduction="sum")
    for a, b in zip(got, loss_and_grads(low, *LEAVES, reduction="sum"), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.to(b.dtype), b)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("kind", ["forward", "reverse at ids"])
def test_compiles_whole_and_runs_again(kind, reduction):
    p = linear_problem(kind, (3, 4), 11)
    leaves = [p[leaf].requires_grad_() for leaf in LEAVES]

    def step(*leaves):
        return loss_of(p | dict(zip(LEAVES, leaves, strict=True)), reduction=reduction, capacity=12).sum() * 3

    loss = step(*leaves)
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss * 2, leaves), expected, strict=True):
        torch.testing.assert_close(a, 2 * b)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_opcheck(reduction):
    p = linear_problem("forward", (2, 3), 7)
    inputs = [p[leaf].requires_grad_() for leaf in LEAVES]
    rows = [p["teacher_lm_head"], None, p["teacher"], None, p["mask"], p["weight"], None]
    constants = [False, 6, 0.5, reduction, 0.0, 0.0, -1, torch.float32]
    wanted = [reduction == "sum"] * 3
    torch.library.opcheck(torch.ops.fastdiff.linear_distill.cpu, (*inputs, *rows, *constants, wanted))
    upstream, inputs = torch.rand(() if reduction == "sum" else (2, 3)), [x.detach() for x in inputs]
    backward = torch.ops.fastdiff.linear_distill_backward.cpu
    torch.library.opcheck(backward, (upstream, *inputs, *rows, *constants, [True, True, False]))


IDS = torch.arange(2).expand(2, 3, 2)
BAD = {
    "no teacher's head": (dict(teacher_lm_head=None), ValueError, "teacher_lm_head: expected one of"),
    "a head and ids": (dict(teacher_ids=IDS), ValueError, "teacher_lm_head: expected one of"),
    "another vocabulary": (dict(teacher_lm_head=torch.zeros(8, 5)), ValueError, "teacher_lm_head: .* 9 ids, got 8"),
    "another width": (dict(teacher_lm_head=torch.zeros(9, 4)), ValueError, r"of the teacher, lm_head: .*\[V, D=5\]"),
    "other tokens": (dict(teacher=torch.zeros(2, 4, 5)), ValueError, r"teacher: expected shape \(2, 3\) and one more"),
    "no softcap": (dict(teacher_softcap=-1.0), ValueError, "of the teacher, softcap: expected a finite number >= 0"),
    "another type": (
        dict(teacher=torch.zeros(2, 3, 5).half(), teacher_lm_head=torch.zeros(9, 5).half()),
        TypeError,
        "teacher: expected torch.float32 as hidden is, got torch.float16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    wrong, error, message = BAD[case]
    given = dict(hidden=torch.zeros(2, 3, 4), lm_head=torch.zeros(9, 4), teacher=torch.zeros(2, 3, 5))
    given["teacher_lm_head"] = torch.zeros(9, 5)
    with pytest.raises(error, match=message):
        linear_distill_loss(**given | wrong)
