"""The compiled row losses against the reference: values, gradients, shapes and layouts."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from cases import (
    LOSSES,
    TOLERANCE,
    assert_near,
    linear_problem,
    loss_and_grad,
    loss_of,
    problem,
)
from torch.utils.checkpoint import checkpoint

import fastdiff
from fastdiff import Geometric, d3pm_loss, dce_loss, dse_loss, loo_loss, mixture_loss, reference
from fastdiff.ops.row_loss import row_loss, scored_tokens


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_the_reference(name, dtype, reduction):
    for num_states in (2, 3, 27, 252, 507, 5003):
        p = problem((3, 5), num_states, dtype, spread=1.0 if dtype == torch.float16 else 3.0)
        loss, grad = loss_and_grad(name, p, reduction=reduction, backend="cpu")
        expected, expected_grad = loss_and_grad(name, p, reduction=reduction, backend="reference")
        assert_near(
            loss, expected, torch.float64 if dtype == torch.float64 else torch.float32, f"loss at V = {num_states}"
        )
        assert_near(grad, expected_grad, dtype, f"gradient at V = {num_states}")


@pytest.mark.parametrize("spread", [0.3, 1.0, 6.0])
def test_errors_are_at_most_twice_those_of_pytorch(spread):
    """Relative errors in float32, of the losses and of every entry of the gradient."""
    p = problem((4, 16), 5003, spread=spread)
    x0, scored, sigma = p["x0"], p["xt"] == p["mask_index"], p["sigma"][:, None]
    log_e1 = torch.log(torch.expm1(sigma))
    at_x0 = F.one_hot(x0, 5003).bool()

    def dce(z):
        return F.cross_entropy(z.flatten(0, 1), x0.flatten(), reduction="none").view(x0.shape)

    def absorb(z):
        d = z.gather(-1, x0[..., None]).squeeze(-1) + log_e1.to(z.dtype)
        others = z.masked_fill(at_x0, -torch.inf)[..., :-1].exp().sum(-1)
        return torch.where(scored, others + (torch.expm1(d) - d) / torch.expm1(sigma).to(z.dtype), 0)

    calls = {dce: lambda z: dce_loss(z, x0, exclude_mask=False), absorb: lambda z: dse_loss(z, sigma, p["xt"], x0)}
    for formula, ours in calls.items():
        results = []
        for call, dtype in ((formula, torch.float64), (formula, torch.float32), (ours, torch.float32)):
            z = p["z"].to(dtype).requires_grad_()
            loss = call(z)
            results.append((loss, torch.autograd.grad(loss.sum(), z)[0]))
        for exact, plain, got in zip(*results, strict=True):
            nonzero = exact.abs() > 1e-30
            error, plain_error = (((t.double() - exact) / exact)[nonzero].abs().max() for t in (got, plain))
            assert error <= 2 * plain_error


@pytest.mark.parametrize("num_states", [50257, 126464])
@pytest.mark.parametrize("name", LOSSES)
def test_large_vocabularies(name, num_states):
    p = problem((2, 3), num_states, mask_index=num_states - 128)
    for got, expected in zip(
        loss_and_grad(name, p, reduction="sum", backend="cpu"),
        loss_and_grad(name, p, reduction="sum", backend="reference"),
        strict=True,
    ):
        assert_near(got, expected, torch.float32, name)


@pytest.mark.parametrize("name", ["absorb", "absorb_scaled", "uniform"])
def test_float32_survives_small_and_large_sigma(name):
    for sigma in (1e-6, 1e-4, 1e-2, 1.0, 10.0, 90.0):
        p = problem((4, 8), 1000, spread=0.5)
        p["sigma"] = torch.full((4,), sigma, dtype=torch.float64)
        got, expected = (loss_of(name, p, backend=b) for b in ("cpu", "reference"))
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, expected, rtol=4e-5, atol=1e-34)  # exp_ is 0 below 2e-38, here 1000 times


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    p = problem((2, 3), 6, torch.float64)
    z = p.pop("z").requires_grad_()
    for reduction in ("none", "sum"):
        assert torch.autograd.gradcheck(
            lambda z, r=reduction: loss_of(name, {**p, "z": z}, reduction=r, backend="cpu"), z
        )


def rows_of(name, p, monkeypatch, **options):
    """What a loss gives the operator."""
    with monkeypatch.context() as patched:
        patched.setattr(fastdiff.losses.row_losses, "row_loss", lambda rows, *_: (rows, rows))
        return loss_of(name, p, **options)


FUNCTORS = [
    "dce_z",
    "absorb",
    "uniform",
    "uniform_logits",
    "csm_absorb",
    "csm_uniform",
    "loo",
    "d3pm_uniform",
    "mixture",
]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", FUNCTORS)
def test_opcheck(name, reduction, monkeypatch):
    z, *given = rows_of(name, problem((2, 3), 7), monkeypatch, reduction=reduction).arguments()
    z.requires_grad_()
    for with_grad in (False, True) if reduction == "mean" else (False,):
        for with_stats in (False, True) if name in ("dce_z", "loo") else (False,):
            torch.library.opcheck(torch.ops.fastdiff.row_loss.cpu, (z, *given, with_grad, with_stats))
    upstream = torch.rand(() if reduction == "mean" else (2, 3))
    torch.library.opcheck(torch.ops.fastdiff.row_loss_backward.cpu, (upstream, None, z.detach(), *given))
    torch.library.opcheck(torch.ops.fastdiff.scale_grad.default, (z.detach(), torch.tensor(2.0)))


@pytest.mark.parametrize("spread", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("name", FUNCTORS[4:])
def test_errors_are_at_most_twice_those_of_the_formula_in_float32(name, spread, monkeypatch):
    """Relative errors, as above, of the reference's formula in each type."""
    p = problem((4, 16), 5003, spread=spread)
    rows = rows_of(name, p, monkeypatch)
    functor, scored = fastdiff.ops.functors.FUNCTORS[rows.functor], scored_tokens(rows)
    if functor.of_scores:  # in the form that is near 0 where a score is right, everywhere
        monkeypatch.setattr(reference.scores, "_distance", lambda s, log_a: torch.exp(log_a) * torch.expm1(s - log_a))
    monkeypatch.setattr(torch.Tensor, "double", lambda t: t)
    results = []
    for dtype in (torch.float64, torch.float32):
        given = {k: None if t is None else t.to(dtype) for k, t in vars(rows).items() if k in ("z", "sigma", "extra")}
        given["z"].requires_grad_()
        prepared = given["z"] if functor.logits is None else functor.logits(dataclasses.replace(rows, **given))
        loss = functor.formula(dataclasses.replace(rows, **given | dict(z=prepared, mask=scored)))
        loss = torch.where(scored, rows.weight * loss, 0)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), given["z"])[0]))
    z = p["z"].requires_grad_()
    loss = loss_of(name, p, backend="cpu")
    results.append((loss.detach(), torch.autograd.grad(loss.sum(), z)[0]))
    for right, plain, got in zip(*results, strict=True):
        nonzero = right.abs() > 1e-30
        error, plain_error = (((t.to(right) - right) / right)[nonzero].abs().max() for t in (got, plain))
        assert error <= 2 * plain_error


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("dce", "none"),
        ("dce", "sum"),
        ("absorb", "sum"),
        ("uniform", "none"),
        ("csm_uniform", "sum"),
        ("loo", "none"),
        ("d3pm_uniform", "sum"),
        ("mixture", "none"),
    ],
)
def test_compiles_whole(name, reduction):
    p = problem((2, 3), 11)

    def step(z):
        return loss_of(name, {**p, "z": z * 2}, reduction=reduction).sum() * 3

    z = p["z"].requires_grad_()
    eager = torch.autograd.grad(step(z), z)[0]
    torch._dynamo.reset()
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(z), z)[0]
    torch.testing.assert_close(compiled, eager)


