"""Distillation on the CPU: the compiled kernel and the reference against each other, PyTorch and closed forms."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, assert_near
from distill_cases import KINDS, loss_and_grads, loss_of, problem
from torch.utils.checkpoint import checkpoint

from fastdiff import distill_loss


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(kind, dtype, reduction):
    for num_states, temperature in product((27, 252, 5003), (1.0, 2.5)):
        p = problem(kind, (3, 5), num_states, dtype)
        got, expected = (
            loss_and_grads(p, "z", reduction=reduction, temperature=temperature, backend=b)
            for b in ("cpu", "reference")
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert_near(got[0], expected[0], wide, f"loss at V = {num_states}")
        assert_near(got[1], expected[1], dtype, f"gradient at V = {num_states}", slack=2)


def eager(z, p, kl):
    """PyTorch's own, without the mask."""
    log_q, log_p = F.log_softmax(z[..., :-1], -1), F.log_softmax(p["teacher"][..., :-1].to(z.dtype), -1)
    first, second = (log_q, log_p) if kl == "forward" else (log_p, log_q)
    return F.kl_div(first, second, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("apart", [1e-3, 0.1, None])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_errors_are_at_most_twice_those_of_pytorch(kl, apart):
    """In float32, of each loss and each row of the gradient; of rows that are close those of losses are far smaller."""
    p = problem(kl, (4, 16), 5003, apart=apart) | dict(mask=None, weight=None)
    results = []
    for call, dtype in ((eager, torch.float64), (eager, torch.float32), (None, torch.float32)):
        z = p["z"].to(dtype).requires_grad_()
        loss = loss_of(p | dict(z=z)) if call is None else call(z, p, kl)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), z)[0][..., :-1]))
    (exact, exact_grad), (plain, plain_grad), (ours, our_grad) = results
    error, plain_error = (((loss.double() - exact) / exact).abs().max() for loss in (ours, plain))
    assert error <= 2 * plain_error
    assert error < 1e-6
    if apart == 1e-3:
        assert error < 1e-2 * plain_error
    size = exact_grad.abs().amax(-1, keepdim=True)
    error, plain_error = (((grad.double() - exact_grad) / size).abs().max() for grad in (our_grad, plain_grad))
    assert error <= 2 * plain_error


