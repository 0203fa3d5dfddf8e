"""Noise that is part mask and part uniform: its laws by matrices, and against the published one."""

import pytest
import torch
from laws import agrees
from mixtures import V, each_mask, ids, matrix, nll, noised, step, weight

from fastdiff import (
    Absorbing,
    Hybrid,
    LogLinear,
    Mixture,
    Uniform,
    corrupt,
    mixture_weight,
    sample,
)

SIGMAS = [1e-3, 0.4, 2.0, 9.0]


@each_mask
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_transitions_are_the_exponential_of_the_rates(mask, share):
    i = torch.arange(V)
    for sigma in SIGMAS:
        graph, expected = Mixture(V, mask, share), matrix(sigma, share, mask)
        torch.testing.assert_close(graph.transition(i, sigma).T, expected)
        torch.testing.assert_close(graph.transp_transition(i, sigma), expected)
    chapman_kolmogorov = graph.transition(i, 0.5) @ graph.transition(i, 0.7)
    torch.testing.assert_close(chapman_kolmogorov, graph.transition(i, 1.2))


@each_mask
@pytest.mark.parametrize("backend", [None, "reference"])
def test_corrupt_draws_from_the_transition(mask, backend):
    x0 = torch.arange(V).repeat(20000, 1)
    graph = Mixture(V, mask, torch.full((20000,), 0.6, dtype=torch.float64))
    xt = corrupt(x0, 0.8, graph, seed=3, backend=backend)
    expected = Mixture(V, mask, 0.6).transition(torch.arange(V), 0.8)
    for start in range(V):
        assert agrees(xt[:, start : start + 1], expected[start], V)
    both = xt[:, 0] * V + xt[:, 1]  # positions are independent
    assert agrees(both.unsqueeze(1), (expected[0].unsqueeze(1) * expected[1]).flatten(), V * V)


@each_mask
def test_the_ends_are_the_other_graphs(mask):
    x0 = torch.randint(V, (64, 32), generator=torch.Generator().manual_seed(0))
    names = dict(seed=5, step=2, sample_ids=torch.arange(64) + 7)
    sigma = torch.linspace(0, 3, 64)
    absorbed = corrupt(x0, sigma, Absorbing(V, mask), **names)
    assert torch.equal(corrupt(x0, sigma, Mixture(V, mask, 0.0), **names), absorbed)
    clean = ids(mask)[x0 % (V - 1)]
    uniform = ids(mask)[corrupt(x0 % (V - 1), sigma, Uniform(V - 1), **names)]
    assert torch.equal(corrupt(clean, sigma, Mixture(V, mask, 1.0), **names), uniform)
    mixed = corrupt(clean, sigma, Mixture(V, mask, 0.4), **names)
    assert ((mixed == mask) <= (corrupt(clean, sigma, Absorbing(V, mask), **names) == mask)).all()
    assert torch.equal(
        mixed[:3], corrupt(clean[:3], sigma[:3], Mixture(V, mask, 0.4), **(names | {"sample_ids": torch.arange(3) + 7}))
    )


def test_backends_agree():
    x0 = torch.randint(9, (32, 50), generator=torch.Generator().manual_seed(1))
    drawn = [corrupt(x0, 0.7, Mixture(9, 4, 0.3), seed=1, backend=backend) for backend in (None, "reference")]
    assert torch.equal(*drawn)


def test_limit():
    limit = Mixture(V, 1, 0.6).sample_limit(20000, 2, seed=4)
    law = torch.tensor([0.2, 0.4, 0.2, 0.2])
    assert agrees(limit, (law.unsqueeze(1) * law).flatten(), V)


