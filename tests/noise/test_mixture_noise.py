"""Noise that is part mask and part uniform: its laws by matrices, its reverse step by Bayes, its bound by
enumeration."""

import math

import numpy
import pytest
import torch
from laws import agrees, strings

from fastdiff import (
    Absorbing,
    Hybrid,
    LogLinear,
    Mixture,
    Uniform,
    corrupt,
    dse_nll,
    mixture_loss,
    mixture_reverse_step,
    mixture_weight,
    reference,
    sample,
)

V, MASKS = 4, [3, 1, 0]
each_mask = pytest.mark.parametrize("mask", MASKS)
STRINGS = strings(V, 2)
SIGMAS = [1e-3, 0.4, 2.0, 9.0]
P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)  # [L, N] laws of independent tokens
# of two tokens that depend on each other
PAIRS = torch.tensor([[0.30, 0.02, 0.03], [0.05, 0.25, 0.02], [0.01, 0.02, 0.30]], dtype=torch.float64)


def ids(mask):
    """The ids other than the mask."""
    return torch.tensor([y for y in range(V) if y != mask])


def matrix(sigma, share, mask):
    """p(x_t = row | x_0 = column), from the exponential of the generator: every id turns into the same law."""
    limit = torch.full((V,), share / (V - 1), dtype=torch.float64)
    limit[mask] = 1 - share
    return torch.linalg.matrix_exp(sigma * (limit.unsqueeze(1).expand(V, V) - torch.eye(V, dtype=torch.float64)))


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


# ---------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------
# The reverse step.


def logits_of(c, mask):
    """[..., N] laws as logits [..., V], with a large number at the mask, which is to be left out."""
    return torch.full((*c.shape[:-1], V), 9.0, dtype=c.dtype).index_copy(-1, ids(mask), c.log())


MOVES = [  # sigma, share, sigma_next, share_next
    (1.0, 0.3, 0.4, 0.3),
    (1.0, 0.3, 0.4, 0.1),
    (0.9, 0.2, 0.3, 0.5),
    (1.0, 0.3, 0.0, 0.7),
    (40.0, 0.5, 1.0, 0.5),
    (1.0, 0.0, 0.4, 0.0),
    (1.0, 1.0, 0.4, 1.0),
]


@each_mask
@pytest.mark.parametrize("move", MOVES, ids=str)
def test_reverse_step_is_bayes(mask, move):
    """Of one token: its posterior by matrices, against the formula, and against draws from every backend."""
    sigma, share, after, share_after = move
    prior = torch.zeros(V, dtype=torch.float64).index_copy(0, ids(mask), P[0])
    first, whole = matrix(after, share_after, mask), matrix(sigma, share, mask)
    step = whole @ torch.linalg.inv(first)  # Markov: what the two times differ by
    assert (step > -1e-12).all()
    joint = step.clamp_min(0) * (first @ prior)  # [x_t, x_s]
    posterior = joint / joint.sum(1, keepdim=True)
    possible = [y for y in range(V) if (whole @ prior)[y] > 0]

    xt = torch.tensor(possible)
    levels = [torch.full((len(xt),), level, dtype=torch.float64) for level in move]
    logits = logits_of(P[0].expand(len(xt), -1), mask)
    rows = reference.mixture_reverse_step(logits, xt, *levels, mask)
    torch.testing.assert_close(rows, posterior[xt])
    n = 8000
    for backend in (None, "reference"):
        drawn = mixture_reverse_step(
            logits.expand(n, -1, -1), xt.expand(n, -1), sigma, share, sigma_next=after, share_next=share_after,
            mask_index=mask, seed=2, backend=backend,
        )  # fmt: skip
        for k in range(len(xt)):
            certain = rows[k].max() > 1 - 1e-12
            same = drawn[:, k].eq(rows[k].argmax()).all() if certain else agrees(drawn[:, k : k + 1], rows[k], V)
            assert same, (backend, possible[k])


