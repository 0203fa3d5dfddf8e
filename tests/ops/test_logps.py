"""Log-probabilities of tokens and entropies, from logits and from hidden states: values, gradients, options."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, assert_near, linear_problem, problem

import fastdiff.ops.chunks as op
from fastdiff import linear_token_logps, token_logps

LEAVES = ("hidden", "lm_head", "bias")
SLACK = {torch.float64: 1, torch.float32: 4, torch.bfloat16: 4, torch.float16: 8}  # of a product's roundings


def usual(logits, x0, mask=None, temperature=1.0, excluded=None, softcap=0.0):
    """From logits in float64 as everybody writes it, 0 where a token is not scored."""
    z = logits.double()
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    z = z if excluded is None else z.index_fill(-1, torch.tensor(excluded), -torch.inf)
    log_p = torch.log_softmax(z, -1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    found = (log_p.gather(-1, x0[..., None])[..., 0], entropy)
    return found if mask is None else tuple(torch.where(mask, x, 0) for x in found)


def linear(x0, **options):
    """Both results as a function of hidden states, a last layer and its bias."""
    return lambda hidden, lm_head, bias: linear_token_logps(
        hidden, lm_head, x0, bias=bias, return_entropy=True, **options
    )


def with_grads(call, leaves):
    """Both results and the gradients for the leaves, with upstream gradients that differ from token to token."""
    logps, entropy = call(*leaves)
    upstream = torch.linspace(-1, 2, logps.numel(), dtype=logps.dtype).view(logps.shape)
    loss = (logps * upstream + entropy * upstream.flip(0) * 0.7).sum()
    return logps.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)


def assert_agrees(call, plain, leaves, dtype, slack=1):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    got, expected = with_grads(call, leaves), with_grads(plain, leaves)
    for name, a, b in zip(("log p", "entropy"), got, expected, strict=False):
        assert_near(a, b.to(exact), exact if slack == 1 else dtype, name, slack)
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert_near(a, b, dtype, "gradient", slack)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_of_logits(dtype, backend):
    for num_states in (2, 27, 507, 5003):
        p = problem((3, 5), num_states, dtype, spread=1.0 if dtype == torch.float16 else 3.0)
        mask, z = p["weight"] < 0.6, p["z"].requires_grad_()
        for exclude in (True, False):
            options = dict(x0=p["x0"], mask=mask)
            call = partial(token_logps, **options, return_entropy=True, exclude_mask=exclude, backend=backend)
            assert_agrees(call, partial(usual, **options, excluded=num_states - 1 if exclude else None), [z], dtype)


@pytest.mark.parametrize("chunk", [1, 10**9], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_of_hidden_states(dtype, backend, chunk, monkeypatch):
    monkeypatch.setitem(op.TILE_BYTES, "cpu", chunk)
    monkeypatch.setattr(op.Chunks, "_sum_bytes", lambda chunks: 0)
    for num_states, softcap, temperature in ((2, 0.0, 1.0), (507, 0.0, 0.7), (507, 2.0, 1.0), (27, 1.5, 2.0)):
        p = linear_problem((3, 5), num_states, dtype)
        mask, leaves = p["weight"] < 0.6, [p[leaf].requires_grad_() for leaf in LEAVES]
        options = dict(x0=p["x0"], mask=mask, temperature=temperature, softcap=softcap)

        def plain(hidden, lm_head, bias, options=options, excluded=num_states - 1):
            return usual(F.linear(hidden.double(), lm_head.double(), bias.double()), excluded=excluded, **options)

        assert_agrees(linear(**options, backend=backend), plain, leaves, dtype, SLACK[dtype])


def test_gradcheck():
    p, q = problem((2, 3), 6, torch.float64), linear_problem((2, 3), 6, torch.float64, width=3)
    options = dict(x0=p["x0"], mask=p["weight"] < 0.8, temperature=0.6, backend="cpu")
    call = partial(token_logps, return_entropy=True, **options)
    assert torch.autograd.gradcheck(call, p["z"].requires_grad_())
    assert torch.autograd.gradcheck(linear(softcap=2.0, **options), [q[leaf].requires_grad_() for leaf in LEAVES])


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_of_the_two_alone(wanted):
    p = problem((3, 5), 27)
    z = p["z"].requires_grad_()
    got = token_logps(z, p["x0"], return_entropy=True)
    expected = usual(z, p["x0"], excluded=26)[wanted].sum()
    torch.testing.assert_close(torch.autograd.grad(got[wanted].sum(), z), torch.autograd.grad(expected, z))
    assert torch.equal(token_logps(z, p["x0"]), got[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_without_doubt_and_ids_without_probability(dtype, backend):
    z = torch.full((2, 3, 9), -torch.inf, dtype=dtype)
    z[..., 4] = 1.0  # certain
    z[1, :, 6] = 1.0  # one of two
    z[1, 2] = 0.0
    z[1, 2, 4] = 60.0  # nearly certain
    x0 = torch.tensor([[4, 4, 5], [4, 6, 4]])
    z.requires_grad_()
    logps, entropy = token_logps(z, x0, return_entropy=True, exclude_mask=False, backend=backend)
    tiny = 8 * torch.tensor(-60.0, dtype=torch.float64).exp()
    half = torch.tensor(2.0, dtype=torch.float64).log()
    torch.testing.assert_close(entropy.double()[:, :2], torch.stack([torch.zeros(2), half.expand(2)]).double())
    torch.testing.assert_close(entropy[1, 2].double(), 61 * tiny, rtol=1e-2, atol=1e-17)
    (grad,) = torch.autograd.grad(entropy.sum(), z)
    assert grad.isfinite().all()
    assert (grad[0] == 0).all()
    torch.testing.assert_close(logps[0, :2], torch.zeros(2, dtype=dtype))
    assert logps[0, 2] == -torch.inf


def test_errors_are_at_most_twice_those_of_pytorch():
    """In float32, of every entry of the gradient; the spread makes some rows nearly certain."""
    ours = partial(token_logps, return_entropy=True, exclude_mask=False)
    for spread in (0.3, 1.0, 6.0):
        p = problem((4, 16), 5003, spread=spread)
        results = []
        for dtype, call in ((torch.float64, usual), (torch.float32, torch_in_float32), (torch.float32, ours)):
            leaf = p["z"].to(dtype).requires_grad_()
            results.append(with_grads(partial(call, x0=p["x0"]), [leaf]))
        for exact, plain, got in zip(*results, strict=True):
            error, plain_error = ((x.double() - exact).abs().max() for x in (got, plain))
            assert error <= 2 * plain_error


def torch_in_float32(z, x0):
    log_p = torch.log_softmax(z, -1)
    return log_p.gather(-1, x0[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def test_what_is_not_scored_is_not_read_and_gives_zero():
    p, q = problem((3, 5), 27), linear_problem((3, 5), 27)
    mask, x0 = p["weight"] < 0.5, p["x0"].clone()
    p["z"][~mask], q["hidden"][~mask] = torch.nan, torch.nan
    x0[~mask] = -100
    z, hidden = p["z"].requires_grad_(), q["hidden"].requires_grad_()
    for leaf, call in ((z, token_logps), (hidden, partial(linear_token_logps, lm_head=q["lm_head"]))):
        for given in (dict(x0=p["x0"], mask=mask), dict(x0=x0)):
            logps, entropy = call(leaf, return_entropy=True, **given)
            assert not torch.signbit(logps[~mask]).any()
            assert not entropy[~mask].any()
            (grad,) = torch.autograd.grad(logps.sum() + entropy.sum(), leaf)
            assert (grad[~mask] == 0).all()
            assert grad.isfinite().all()


def test_capacity():
    p = linear_problem((3, 5), 27)
    mask, leaves = p["weight"] < 0.5, [p[leaf].requires_grad_() for leaf in LEAVES]
    call = partial(linear, p["x0"], mask=mask)
    expected = with_grads(call(), leaves)
    for capacity in (int(mask.sum()), 15, 20):
        torch.testing.assert_close(with_grads(call(capacity=capacity), leaves), expected)
    for x in with_grads(call(capacity=2), leaves)[:3]:  # what is left out must not go unseen
        assert x.isnan().all()


def test_autocast():
    p = linear_problem((3, 5), 27)
    low = p | {leaf: p[leaf].bfloat16() for leaf in LEAVES}
    results = []
    for q, enabled in ((p, True), (low, False)):
        leaves = [q[leaf].requires_grad_() for leaf in LEAVES]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(with_grads(linear(q["x0"]), leaves))
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.to(b.dtype), b)


def test_compiles_whole():
    p, q = problem((3, 4), 11), linear_problem((3, 4), 11)
    calls = {
        token_logps: [p["z"].requires_grad_()],
        partial(linear_token_logps, capacity=12): [q[leaf].requires_grad_() for leaf in LEAVES[:2]],
    }
    for call, leaves in calls.items():
        call = partial(call, x0=p["x0"], temperature=0.7, return_entropy=True)
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(with_grads(compiled, leaves), with_grads(call, leaves))


def test_opcheck():
    p, q = problem((2, 3), 7), linear_problem((2, 3), 7)
    pull, upstream = torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 3)
    rows, constants = (
        [p["x0"], p["xt"], None, None, p["weight"], pull, None, None],
        ["dce", 6, True, -100, False, 0.0, "none"],
    )
    ops, z = torch.ops.fastdiff, p["z"]
    torch.library.opcheck(ops.row_loss.cpu, (z.clone().requires_grad_(), *rows, *constants, False, True))
    torch.library.opcheck(ops.row_loss_.cpu, (z.clone(), *rows[:-1], *constants[:-1], 7, True, False))
    inputs, head = [q[leaf] for leaf in LEAVES], [0.0, -1, torch.float32, "", 7]
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(ops.linear_loss.cpu, (*leaves, *rows, *constants, *head, [False] * 3, True))
    for grads in ((upstream, upstream), (None, upstream)):
        torch.library.opcheck(ops.row_loss_backward.cpu, (*grads, z, *rows, *constants))
        torch.library.opcheck(ops.linear_loss_backward.cpu, (*grads, *inputs, *rows, *constants, *head, [True] * 3))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("operator", ["row_loss", "linear_loss"])
def test_a_weight_of_the_entropy_is_one_in_the_loss(operator, reduction):
    """The operators' own argument, beside the weights of the losses, z-loss and all, and under upstream gradients."""
    p = problem((2, 3), 7, torch.float64)
    pull = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    z = p["z"].requires_grad_()
    given = [p["x0"], p["xt"], None, None, p["weight"], pull, None, None, "dce", 6, True, -100, False, 0.1, reduction]
    if operator == "row_loss":
        loss = torch.ops.fastdiff.row_loss.cpu(z, *given, reduction != "none", False)[0]
    else:
        wanted = [reduction != "none", False, False]
        loss = torch.ops.fastdiff.linear_loss.cpu(z, None, None, *given, 0.0, -1, z.dtype, "", 7, wanted, False)[0]
    kept, scored = z[..., :6], p["xt"] == 6
    log_p, lse = torch.log_softmax(kept, -1), torch.logsumexp(kept, -1)
    each = p["weight"] * (0.1 * lse**2 - log_p.gather(-1, p["x0"][..., None])[..., 0])
    each = torch.where(scored, each - pull * (log_p.exp() * log_p).sum(-1), 0)
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / scored.sum()}[reduction]
    torch.testing.assert_close(loss, expected)
    upstream = torch.linspace(1, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
    torch.testing.assert_close(*(torch.autograd.grad(x, z, upstream) for x in (loss, expected)))


def test_double_backward_is_an_error():
    p, q = problem((2, 3), 7), linear_problem((2, 3), 7)
    z, hidden = p["z"].requires_grad_(), q["hidden"].requires_grad_()
    for leaf, call in ((z, token_logps), (hidden, partial(linear_token_logps, lm_head=q["lm_head"]))):
        _, entropy = call(leaf, x0=p["x0"], return_entropy=True)
        (grad,) = torch.autograd.grad(entropy.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="does not give double backward"):
            torch.autograd.grad(grad.square().sum(), leaf)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperatures(temperature):
    p, q = problem((2, 3), 7), linear_problem((2, 3), 7)
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got"):
        token_logps(p["z"], p["x0"], temperature=temperature)
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got"):
        linear_token_logps(q["hidden"], q["lm_head"], q["x0"], temperature=temperature)


def test_bad_input_is_named():
    p = problem((2, 3), 7)
    for given, error, message in (
        (dict(logits=p["z"].long()), TypeError, "logits: expected float32"),
        (dict(x0=torch.full((2, 3), 7)), ValueError, "x0: expected ids in"),
        (dict(mask=torch.ones(2, 3)), TypeError, "mask: expected a bool tensor"),
    ):
        with pytest.raises(error, match=message):
            token_logps(**dict(logits=p["z"], x0=p["x0"], temperature=0.5) | given)