def test_hybrid_is_the_published_noise():
    """GIDD's (t m + c u) / C with C = 1 + c; their B is 2^gamma p / (1 - p), their time ours times 1 - eps."""
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    for gamma in (0.5, 1.0, 2.0):
        schedule, u = Hybrid(0.2, gamma, eps=1e-2), 0.99 * t
        c = 2**gamma * 0.2 / 0.8 * (u * (1 - u)) ** (gamma / 2)
        torch.testing.assert_close(schedule.alpha(t), (1 - u) / (1 + c))
        noise = -torch.expm1(-schedule.total_noise(t))
        torch.testing.assert_close(noise * (1 - schedule.share(t)), u / (1 + c))
        torch.testing.assert_close(noise * schedule.share(t), c / (1 + c))
        s = t.clone().requires_grad_()
        torch.testing.assert_close(schedule.rate_share(t), torch.autograd.grad(schedule.share(s).sum(), s)[0])
    half = torch.tensor([0.5], dtype=torch.float64)
    whole = Hybrid(0.2, eps=0.0)
    assert (-torch.expm1(-whole.total_noise(half)) * whole.share(half)).item() == pytest.approx(0.2)
    torch.testing.assert_close(Hybrid(0.0).total_noise(t), LogLinear(1e-4).total_noise(t))
    assert (Hybrid(0.0).share(t) == 0).all()
    assert (Hybrid(0.0).rate_share(t) == 0).all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_weight_is_the_published_one(gamma):
    """The three values of GIDD's code, of a token that is x0, the mask, or another."""
    t, num_ids = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), V - 1
    schedule = Hybrid(0.2, gamma, eps=0.0)
    c = 2**gamma * 0.2 / 0.8 * (t * (1 - t)) ** (gamma / 2)
    slope = gamma / 2 * (1 - 2 * t) / (t * (1 - t)) * c
    kept = (c + (1 - t) * slope) / (num_ids * (1 - t) * (1 - t + c / num_ids))
    moved, masked = (c + (1 - t) * slope) / ((1 - t) * c), 1 / ((1 - t) * t)
    xt, x0 = torch.tensor([[0, 3, 1]] * 3), torch.zeros(3, 3, dtype=torch.int64)
    sigma, dsigma = schedule(t)
    graph = Mixture(V, 3, schedule.share(t))
    weight = mixture_weight(xt, x0, sigma, dsigma, graph, dshare=schedule.rate_share(t))
    torch.testing.assert_close(weight, torch.stack([kept, masked, moved], 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Mixture(1), ValueError, "num_states: expected at least 2, got 1"),
        (lambda: Mixture(4, 4), ValueError, "mask_index: expected an id"),
        (lambda: Mixture(4, share=1.5), ValueError, r"share: expected numbers in \[0, 1\], got 1.5"),
        (lambda: noised(torch.tensor([0.1, -0.2])), ValueError, r"share: expected numbers in \[0, 1\], got -0.2"),
        (lambda: noised(torch.rand(3)), ValueError, "share: expected a number or a shape"),
        (lambda: noised(None), ValueError, "share: .* got None"),
        (lambda: Hybrid(1.0), ValueError, "p_uniform: expected"),
        (lambda: Hybrid(gamma=2.5), ValueError, "gamma: expected"),
        (lambda: step(sigma_next=1.0), ValueError, r"sigma_next: expected numbers in \[0, sigma\)"),
        (lambda: step(sigma_next=0.5, share_next=1.0), ValueError, "share_next: expected noise that can grow"),
        (lambda: step(sigma_next=0.5, share_next=-1.0), ValueError, r"share_next: expected numbers in \[0, 1\]"),
        (lambda: weight(dshare=9.0), ValueError, "dshare: expected a rate"),
        (lambda: weight(share=0.0), ValueError, "xt: expected tokens that this noise gives"),
        (lambda: Mixture(4, share=0.2).at(Hybrid(), torch.ones(2)), ValueError, "share: expected None"),
        (lambda: nll(parametrization="log_score"), ValueError, "parametrization: expected conditionals of a Mixture"),
        (lambda: draw(parametrization="log_score"), ValueError, "parametrization, sampler: a Mixture needs"),
        (lambda: draw(sampler="euler"), ValueError, "parametrization, sampler: a Mixture needs"),
        (lambda: draw(sampler="confidence"), ValueError, "sampler: 'confidence' needs"),
        (lambda: draw(schedule=Hybrid()), ValueError, "share: expected None"),
        (lambda: draw(graph=Mixture(4)), ValueError, "share: expected a number"),
        (lambda: draw(exclude=[1]), ValueError, "exclude: needs"),
        (lambda: draw(top_k=2), ValueError, "top_k: needs"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def draw(**options):
    return sample(
        lambda xt, sigma: torch.zeros(*xt.shape, 4), **({"graph": Mixture(4, share=0.2), "length": 2} | options)
    )
