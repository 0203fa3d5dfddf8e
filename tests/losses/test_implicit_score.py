"""Implicit score entropy, against its sum over all neighbours and the denoising one, by enumeration."""

import math

import pytest
import torch
from laws import strings
from oracles import mixture

from fastdiff import Absorbing, Uniform, dse_loss, implicit_score_entropy, reference

V, L, SIGMA = 4, 3, 0.7
STATES = strings(V, L)
POWERS = V ** torch.arange(L - 1, -1, -1)
GRAPHS = [("absorb", 1), ("uniform", None)]
PARAMETRIZATIONS = ["log_score", "scale_by_sigma", "logits"]
each_kind = pytest.mark.parametrize(
    ("graph", "mask", "parametrization"), [(*g, p) for g in GRAPHS for p in PARAMETRIZATIONS]
)


def table(seed, dtype=torch.float64):
    """What a model says of every string: [V^L, L, V]."""
    return torch.randn(len(STATES), L, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def log_scores(z, mask, parametrization):
    """log s(x)_y of a table, by the formulas of the reference."""
    sigma = torch.full(z.shape[:2], SIGMA, dtype=torch.float64)
    if parametrization == "log_score":
        return z
    if parametrization == "scale_by_sigma":
        return reference.scale_by_sigma(z, sigma, STATES)
    if mask is not None:
        return reference.log_score_from_logits(z, sigma, mask)
    p_t = torch.log1p(V / torch.expm1(sigma).unsqueeze(2) * z.softmax(2))
    return p_t - p_t.gather(2, STATES.unsqueeze(2))


def whole(z, mask, parametrization):
    """The sums over all neighbours, of every string: [V^L]."""
    s, sums = log_scores(z, mask, parametrization), []
    for n, x in enumerate(STATES.tolist()):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(L):
            for y in set(range(V)) - {x[i]}:
                into, out = (1 / V, 1 / V) if mask is None else (float(x[i] == mask), float(y == mask))
                near = n + (y - x[i]) * int(POWERS[i])
                total = total + into * s[n, i, y].exp() - (out * s[near, i, x[i]] if out else 0)
        sums.append(total)
    return torch.stack(sums)


def model_of(z):
    return lambda xt, sigma: z[xt @ POWERS]


@each_kind
def test_unbiased_in_value_and_gradient(graph, mask, parametrization):
    z, direction, repeats = table(0), table(1), 20000
    xt = torch.tensor([2, mask or 0, 3])
    theta = torch.zeros(repeats, dtype=torch.float64, requires_grad=True)

    def moved(xt, sigma):
        at = xt @ POWERS
        return z[at] + theta[:, None, None] * direction[at]

    loss = implicit_score_entropy(
        moved, xt.expand(repeats, -1), SIGMA, graph=graph, mask_index=mask, parametrization=parametrization, seed=3
    )
    loss.sum().backward()
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    exact = whole(z + step * direction, mask, parametrization)[xt @ POWERS]
    exact.backward()
    for values, truth in ((loss.detach(), exact.item()), (theta.grad, step.grad.item())):
        assert abs(values.mean().item() - truth) < 4 * values.std().item() / math.sqrt(repeats)
        assert values.std() > 0


@pytest.mark.parametrize(("graph", "mask"), GRAPHS)
def test_is_denoising_score_entropy_up_to_a_number(graph, mask):
    """In the mean over clean and noised strings, whatever the model."""
    noise = Absorbing(V, mask) if graph == "absorb" else Uniform(V)
    p0 = torch.exp(-mixture(L, V - 1, mask_index=1).nll(STATES)).where((STATES != 1).all(1), 0)
    law = noise.transition(STATES, torch.tensor(SIGMA, dtype=torch.float64))  # [x0, i, .]
    joint = p0.unsqueeze(1) * torch.stack([law[:, i, STATES[:, i]] for i in range(L)]).prod(0)  # [x0, x_t]
    assert joint.sum().item() == pytest.approx(1)
    clean, noised = joint.nonzero().unbind(1)
    differences = []
    for seed in range(3):
        s = log_scores(table(seed), mask, "log_score")
        denoising = dse_loss(
            s[noised], SIGMA, STATES[noised], STATES[clean], graph=graph, mask_index=-1 if mask is None else mask
        ).sum(1)
        implicit = joint.sum(0) @ whole(table(seed), mask, "log_score")
        differences.append((joint[clean, noised] @ denoising - implicit).item())
    assert differences == pytest.approx([differences[0]] * 3, rel=1e-10)


@each_kind
def test_where_there_is_one_neighbour_it_is_the_sum(graph, mask, parametrization):
    """Value and gradient, then, are exact: one token that is no mask, or two states and one position."""
    if mask is None:
        z, xt = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True), torch.tensor([[0], [1]])
        sigma = torch.full((2, 1), SIGMA, dtype=torch.float64)
        s = z if parametrization == "log_score" else z - reference.sigma_shift(sigma, 2).unsqueeze(2)
        if parametrization == "logits":
            s = torch.log1p(2 / math.expm1(SIGMA) * z.softmax(2))
            s = s - s.gather(2, xt.unsqueeze(2))
        exact = torch.stack([(s[0, 0, 1].exp() - s[1, 0, 0]) / 2, (s[1, 0, 0].exp() - s[0, 0, 1]) / 2])
    else:
        z = table(4).requires_grad_()
        xt = torch.tensor([[mask, 3, mask], [mask, mask, mask]])
        exact = whole(z, mask, parametrization)[xt @ POWERS]

    def ask(tokens, sigma):
        return z[tokens @ POWERS] if mask is not None else z[tokens[:, 0]]

    got = implicit_score_entropy(ask, xt, SIGMA, graph=graph, mask_index=mask, parametrization=parametrization)
    torch.testing.assert_close(got, exact)
    up = torch.tensor([0.7, -1.3], dtype=torch.float64)
    mine, theirs = (torch.autograd.grad(loss, z, up, retain_graph=True)[0] for loss in (got, exact))
    torch.testing.assert_close(mine, theirs)