@pytest.mark.parametrize("num_states", [50257, 126464])
@pytest.mark.parametrize("kind", KINDS)
def test_large_vocabularies(kind, num_states):
    p = problem(kind, (1, 3), num_states, many=64) | dict(mask_index=num_states - 128)
    for got, expected in zip(
        *(loss_and_grads(p, "z", reduction="sum", backend=b) for b in ("cpu", "reference")), strict=True
    ):
        assert_near(got, expected, torch.float32, kind)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, backend):
    p = problem(kind, (2, 3), 7, torch.float64, many=3)
    for reduction in ("none", "mean"):

        def call(z, reduction=reduction):
            return loss_of(p | dict(z=z), reduction=reduction, temperature=1.3, backend=backend)

        assert torch.autograd.gradcheck(call, p["z"].requires_grad_())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_two_outcomes(backend):
    """A coin: p log(p/q) + (1 - p) log((1 - p) / (1 - q)), and the derivative for its logit, q - p."""
    p, q = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64), torch.tensor([0.3, 0.2, 0.999], dtype=torch.float64)
    z, teacher = (torch.stack([x.logit(), torch.zeros(3)], -1).double() for x in (q, p))
    z.requires_grad_()
    options = dict(exclude_mask=False, backend=backend)
    for kl, a, b in (("forward", p, q), ("reverse", q, p)):
        loss = distill_loss(z, teacher, kl=kl, **options)
        torch.testing.assert_close(loss, a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())
        slope = q - p if kl == "forward" else q * (1 - q) * ((q / p).log() - ((1 - q) / (1 - p)).log())
        grad = torch.autograd.grad(loss.sum(), z)[0]
        torch.testing.assert_close(grad, torch.stack([slope, -slope], -1))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_teacher_that_knows_nothing(backend):
    """KL(uniform || q) is the mean of -log q less log N; KL(q || uniform) is log N less the entropy."""
    z = torch.randn(4, 9, dtype=torch.float64)
    log_q = z[:, :-1].log_softmax(-1)
    forward, reverse = (distill_loss(z, torch.zeros_like(z), kl=kl, backend=backend) for kl in ("forward", "reverse"))
    torch.testing.assert_close(forward, -log_q.mean(-1) - math.log(8))
    torch.testing.assert_close(reverse, (log_q.exp() * log_q).sum(-1) + math.log(8))


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_some_ids_are_a_coarser_view(kl, backend):
    """From k + 1 outcomes no more divergence than from all; the same if every id is one, or the others are alike."""
    p = problem(f"{kl} at ids", (6,), 12, torch.float64) | dict(mask=None, weight=None)
    teacher = torch.randn(6, 12, dtype=torch.float64)
    whole = distill_loss(p["z"], teacher, kl=kl, backend=backend)
    log_p, last = teacher[:, :11].log_softmax(-1), None
    for many in (1, 4, 9, 11):
        ids = torch.stack([torch.randperm(11)[:many] for _ in range(6)]) if last is None else last
        given = dict(kl=kl, backend=backend)
        loss = distill_loss(p["z"], log_p.gather(-1, ids), teacher_ids=ids, **given)
        assert (loss <= whole + 1e-12).all()
    torch.testing.assert_close(loss, whole)
    z, ids = p["z"].clone(), p["teacher_ids"]
    rest = torch.ones_like(z).scatter(-1, ids, 0).bool()
    rest[:, -1] = False
    z[rest] = 0.7
    log_p = torch.full_like(z, -1.2).scatter(-1, ids, torch.randn(ids.shape, dtype=z.dtype))[:, :-1].log_softmax(-1)
    whole = distill_loss(z, F.pad(log_p, (0, 1)), **given)
    torch.testing.assert_close(distill_loss(z, log_p.gather(-1, ids), teacher_ids=ids, **given), whole)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_numbers_that_are_not_finite(dtype, backend):
    z, teacher = torch.randn(7, 40).to(dtype), torch.randn(7, 40).to(dtype)
    z[0, 3], teacher[1, 3] = -torch.inf, -torch.inf
    z[2, 3] = teacher[2, 3] = -torch.inf
    z[3, 3], teacher[4, 3] = torch.inf, torch.nan
    z[5], teacher[6] = -torch.inf, -torch.inf
    z.requires_grad_()
    for kl in ("forward", "reverse"):
        loss = distill_loss(z, teacher, kl=kl, exclude_mask=False, backend=backend)
        infinite, finite = (0, [1, 2]) if kl == "forward" else (1, [0, 2])
        assert loss[infinite] == torch.inf
        assert loss[3:].isnan().all()
        log_q, log_p = (x.double().log_softmax(-1) for x in (z, teacher))
        first, second = (log_p, log_q) if kl == "forward" else (log_q, log_p)
        terms = torch.where(first == -torch.inf, 0, first.exp() * (first - second))
        torch.testing.assert_close(loss[finite].double(), terms[finite].sum(-1), rtol=1e-5, atol=0)
        grad = torch.autograd.grad(loss[finite].sum(), z)[0]
        assert grad[finite].isfinite().all()
        assert grad[2, 3] == 0
    ids = torch.tensor([[0, 3]]).expand(7, 2)
    log_p = torch.tensor([[-1.0, -2.0]]).expand(7, 2)
    loss = distill_loss(z, log_p, teacher_ids=ids, exclude_mask=False, backend=backend)
    assert loss[[0, 2]].isposinf().all()
    assert loss[[3, 5]].isnan().all()
    assert loss[[1, 4, 6]].isfinite().all()