def test_backends_draw_the_same():
    torch.manual_seed(0)
    logits, xt = torch.randn(64, 20, 50), torch.randint(50, (64, 20))
    for temperature in (1.0, 0.3, 0.0):
        options = dict(sigma_next=0.5, mask_index=7, temperature=temperature, seed=1, step=3)
        drawn = [mixture_reverse_step(logits, xt, 0.9, 0.4, **options, backend=b) for b in (None, "reference")]
        assert (drawn[0] == drawn[1]).double().mean() > 0.999
        part = mixture_reverse_step(logits[5:9], xt[5:9], 0.9, 0.4, sample_ids=torch.arange(5, 9), **options)
        assert torch.equal(part, drawn[0][5:9])


def test_temperature_leaves_whether_a_token_changes():
    logits, xt = (
        torch.randn(4000, 2, V, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[0, 3]]).expand(4000, -1),
    )
    warm, cold = (mixture_reverse_step(logits, xt, 2.0, 0.5, sigma_next=0.5, seed=1, temperature=t) for t in (1.0, 0.0))
    assert torch.equal(warm == xt, cold == xt)
    assert torch.equal(warm == 3, cold == 3)
    best = torch.where(xt == 3, logits[..., :3].argmax(-1), logits[..., 1:3].argmax(-1) + 1)
    changed = (cold != xt) & (cold != 3)
    assert torch.equal(cold[changed], best[changed])


# ---------------------------------------------------------------------------------------------------------
# Two dependent tokens whose conditionals are known: what a network is that was trained to the end.


class Oracle:
    """c_i = p(x0_i | x_t at the other position), of PAIRS noised by a mixture whose share is a function of sigma."""

    def __init__(self, mask, share):
        self.mask, self.share, self.ids = mask, share, ids(mask)

    def likelihood(self, xt, sigma):
        """q(x_t | x0 = each id), [b, L, N]."""
        alpha, noise = torch.exp(-sigma.double()), -torch.expm1(-sigma.double())
        share = self.share(sigma.double())
        came = torch.where(xt == self.mask, (noise * (1 - share)).unsqueeze(1), (noise * share / (V - 1)).unsqueeze(1))
        return came.unsqueeze(2) + alpha.view(-1, 1, 1) * (xt.unsqueeze(2) == self.ids)

    def __call__(self, xt, sigma):
        q = self.likelihood(xt, sigma)
        c = torch.stack([q[:, 1] @ PAIRS.T, q[:, 0] @ PAIRS], 1)
        return logits_of(c / c.sum(2, keepdim=True), self.mask)


def law_of_pairs(mask):
    law = torch.zeros(V, V, dtype=torch.float64)
    law[ids(mask).unsqueeze(1), ids(mask)] = PAIRS
    return law.flatten()


