"""The linear losses against the reference: values, gradients, which rows are multiplied, precision."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import LOSSES, TOLERANCE, assert_near, linear_problem, loss_and_grads, loss_of
from torch.utils.checkpoint import checkpoint

import fastdiff.ops.chunks as op
from fastdiff import dce_loss, linear_dce_loss, scored_rows

LEAVES = ("hidden", "lm_head", "bias")
# Logits come rounded from a product of 16-bit numbers, as from nn.Linear: so do their gradients.
SLACK = {torch.float64: 1, torch.float32: 4, torch.bfloat16: 4, torch.float16: 8}


@pytest.fixture(params=[1, 10**9], ids=["many chunks", "one chunk"])
def chunked(request, monkeypatch):
    monkeypatch.setitem(op.TILE_BYTES, "cpu", request.param)
    monkeypatch.setattr(op.Chunks, "_sum_bytes", lambda chunks: 0)
    monkeypatch.setattr(op, "IDS", dict.fromkeys(op.IDS, 20))
    monkeypatch.setattr(op, "ROWS", 2)


def assert_agrees(name, p, leaves=LEAVES, **options):
    dtype = p["hidden"].dtype
    got = loss_and_grads(name, p, *leaves, backend="cpu", **options)
    expected = loss_and_grads(name, p, *leaves, backend="reference", **options)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert got[0].dtype == exact
    assert_near(got[0], expected[0], dtype, f"loss of {name}", SLACK[dtype])
    for leaf, a, b in zip(leaves, got[1:], expected[1:], strict=True):
        assert_near(a, b, dtype, f"{leaf} in {name}", SLACK[dtype])
    return got


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_the_reference(name, dtype, reduction, chunked):
    for num_states in (2, 27, 507):
        assert_agrees(name, linear_problem((3, 5), num_states, dtype), reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dce", "absorb", "uniform_logits"])
def test_softcap(name, dtype, chunked):
    for reduction in ("none", "sum"):
        assert_agrees(name, linear_problem((3, 5), 27, dtype), reduction=reduction, softcap=1.5)


def whole_numbers(p):
    """Hidden states and weights whose products are exact in every type. Many logits are alike."""
    return p | {leaf: (2 * p[leaf]).round().clamp(-2, 2) for leaf in LEAVES}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, dict(softcap=50.0), dict(capacity=15)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_statistics(dtype, reduction, options, backend, chunked):
    for num_states in (2, 27, 5003):
        p = whole_numbers(linear_problem((3, 5), num_states, dtype))
        z = F.linear(*(p[leaf].double() for leaf in LEAVES))
        z = 50 * torch.tanh(z / 50) if "softcap" in options else z
        z[..., -1] = -torch.inf
        p["x0"] = torch.where(p["weight"] < 0.5, z.argmax(-1), p["x0"])
        p["xt"] = torch.where(p["xt"] == num_states - 1, p["xt"], p["x0"])
        given = dict(reduction=reduction, backend=backend, **options)
        loss, stats = loss_of("dce_z", p, return_stats=True, **given)
        assert torch.equal(loss, loss_of("dce_z", p, **given))
        logsumexp, log_p = torch.logsumexp(z, -1), torch.log_softmax(z, -1)
        entropy, nll = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1), -log_p.gather(-1, p["x0"][..., None])
        for got, want in zip(stats, (logsumexp, entropy, z.argmax(-1) == p["x0"], nll.squeeze(-1)), strict=True):
            want = torch.where(p["xt"] == num_states - 1, want, 0)
            assert got.dtype in (torch.bool, torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_gradients_beside_statistics(dtype, reduction, chunked):
    p = linear_problem((3, 5), 507, dtype)
    leaves = [p[leaf].requires_grad_() for leaf in LEAVES]
    expected = torch.autograd.grad(loss_of("dce", p, reduction=reduction).sum(), leaves)
    loss, stats = loss_of("dce", p, reduction=reduction, return_stats=True)
    assert all(map(torch.equal, torch.autograd.grad(loss.sum(), leaves), expected))
    assert not any(x.requires_grad for x in stats)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_statistics_without_a_scored_row(backend):
    p = linear_problem((3, 5), 27)
    _, stats = loss_of("dce", p | dict(xt=p["x0"]), return_stats=True, backend=backend)
    assert all(x.shape == (3, 5) and not x.any() for x in stats)
    p = linear_problem((0, 5), 27)
    assert all(x.shape == (0, 5) for x in loss_of("dce", p, return_stats=True, backend=backend)[1])


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradients_only_of_what_wants_them(reduction):
    p = linear_problem((3, 5), 27)
    for leaf in LEAVES:
        assert_agrees("dce", p, (leaf,), reduction=reduction)
    assert_agrees("dce", linear_problem((3, 5), 27, bias=False), LEAVES[:2], reduction=reduction)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name, chunked):
    p = linear_problem((2, 3), 6, torch.float64, width=3)
    leaves = [p[leaf].requires_grad_() for leaf in LEAVES]
    for reduction in ("none", "sum"):

        def call(*leaves, reduction=reduction):
            return loss_of(name, p | dict(zip(LEAVES, leaves, strict=True)), reduction=reduction, backend="cpu")

        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("share", ["none", "one", "all"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("capacity", [None, 15])
def test_no_row_one_row_every_row(share, reduction, capacity, chunked):
    p = linear_problem((3, 5), 27)
    places = dict(none=[], one=[7], all=range(15))[share]
    p["xt"] = p["x0"].flatten().index_fill(0, torch.tensor([*places], dtype=torch.long), 26).view(3, 5)
    assert_agrees("dce", p, reduction=reduction, capacity=capacity)


@pytest.mark.parametrize("name", ["dce", "absorb", "uniform"])
def test_capacity(name, chunked):
    p = linear_problem((3, 5), 27)
    scored = 15 if name == "uniform" else int((p["xt"] == 26).sum())
    for reduction in ("none", "mean"):
        expected = loss_and_grads(name, p, *LEAVES, reduction=reduction)
        for capacity in (scored, scored + 1, 15, 20):
            got = loss_and_grads(name, p, *LEAVES, reduction=reduction, capacity=capacity)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)
        for capacity in (0, scored - 1):  # what is left out must not go unseen
            got = loss_and_grads(name, p, *LEAVES, reduction=reduction, capacity=capacity)
            assert got[0].isnan().all()
            assert got[1].isnan().all()
            assert all(grad.isnan().any() for grad in got[2:])
            if name == "dce":
                _, stats = loss_of(name, p, reduction=reduction, capacity=capacity, return_stats=True)
                assert all(stats[i].isnan().all() for i in (0, 1, 3))
                assert not stats.correct.any()


def test_the_list_of_scored_rows():
    scored = torch.tensor([[True, False, True], [False, False, True]])
    assert scored_rows(scored)[0].tolist() == [0, 2, 5]
    index, count = scored_rows(scored, 5)
    assert index.tolist() == [0, 2, 5, 6, 6]
    assert count == 3
    assert scored_rows(scored, 2)[0].tolist() == [0, 2]
    assert scored_rows(torch.zeros(0, 3, dtype=torch.bool), 2)[0].tolist() == [0, 0]
    with pytest.raises(TypeError, match="scored: expected a bool tensor"):
        scored_rows(scored.long())


def test_rows_that_are_not_scored_are_not_multiplied(monkeypatch):
    p = linear_problem((3, 5), 27)
    clean = loss_and_grads("dce", p, *LEAVES, reduction="sum")
    unscored = p["xt"] != 26
    p["hidden"][unscored] = torch.nan
    got = loss_and_grads("dce", p, *LEAVES, reduction="sum")
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
    assert (got[1][unscored] == 0).all()
    p["hidden"][~unscored] = torch.inf
    got = loss_and_grads("dce", p, *LEAVES, reduction="none")
    assert got[0][~unscored].isnan().all()
    assert (got[0][unscored] == 0).all()


def test_logits_fit_the_tile(monkeypatch):
    """The shapes of every chunk, seen where its rows become gradients."""
    seen = []
    row_losses_ = op.row_losses_
    monkeypatch.setattr(op, "row_losses_", lambda rows, *args: seen.append(rows.z) or row_losses_(rows, *args))
    monkeypatch.setitem(op.TILE_BYTES, "cpu", 27 * 4 * 4)
    p = linear_problem((3, 5), 27)
    p["mask_index"] = p["xt"] = None
    hidden, lm_head = p["hidden"].requires_grad_(), p["lm_head"]
    linear_dce_loss(hidden, lm_head, p["x0"], exclude_mask=False, reduction="sum")
    assert [tuple(z.shape) for z in seen] == [(4, 27)] * 3 + [(3, 27)]


@pytest.mark.parametrize(
    ("trains", "dtype", "chunks"), [(True, torch.bfloat16, 1), (False, torch.bfloat16, 4), (True, torch.float32, 4)]
)
def test_one_chunk_where_a_sum_over_chunks_would_take_more_memory(trains, dtype, chunks, monkeypatch):
    """15 rows of 27 logits are less than 27 x 16 float32 numbers, which 16-bit weights would need."""
    seen = []
    row_losses_ = op.row_losses_
    monkeypatch.setattr(op, "row_losses_", lambda rows, *args: seen.append(rows.z) or row_losses_(rows, *args))
    monkeypatch.setitem(op.TILE_BYTES, "cpu", 27 * 4 * dtype.itemsize)
    p = linear_problem((3, 5), 27, dtype)
    hidden, lm_head = p["hidden"].requires_grad_(), p["lm_head"].requires_grad_(trains)
    linear_dce_loss(hidden, lm_head, p["x0"], exclude_mask=False, reduction="sum")
    assert len(seen) == chunks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_gradients_are_summed_in_float32(dtype, monkeypatch):
    """256 chunks of equal rows. Summed in their own type the gradient would stop growing after a few."""
    monkeypatch.setitem(op.TILE_BYTES, "cpu", 1)
    hidden = torch.ones(256, 4, dtype=dtype)
    lm_head = torch.zeros(8, 4, dtype=dtype, requires_grad=True)
    linear_dce_loss(hidden, lm_head, torch.zeros(256, dtype=torch.long), exclude_mask=False, reduction="sum").backward()
    expected = torch.full((8, 4), 256 / 8, dtype=dtype)
    expected[0] -= 256
    assert torch.equal(lm_head.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_written_everywhere(dtype, chunked):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for reduction in ("none", "sum"):
            p = linear_problem((3, 5), 507, dtype)
            assert_agrees("dce", p, reduction=reduction)
            assert_agrees("dce", p | dict(xt=p["x0"]), reduction=reduction)  # nothing is scored
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_repeat_bit_for_bit(dtype):
    p = linear_problem((8, 64), 1031, dtype, width=48)
    first = loss_and_grads("dce", p, *LEAVES, reduction="sum")
    for _ in range(3):
        again = loss_and_grads("dce", p, *LEAVES, reduction="sum")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_view_of_hidden_states_and_more_dimensions():
    p = linear_problem((3, 5), 27)
    p["hidden"] = p["hidden"][:, :-1]  # each position predicts the next
    p |= {name: p[name][:, 1:] for name in ("x0", "xt", "weight")}
    assert_agrees("dce", p, reduction="sum")
    p = {k: v[None].expand(2, *v.shape) if torch.is_tensor(v) and k not in LEAVES[1:] else v for k, v in p.items()}
    assert_agrees("dce", p, reduction="none")


def test_autocast_multiplies_in_its_type_and_keeps_gradients_in_that_of_the_weights():
    p = linear_problem((3, 5), 27)
    low = p | {leaf: p[leaf].bfloat16() for leaf in LEAVES}
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_grads("dce", p, *LEAVES, reduction="sum")
        mixed = loss_and_grads("dce", p | dict(hidden=low["hidden"]), *LEAVES, reduction="sum")
    for a, b, c in zip(got, loss_and_grads("dce", low, *LEAVES, reduction="sum"), mixed, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.to(b.dtype), b)
        torch.testing.assert_close(c.to(b.dtype), b)


def test_upstream_gradients_and_backward_again():
    p = linear_problem((3, 5), 27)
    leaves = [p[leaf].requires_grad_() for leaf in LEAVES]
    for reduction in ("none", "sum"):
        loss = loss_of("dce", p, reduction=reduction).sum()
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        for factor in (2.0, 0.5):
            again = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
            for a, b in zip(again, once, strict=True):
                torch.testing.assert_close(a, factor * b)
        assert loss_of("dce", p, reduction=reduction).isfinite().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ["dce", "absorb_scaled", "uniform"])
def test_losses_that_are_summed(name, dtype, chunked, monkeypatch):
    """Losses per token whose sum's gradient the forward pass has made, and of others there is none."""
    p, calls, row_losses_ = linear_problem((3, 5), 27, dtype), [], op.row_losses_
    monkeypatch.setattr(op, "row_losses_", lambda *args: calls.append(args) or row_losses_(*args))
    leaves, count = [p[leaf].requires_grad_() for leaf in LEAVES], []
    for summed in (False, True):
        loss = loss_of(name, p, summed=summed)
        forward = len(calls)
        grads = torch.autograd.grad(loss.sum(-1).mean() * 0.7, leaves, retain_graph=True)
        count.append(len(calls) - forward)
        if not summed:
            expected = [loss, *grads]
    for got, exact in zip([loss, *grads], expected, strict=True):
        assert_near(got, exact, dtype, name, SLACK[dtype])
    assert count[0] > 0
    if dtype == torch.float16:  # a loss scale comes in before the gradient is rounded
        return
    assert count[1] == 0
    with pytest.raises(ValueError, match="summed: expected losses that weigh alike"):
        (loss[0].sum() + 2 * loss[1].sum()).backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    p = linear_problem((3, 5), 27)
    leaves = [p[leaf].requires_grad_() for leaf in LEAVES]

    def loss(hidden):
        return loss_of("dce", p | dict(hidden=hidden * 2), reduction="sum")

    plain = torch.autograd.grad(loss(leaves[0]), leaves)
    for leaf in leaves:
        leaf.grad = None
    checkpoint(loss, leaves[0], use_reentrant=use_reentrant).backward()
    for leaf, grad in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("capacity", [None, 12])