def test_probabilities_far_below_the_range_of_float32():
    """Where the teacher has exp(-200) of the probability, the student's counts all the same."""
    z, teacher = torch.zeros(1, 30), torch.zeros(1, 30)
    teacher[0, 3], z[0, 3] = -200, 5
    z.requires_grad_()
    for kl in ("forward", "reverse"):
        got, exact = (distill_loss(x, teacher.to(x.dtype), kl=kl, exclude_mask=False) for x in (z, z.double()))
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), z)[0] for x in (got, exact)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(kind, reduction):
    p = problem(kind, (2, 3), 9)
    ids = p["teacher_ids"].sort(-1).values if "teacher_ids" in p else None
    rows = [p["teacher"].double() if ids is not None else p["teacher"], ids, p["mask"], p["weight"], None]
    constants = [kind.startswith("reverse"), 8, 0.5, reduction]
    z = p["z"].requires_grad_()
    for with_grad in (False, True) if reduction == "mean" else (False,):
        torch.library.opcheck(torch.ops.fastdiff.row_distill.cpu, (z, *rows, *constants, with_grad))
    upstream, z = torch.rand(() if reduction == "mean" else (2, 3)), z.detach()
    torch.library.opcheck(torch.ops.fastdiff.row_distill_backward.cpu, (upstream, z, *rows, *constants))
    torch.library.opcheck(torch.ops.fastdiff.row_distill_.cpu, (z.clone(), *rows[:-1], *constants[:-1], True))


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("kind", ["forward", "reverse at ids"])
def test_compiles_whole_and_checkpoints(kind, reduction):
    p = problem(kind, (2, 3), 11)

    def step(z):
        return loss_of(p | dict(z=z * 2), reduction=reduction).sum() * 3

    z = p["z"].requires_grad_()
    (expected,) = torch.autograd.grad(step(z), z)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z)[0], expected)
    for reentrant in (True, False):
        z.grad = None
        checkpoint(step, z, use_reentrant=reentrant).backward()
        torch.testing.assert_close(z.grad, expected)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_backward_may_run_again_but_not_be_differentiated(reduction):
    p = problem("forward", (2, 3), 11)
    z = p["z"].requires_grad_()
    loss = loss_of(p, reduction=reduction).sum()
    once, again = (torch.autograd.grad(loss * factor, z, retain_graph=True)[0] for factor in (1, 0.5))
    torch.testing.assert_close(again, 0.5 * once)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_stand_alone(kind, dtype):
    """The same bits in any batch; nothing unscored or excluded counts, and all of the gradient is written."""
    p = problem(kind, (8, 6), 2051, dtype)
    loss, grad = loss_and_grads(p, "z")
    part = {name: x[5:6] if torch.is_tensor(x) else x for name, x in p.items()}
    assert torch.equal(loss_of(part), loss[5:6])
    dirty = p | dict(z=p["z"].clone())
    dirty["z"][~p["mask"]] = torch.nan
    dirty["z"][..., -1] = torch.nan
    if not kind.endswith("ids"):
        dirty["teacher"] = p["teacher"].clone()
        dirty["teacher"][~p["mask"]] = torch.nan
        dirty["teacher"][..., -1] = torch.nan
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for reduction in ("none", "sum"):
            got = loss_and_grads(dirty, "z", reduction=reduction)
            assert not got[1].isnan().any()
            assert (got[1][~p["mask"]] == 0).all()
            if reduction == "none":
                assert torch.equal(got[0], loss)
                assert torch.equal(got[1], grad)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_as_they_lie(kind):
    p = problem(kind, (2, 3), 300) | dict(mask=None)
    expected = loss_and_grads(p, "z")
    for name in ("z",) if kind.endswith("ids") else ("z", "teacher"):
        x = p[name]
        for place in (
            torch.cat([x, x], -1)[..., :300],
            torch.stack([x, x], -1)[..., 0],
            x.transpose(0, 1).contiguous().transpose(0, 1),
        ):
            got = loss_and_grads(p | {name: place}, "z")
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
    shared = loss_of(p | dict(z=p["z"][:1].expand(2, 3, 300)))
    assert torch.equal(shared[0], expected[0][0])


def test_what_is_scored_and_how_it_is_summed():
    p = problem("forward", (3, 4), 9)
    tokens = loss_of(p)
    assert (tokens[~p["mask"]] == 0).all()
    everywhere = loss_of(p | dict(mask=None))
    torch.testing.assert_close(tokens, everywhere * p["mask"])
    xt = torch.where(p["mask"], 8, 0)
    torch.testing.assert_close(loss_of(p | dict(mask=None, xt=xt)), tokens)
    torch.testing.assert_close(loss_of(p, reduction="sum"), tokens.sum())
    torch.testing.assert_close(loss_of(p, reduction="mean"), tokens.sum() / p["mask"].sum())
    torch.testing.assert_close(loss_of(p, reduction="mean", num_items=7), tokens.sum() / 7)
    torch.testing.assert_close(loss_of(p | dict(weight=2)), 2 * loss_of(p | dict(weight=None)))
    assert loss_of(p | dict(mask=torch.zeros(3, 4, dtype=torch.bool)), reduction="mean") == 0
    for shape in ((0, 3), (2, 0)):
        assert loss_and_grads(problem("reverse at ids", shape, 9), "z")[0].shape == shape


def test_temperature_and_the_order_of_ids():
    p = problem("reverse", (3, 4), 9, torch.float64)
    divided = p | dict(z=p["z"] / 1.7, teacher=p["teacher"] / 1.7)
    torch.testing.assert_close(loss_of(p, temperature=1.7), loss_of(divided))
    p = problem("forward at ids", (3, 4), 30)
    turned = p | {name: p[name].flip(-1) for name in ("teacher", "teacher_ids")}
    assert torch.equal(loss_of(p), loss_of(turned))


def test_the_teacher_gets_no_gradient():
    p = problem("forward", (3, 4), 9)
    teacher, z = p["teacher"].requires_grad_(), p["z"].requires_grad_()
    loss_of(p, reduction="sum").backward()
    assert teacher.grad is None
    assert z.grad is not None
    assert not loss_of(p | dict(z=z.detach())).requires_grad