def chain(oracle, graph, schedule, share, steps):
    """The law of two tokens after the steps of `sample`, by enumeration: [V V]."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigma, shares, states = schedule.total_noise(times), share(times), STRINGS
    sigma[-1] = 0
    limit = reference.mixture_limit(shares[0], V, graph.mask_index)
    law = (limit.unsqueeze(1) * limit).flatten()
    for k in range(steps):
        now, after = sigma[k].expand(len(states)), sigma[k + 1].expand(len(states))
        levels = (
            level.unsqueeze(1).expand(-1, 2)
            for level in (now, shares[k].expand(len(states)), after, shares[k + 1].expand(len(states)))
        )
        rows = reference.mixture_reverse_step(oracle(states, now), states, *levels, graph.mask_index).nan_to_num()
        law = law @ (rows[:, 0].unsqueeze(2) * rows[:, 1].unsqueeze(1)).flatten(1)
    return law


def processes(mask):
    hybrid = Hybrid(0.3)
    oracle = Oracle(mask, lambda s: hybrid.share(hybrid.inverse(s)))
    yield oracle, Mixture(V, mask), hybrid, hybrid.share
    yield (
        Oracle(mask, lambda s: torch.full_like(s, 0.4)),
        Mixture(V, mask, 0.4),
        LogLinear(),
        lambda t: torch.full_like(t, 0.4),
    )


@pytest.mark.parametrize("mask", [3, 1])
def test_sampling_from_the_truth_gives_the_truth(mask):
    """As steps grow, for tokens change by themselves in each; and draws are from the law of their number of steps."""
    for oracle, graph, schedule, share in processes(mask):
        far, near = (chain(oracle, graph, schedule, share, steps) - law_of_pairs(mask) for steps in (10, 120))
        assert near.abs().sum() < 0.3 * far.abs().sum() < 0.1
        drawn = sample(oracle, graph=graph, schedule=schedule, num_samples=6000, length=2, steps=6, seed=11)
        assert agrees(drawn, chain(oracle, graph, schedule, share, 6), V)


def test_sampling_edits_tokens_and_keeps_the_prompt():
    oracle = Oracle(3, lambda s: torch.full_like(s, 0.5))
    options = dict(num_samples=200, length=2, steps=30, graph=Mixture(V, 3, 0.5), return_trajectory=True)
    frames = sample(oracle, **options).trajectory
    before, after = frames[:-1], frames[1:]
    assert ((before != 3) & (after != 3) & (before != after)).any()
    assert ((before != 3) & (after == 3)).any()
    assert (frames[-1] != 3).all()
    frames = sample(oracle, prompt=torch.tensor([2]), **options).trajectory
    assert (frames[..., 0] == 2).all()
    assert (frames[0, :, 1] != frames[-1, :, 1]).any()


# ---------------------------------------------------------------------------------------------------------
# The bound.


def divergence(mask, x0, sigma, share):
    """KL of q_t(. | x0) from p_t, by enumeration; at sigma = 0 it is -log p(x0)."""
    q = Mixture(V, mask, share).transition(torch.arange(V), sigma)
    noised, marginal = q[x0[0]].unsqueeze(1) * q[x0[1]], q.T @ law_of_pairs(mask).view(V, V) @ q
    return (torch.special.xlogy(noised, noised) - torch.special.xlogy(noised, marginal)).sum().item()


def bound(network, graph, x0, times, schedule):
    """The weighted loss of sequences at times [n], one drawn x_t each: its mean over times is a bound. [n]"""
    sigma, dsigma = schedule(times)
    hybrid = isinstance(schedule, Hybrid)
    share, dshare = (schedule.share(times), schedule.rate_share(times)) if hybrid else (graph.share, 0.0)
    graph, x0 = Mixture(V, graph.mask_index, share), x0.expand(len(times), -1)
    xt = corrupt(x0, sigma, graph, seed=4)
    weight = mixture_weight(xt, x0, sigma, dsigma, graph, dshare=dshare)
    loss = mixture_loss(network(xt, sigma), sigma, share, xt, x0, weight=weight, mask_index=graph.mask_index)
    return loss.sum(1)


@pytest.mark.parametrize("mask", [3, 1])
def test_weighted_loss_is_unbiased_for_the_likelihood_but_for_its_ends(mask):
    """Of the exact conditionals, by draws: the integral over times is what the divergence from the data's law loses."""
    x0, n, first, last = ids(mask)[torch.tensor([0, 2])], 40000, 0.05, 0.95
    times = first + (last - first) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for oracle, graph, schedule, share in processes(mask):
        values = (last - first) * bound(oracle, graph, x0, times, schedule)
        ends = [
            divergence(mask, x0, schedule.total_noise(t), share(t))
            for t in torch.tensor([first, last], dtype=torch.float64)
        ]
        assert abs(values.mean().item() - (ends[0] - ends[1])) < 4 * values.std().item() / n**0.5