@pytest.mark.parametrize("reduction", ["none", "summed", "mean"])
def test_compiles_whole(reduction, capacity):
    p = linear_problem((3, 4), 11)
    leaves = [p[leaf].requires_grad_() for leaf in LEAVES]

    def step(hidden, lm_head, bias):
        q = p | dict(hidden=hidden * 2, lm_head=lm_head, bias=bias)
        options = dict(summed=True) if reduction == "summed" else dict(reduction=reduction)
        loss, stats = loss_of("dce", q, capacity=capacity, return_stats=True, **options)
        return loss.sum() * 3 + stats.nll.sum(), *stats

    torch._dynamo.reset()
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, *stats = run(*leaves)
        results.append([loss, *stats, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_opcheck(reduction):
    p = linear_problem((2, 3), 7)
    inputs = [p[leaf].requires_grad_() for leaf in LEAVES]
    rows = [p["x0"], p["xt"], None, None, p["weight"], None, None, None]
    constants = ["dce", p["mask_index"], True, -100, False, 1e-3, reduction, 0.0, -1, torch.float32, "", 7]
    for wanted in ([True] * 3, [True, False, True]) if reduction == "sum" else ([False] * 3,):
        for with_stats in (False, True):
            given = (*inputs, *rows, *constants, wanted, with_stats)
            torch.library.opcheck(torch.ops.fastdiff.linear_loss.cpu, given)
    inputs = [x.detach() for x in inputs]
    upstream = torch.rand(() if reduction == "sum" else (2, 3))
    backward = torch.ops.fastdiff.linear_loss_backward.cpu
    torch.library.opcheck(backward, (upstream, None, *inputs, *rows, *constants, [True, True, False]))
    row_loss_ = torch.ops.fastdiff.row_loss_.cpu
    for with_stats in (False, True):
        torch.library.opcheck(row_loss_, (torch.randn(2, 3, 7), *rows[:-1], *constants[:6], 7, True, with_stats))


def test_agrees_with_the_logits_multiplied_beforehand():
    p = linear_problem((3, 5), 507)
    logits = F.linear(p["hidden"], p["lm_head"], p["bias"])
    options = dict(xt=p["xt"], weight=p["weight"])
    expected = dce_loss(logits, p["x0"], **options)
    got = linear_dce_loss(p["hidden"], p["lm_head"], p["x0"], bias=p["bias"], **options)
    torch.testing.assert_close(got, expected)


def test_empty_batches():
    for shape, capacity in product(((0, 3), (2, 0)), (None, 0, 1, 8)):
        for reduction, summed in (("none", False), ("none", True), ("sum", False), ("mean", False)):
            p = linear_problem(shape, 11)
            got = loss_and_grads("absorb", p, *LEAVES, reduction=reduction, summed=summed, capacity=capacity)
            assert got[0].shape == (shape if reduction == "none" else ())
            assert not any(t.any() for t in got)