def test_a_sum_above_one_by_rounding():
    """Log-probabilities in bfloat16 of all ids: their sum is divided out."""
    torch.manual_seed(0)
    z, ids = torch.randn(4, 9), torch.arange(8).expand(4, 8)
    log_p = torch.randn(4, 8).log_softmax(-1).bfloat16()
    assert (log_p.double().exp().sum(-1) > 1).any()
    loss = distill_loss(z, log_p, teacher_ids=ids)
    above = log_p.double().exp().sum(-1) > 1
    expected = distill_loss(z.double(), F.pad(log_p.double(), (0, 1)))
    torch.testing.assert_close(loss[above].double(), expected[above])


TEN = torch.arange(10).expand(2, 3, 10)
BAD = {
    "another vocabulary": (
        dict(teacher=torch.zeros(2, 3, 8)),
        ValueError,
        "teacher: expected the student's 9 ids, got 8",
    ),
    "another type": (dict(teacher=torch.zeros(2, 3, 9).half()), TypeError, "teacher: expected torch.float32"),
    "another shape": (dict(teacher=torch.zeros(2, 4, 9)), ValueError, r"teacher: expected shape \(2, 3\) and one more"),
    "another device": (dict(teacher=torch.zeros(2, 3, 9, device="meta")), ValueError, "teacher: .* on cpu"),
    "no teacher": (dict(teacher=None), TypeError, "teacher: expected a torch.Tensor"),
    "integers": (dict(logits=torch.zeros(2, 3, 9).long()), TypeError, "logits: expected float32"),
    "another divergence": (dict(kl="both"), ValueError, "kl: expected one of 'forward', 'reverse'"),
    "no temperature": (dict(temperature=0.0), ValueError, "temperature: expected a finite number > 0"),
    "mask and xt": (dict(mask=TEN[..., 0] > 0, xt=TEN[..., 0]), ValueError, "mask: expected one of xt and mask"),
    "a mask of numbers": (dict(mask=TEN[..., 0]), TypeError, "mask: expected a bool tensor"),
    "num_items of a sum": (dict(num_items=3, reduction="sum"), ValueError, "num_items: needs reduction='mean'"),
    "another reduction": (dict(reduction="max"), ValueError, "reduction: expected one of"),
    "a mask id beyond": (dict(mask_index=9), ValueError, r"mask_index: expected an id in \[-9, 9\)"),
    "ids of another shape": (dict(teacher_ids=TEN), ValueError, r"teacher_ids: expected shape \(2, 3, 2\)"),
    "an id beyond": (dict(teacher_ids=TEN[..., 8:] + 1), ValueError, r"teacher_ids: .*\[0, 9\), got 9 at \[0, 0, 0\]"),
    "an id below": (dict(teacher_ids=TEN[..., :2] - 1), ValueError, r"teacher_ids: .*\[0, 9\), got -1"),
    "the mask": (dict(teacher_ids=TEN[..., 7:9]), ValueError, "teacher_ids: expected ids other than the mask, got 8"),
    "an id twice": (dict(teacher_ids=TEN[..., :2] * 0), ValueError, "teacher_ids: expected ids that differ"),
    "too much": (
        dict(teacher_ids=TEN[..., :2], teacher=torch.zeros(2, 3, 2)),
        ValueError,
        "teacher: .* at most 1, got 2",
    ),
    "no probabilities": (
        dict(teacher_ids=TEN[..., :2], teacher=torch.full((2, 3, 2), torch.nan)),
        ValueError,
        "at most 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    wrong, error, message = BAD[case]
    given = dict(logits=torch.zeros(2, 3, 9), teacher=torch.zeros(2, 3, 9))
    if "teacher_ids" in wrong:
        given["teacher"] = torch.full((2, 3, 2), -1.0)
    with pytest.raises(error, match=message):
        distill_loss(**given | wrong)


def test_ids_are_looked_at_only_where_a_token_is_scored():
    ids, log_p = torch.tensor([[1, 2], [9, 9]]), torch.tensor([[-1.0, -1.0], [0.0, 0.0]])
    loss = distill_loss(torch.zeros(2, 9), log_p, teacher_ids=ids, mask=torch.tensor([True, False]))
    assert loss[0] > 0
    assert loss[1] == 0


def test_an_operator_called_by_itself_writes_nowhere_else():
    z, log_p = torch.zeros(1, 9), torch.full((1, 2), -1.0, dtype=torch.float64)
    for ids in ([3, 3], [4, 3], [-1, 3], [3, 9], [3, 8]):
        given = (z, log_p, torch.tensor([ids]), None, None, None, False, 8, 1.0, "sum", True)
        with pytest.raises(ValueError, match="teacher_ids: expected rising ids"):
            torch.ops.fastdiff.row_distill.cpu(*given)