@pytest.mark.parametrize("mask", [3, 1])
def test_bound_is_the_likelihood_by_quadrature(mask):
    """The same to ten digits between two times, and to five from the data to the end, where sigma is large."""
    x0 = ids(mask)[torch.tensor([0, 2])]
    nodes, weights = map(torch.from_numpy, numpy.polynomial.legendre.leggauss(24))
    for oracle, graph, schedule, share in processes(mask):

        def mean_loss(t, oracle=oracle, graph=graph, schedule=schedule, share=share):
            sigma, dsigma = schedule(t)
            at_t = Mixture(V, mask, share(t))
            law = at_t.transition(x0, sigma)
            law = (law[0].unsqueeze(1) * law[1]).flatten()
            xt, law, clean = STRINGS[law > 0], law[law > 0], x0.expand(int((law > 0).sum()), 2)
            dshare = schedule.rate_share(t) if isinstance(schedule, Hybrid) else 0.0
            weight = mixture_weight(xt, clean, sigma, dsigma, at_t, dshare=dshare)
            logits = oracle(xt, sigma.expand(len(xt)))
            loss = mixture_loss(logits, sigma, share(t), xt, clean, weight=weight, mask_index=mask)
            return law @ loss.sum(1)

        first, last = torch.tensor([0.1, 0.9], dtype=torch.float64)
        total = sum(0.4 * w * mean_loss(0.5 + 0.4 * x) for x, w in zip(nodes, weights, strict=True))
        ends = (divergence(mask, x0, schedule.total_noise(t), share(t)) for t in (first, last))
        assert total.item() == pytest.approx(next(ends) - next(ends), rel=1e-10)
        if not isinstance(schedule, Hybrid):  # whose rate has no bound
            angles = (nodes + 1) * math.pi / 4
            terms = zip(angles, weights, strict=True)
            total = sum(w * math.pi / 4 * torch.sin(2 * x) * mean_loss(torch.sin(x) ** 2) for x, w in terms)
            end = divergence(mask, x0, schedule.total_noise(last * 0 + 1), share(last))
            assert total.item() + end == pytest.approx(-math.log(PAIRS[0, 2]), rel=1e-5)


@pytest.mark.parametrize("mask", [3, 1])
def test_dse_nll_of_a_mixture(mask):
    """The truth, whole; and what is published, a mean over t."""
    x0 = ids(mask)[torch.tensor([[0, 2], [1, 1]])]
    truth = -torch.log(torch.stack([PAIRS[0, 2], PAIRS[1, 1]]))
    for oracle, graph, schedule, share in processes(mask):
        options = dict(graph=graph, schedule=schedule, parametrization="logits", num_samples=64)
        estimate = dse_nll(oracle, x0.repeat(300, 1), **options)
        for k in range(2):
            nll, stderr = estimate.nll[k::2], estimate.stderr[k::2]
            assert abs(nll.mean() - truth[k]) < 4 * nll.std() / 300**0.5
            assert nll.var() < 1.5 * (stderr**2).mean()
        first, last = 0.05, 1.0
        published = dse_nll(oracle, x0[:1].expand(500, -1), eps=first, **options).nll
        ends = [
            divergence(mask, x0[0], schedule.total_noise(t), share(t)) for t in torch.tensor([first, last]).double()
        ]
        assert abs(published.mean() - (ends[0] - ends[1]) / (last - first)) < 4 * published.std() / 500**0.5


# ---------------------------------------------------------------------------------------------------------


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


def noised(share):
    return corrupt(torch.zeros(2, 3).long(), 1.0, Mixture(4, share=share))


def step(**options):
    return mixture_reverse_step(torch.zeros(1, 2, 4), torch.zeros(1, 2).long(), 1.0, 0.3, **options)


def weight(share=0.5, dshare=0.0):
    return mixture_weight(torch.tensor([1, 3]), torch.tensor([0, 0]), 1.0, 1.0, Mixture(4, share=share), dshare=dshare)


def nll(**options):
    return dse_nll(lambda xt, sigma: 0, torch.zeros(2, 3).long(), graph=Mixture(4), schedule=Hybrid(), **options)


def draw(**options):
    return sample(
        lambda xt, sigma: torch.zeros(*xt.shape, 4), **({"graph": Mixture(4, share=0.2), "length": 2} | options)
    )
