"""The bound of noise that is part mask and part uniform is that of the likelihood."""

import math

import numpy
import pytest
import torch
from mixtures import PAIRS, STRINGS, V, ids, law_of_pairs, processes

from fastdiff import (
    Hybrid,
    Mixture,
    corrupt,
    dse_nll,
    mixture_loss,
    mixture_weight,
)


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