@each_kind
def test_names_types_and_reductions(graph, mask, parametrization):
    z, xt = table(2, torch.float32), STATES[::5]
    kind = dict(graph=graph, mask_index=mask, parametrization=parametrization, seed=1)
    sigma, dsigma = torch.linspace(0.2, 2, len(xt)), torch.linspace(1, 3, len(xt))
    options = kind | dict(dsigma=dsigma)
    loss = implicit_score_entropy(model_of(z), xt, sigma, **options)
    assert loss.shape == (len(xt),)
    assert loss.dtype == torch.float32
    plain = implicit_score_entropy(model_of(z), xt, sigma, **kind)
    torch.testing.assert_close(loss, plain * dsigma)
    part = implicit_score_entropy(
        model_of(z), xt[3:5], sigma[3:5], **options | dict(dsigma=dsigma[3:5]), sample_ids=torch.tensor([3, 4])
    )
    torch.testing.assert_close(part, loss[3:5])
    total = implicit_score_entropy(model_of(z), xt, sigma, reduction="sum", **options)
    mean = implicit_score_entropy(model_of(z), xt, sigma, reduction="mean", **options)
    torch.testing.assert_close(total, loss.sum())
    torch.testing.assert_close(mean, loss.sum() / xt.numel())
    double = implicit_score_entropy(model_of(z.double()), xt, sigma, backend="reference", **options)
    torch.testing.assert_close(loss.double(), double, rtol=1e-4, atol=1e-5)
    seen = []
    implicit_score_entropy(lambda x, s: seen.append((x, s)) or z[x @ POWERS], xt, sigma, **options)
    assert len(seen) == (1 if (graph, parametrization) == ("absorb", "logits") else 2)
    for x, s in seen:
        assert ((x != xt).sum(1) <= 1).all()
        assert torch.equal(s, sigma)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(graph="cosine"), ValueError, "graph: expected one of"),
        (dict(graph="uniform"), ValueError, "mask_index: expected an id"),
        (dict(mask_index=None), ValueError, "mask_index: expected an id"),
        (dict(mask_index=-1), ValueError, "mask_index: expected at least 0"),
        (dict(parametrization="score"), ValueError, "parametrization: expected"),
        (dict(reduction="max"), ValueError, "reduction: expected"),
        (dict(sigma=0.0), ValueError, "sigma: expected finite numbers > 0"),
        (dict(sigma=torch.rand(3)), ValueError, "sigma: expected a number or a shape"),
        (dict(xt=torch.zeros(2).long()), ValueError, r"xt: expected shape \[B, L\]"),
        (dict(xt=torch.full((2, L), V)), ValueError, r"xt: expected ids in \[0, 4\)"),
        (dict(sample_ids=torch.zeros(3).long()), ValueError, "sample_ids: expected shape"),
        (dict(model=lambda xt, sigma: torch.zeros(2, L)), ValueError, "model: expected"),
        (dict(model=lambda xt, sigma: [1]), TypeError, "model: expected a torch.Tensor"),
    ],
)
def test_bad_input(options, error, message):
    arguments = dict(model=lambda xt, sigma: torch.zeros(*xt.shape, V), xt=torch.zeros(2, L).long(), sigma=1.0)
    arguments |= dict(graph="absorb", mask_index=3) | options
    with pytest.raises(error, match=message):
        implicit_score_entropy(**arguments)