def test_compiles_with_inductor():
    p = problem((2, 3), 11)

    def step(z):
        return loss_of("dce", {**p, "z": z * 2}, reduction="mean")

    z = p["z"].requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)(z)
    torch.testing.assert_close(compiled, step(z))
    torch.testing.assert_close(torch.autograd.grad(compiled, z), torch.autograd.grad(step(z), z))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_backward_may_run_again(reduction):
    p = problem((2, 3), 11)
    z = p["z"].requires_grad_()
    loss = loss_of("absorb", p, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    once = z.grad.clone()
    for k in (2, 3, 4):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(z.grad, k * once)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_activation_checkpointing(reduction, reentrant):
    p = problem((2, 3), 11)
    z = p["z"].requires_grad_()
    (expected,) = torch.autograd.grad(loss_of("dce", p, reduction=reduction).sum(), z)
    loss = checkpoint(lambda z: loss_of("dce", {**p, "z": z}, reduction=reduction), z, use_reentrant=reentrant)
    loss.sum().backward()
    torch.testing.assert_close(z.grad, expected)


def test_scaled_losses():
    """Loss scaling and gradient accumulation: any upstream gradient."""
    p = problem((2, 3), 11)
    z = p["z"].requires_grad_()
    (plain,) = torch.autograd.grad(loss_of("dce", p, reduction="sum"), z)
    (scaled,) = torch.autograd.grad(loss_of("dce", p, reduction="sum") * 1024 / 8, z)
    torch.testing.assert_close(scaled, plain * 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (autocast,) = torch.autograd.grad(loss_of("dce", p, reduction="sum"), z)
    assert torch.equal(autocast, plain)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_does_not_depend_on_its_batch_and_runs_repeat(name):
    p = problem((8, 40), 300)
    loss, grad = loss_and_grad(name, p)
    again = loss_and_grad(name, p)
    assert torch.equal(loss, again[0])
    assert torch.equal(grad, again[1])
    part = {k: v[5:6] if isinstance(v, torch.Tensor) else v for k, v in p.items()}
    assert torch.equal(loss_of(name, part), loss[5:6])


def test_inputs_are_not_changed():
    p = problem((2, 3), 11)
    before = copy.deepcopy(p)
    for name in LOSSES:
        loss_and_grad(name, p, reduction="sum")
    assert all(torch.equal(p[k], before[k]) for k in p if k != "mask_index")


def test_unscored_rows_and_the_excluded_id_are_never_read():
    p = problem((4, 8), 60)
    unscored = p["xt"] != p["mask_index"]
    for name in ("dce", "absorb"):
        clean = loss_and_grad(name, p, reduction="sum")
        dirty = {**p, "z": p["z"].clone()}
        dirty["z"][unscored] = torch.nan
        dirty["z"][..., p["mask_index"]] = torch.nan
        got = loss_and_grad(name, dirty, reduction="sum")
        assert torch.equal(got[0], clean[0])
        assert torch.equal(got[1], clean[1])
        assert (got[1][unscored] == 0).all()
    clean = loss_and_grad("uniform", p)
    dirty = {**p, "z": p["z"].scatter(-1, p["moved"].unsqueeze(-1), torch.nan)}
    assert torch.equal(loss_and_grad("uniform", dirty)[1], clean[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_written_everywhere(dtype, monkeypatch):
    """The kernel gets an uninitialised buffer: with NaN in it beforehand none may be left."""
    p = problem((4, 8), 4099, dtype)
    clean = loss_and_grad("dce", p, reduction="sum")[1]
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for name in LOSSES:
            assert not loss_and_grad(name, p, reduction="sum")[1].isnan().any()
        assert torch.equal(loss_and_grad("dce", p, reduction="sum")[1], clean)
    finally:
        torch.use_deterministic_algorithms(False)


def test_reductions_weights_and_num_items():
    p = problem((3, 4), 9)
    tokens = loss_of("dce", p)
    scored = (p["xt"] == p["mask_index"]).sum()
    torch.testing.assert_close(loss_of("dce", p, reduction="sum"), tokens.sum())
    torch.testing.assert_close(loss_of("dce", p, reduction="mean"), tokens.sum() / scored)
    for num_items in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        torch.testing.assert_close(loss_of("dce", p, reduction="mean", num_items=num_items), tokens.sum() / 7)
    plain = dce_loss(p["z"], p["x0"], xt=p["xt"])
    square = problem((3, 3), 9)
    unweighted = dce_loss(square["z"], square["x0"])
    per_sequence = torch.tensor([1.0, 2.0, 3.0])
    for weight in (per_sequence, per_sequence[:, None], per_sequence.double()[:, None].expand(3, 3)):
        weighted = dce_loss(square["z"], square["x0"], weight=weight)
        torch.testing.assert_close(weighted, unweighted * per_sequence[:, None])
    torch.testing.assert_close(dce_loss(p["z"], p["x0"], xt=p["xt"], weight=2), plain * 2)


def test_none_and_all_masked_and_ignored():
    p = problem((2, 5), 9)
    assert dce_loss(p["z"], p["x0"], mask=torch.zeros(2, 5, dtype=torch.bool), reduction="mean") == 0
    everywhere = dce_loss(p["z"], p["x0"], mask=torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(everywhere, dce_loss(p["z"], p["x0"]))
    labels = p["x0"].clone()
    labels[0, :2] = -100
    ignoring = dce_loss(p["z"], labels)
    assert (ignoring[0, :2] == 0).all()
    torch.testing.assert_close(ignoring[1], everywhere[1])
    torch.testing.assert_close(dce_loss(p["z"], labels, reduction="mean"), ignoring.sum() / 8)


def test_identities_with_pytorch():
    """DCE over all v is cross_entropy; absorbing DSE of conditionals is DCE / expm1(sigma)."""
    p = problem((3, 4), 50)
    expected = F.cross_entropy(p["z"].flatten(0, 1), p["x0"].flatten(), reduction="none").view(3, 4)
    torch.testing.assert_close(dce_loss(p["z"], p["x0"], exclude_mask=False), expected)
    sigma = p["sigma"][:, None]
    dce = dce_loss(p["z"], p["x0"], xt=p["xt"], weight=1 / torch.expm1(sigma))
    dse = dse_loss(p["z"], sigma, p["xt"], p["x0"], parametrization="logits")
    log_probs = torch.log_softmax(p["z"][..., :-1], -1)
    log_score = F.pad(log_probs - torch.log(torch.expm1(sigma))[..., None].float(), (0, 1))
    torch.testing.assert_close(dse, dce)
    torch.testing.assert_close(dse_loss(log_score, sigma, p["xt"], p["x0"]), dce, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTORS[4:])
def test_options_that_a_loss_does_not_have_are_refused(name):
    for p in (problem((2, 3), 9), linear_problem((2, 3), 9)):
        for option in (dict(wieght=1.0), dict(penalty=1.0), dict(entropy_weight=1.0)):
            with pytest.raises(TypeError, match="unexpected keyword argument"):
                loss_of(name, p, **option)


def test_noise_levels_out_of_order_are_refused(monkeypatch):
    rows = rows_of("d3pm_uniform", problem((2, 3), 9), monkeypatch)
    rows.extra = rows.sigma.clone()
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=r"sigma_s: expected numbers in \[0, sigma\)"):
            row_loss(dataclasses.replace(rows), backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_d3pms_absorbing_loss_is_weighted_cross_entropy(backend):
    """For any schedule: the last step to the data is one, too, where noise is left at time 0."""
    p, noise = problem((4, 6), 9), Geometric(0.5, 5.0)
    step = torch.tensor([1, 2, 3, 4])
    alpha = torch.exp(-noise.total_noise(torch.arange(5, dtype=torch.float64) / 4))
    alpha[0] = 1
    weight = 4 * ((alpha[step - 1] - alpha[step]) / (1 - alpha[step]) + 0.1)
    got = d3pm_loss(
        p["z"], step, p["xt"], p["x0"], num_steps=4, schedule=noise, auxiliary=0.1, weight=2.0, backend=backend
    )
    torch.testing.assert_close(got, dce_loss(p["z"], p["x0"], xt=p["xt"], weight=2 * weight, backend=backend))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_leave_one_out_is_cross_entropy_of_raised_logits(backend):
    p = problem((3, 4), 50, torch.float64)
    sigma, mask = p["sigma"][:, None], p["xt"] != p["x0"]
    raised = p["z"] + F.one_hot(p["moved"], 50) * torch.log1p(50 / torch.expm1(sigma))[..., None]
    options = dict(mask=mask, weight=p["weight"], z_loss=0.1, return_stats=True, backend=backend)
    got, stats = loo_loss(p["z"], sigma, p["moved"], p["x0"], **options)
    expected, expected_stats = dce_loss(raised, p["x0"], exclude_mask=False, **options)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(stats, expected_stats)


def test_still_tokens_need_no_noise():
    p = problem((2, 3), 9)
    for backend in ("cpu", "reference"):
        loss = dse_loss(p["z"], 0.0, p["x0"], p["x0"], graph="uniform", backend=backend)
        expected = (p["z"].exp().sum(-1) - p["z"].exp().gather(-1, p["x0"][..., None])[..., 0]) / 9
        torch.testing.assert_close(loss, expected)
        nll = dce_loss(p["z"], p["x0"], backend="reference")
        loss = mixture_loss(p["z"], 0.0, 0.5, p["x0"], p["x0"], backend=backend)
        torch.testing.assert_close(loss, nll + nll.exp() - 1 - nll)


def test_mask_outside_the_vocabulary_when_it_is_not_excluded():
    z, x0 = torch.randn(2, 3, 9), torch.zeros(2, 3, dtype=torch.long)
    xt = torch.tensor([[9, 0, 9], [0, 0, 9]])
    got = dce_loss(z, x0, xt=xt, mask_index=9, exclude_mask=False)
    torch.testing.assert_close(got, dce_loss(z, x0, mask=xt == 9, exclude_mask=False))


def test_both_backends_are_here():
    assert all(r.available for r in fastdiff.backends.report() if r.name in ("cpu", "reference"))
