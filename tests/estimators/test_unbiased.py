"""20000 estimates of every kind on a skewed chain whose conditionals are nearly certain: their mean is the truth.

What depends on its own replicate by a fit or by a stopping rule is off by a tenth of a standard deviation here, where
rounder distributions hide it.
"""

import math

import numpy as np
import pytest
import torch
from oracles import AbsorbingScores, MarkovChain, Mixture, Tabled, UniformScores, skewed_chain
from torch import Tensor

from fastdiff import Absorbing, LogLinear, Uniform
from fastdiff.estimators import (
    conditional_nll,
    dse_nll,
    exact_nll,
    log_likelihood_ratio,
    time_free_nll,
    time_integral_nll,
)
from fastdiff.estimators.time_free import PROPOSALS

pytestmark = pytest.mark.slow

REPEATS = 20_000
ORACLE = skewed_chain()
MODEL = Tabled(ORACLE, 8)
CERTAIN, ODD = torch.zeros(1, 8, dtype=torch.int64), torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0]])
each_proposal = pytest.mark.parametrize("proposal", PROPOSALS)


def each_case(fitted: Tensor):
    """A string for each proposal, and one more for the only one that fits anything."""
    cases = [("stratified", fitted), *((proposal, ODD) for proposal in PROPOSALS)]
    return pytest.mark.parametrize(("proposal", "x"), cases, ids=["stratified-too", *PROPOSALS])


def repeated(x: Tensor) -> Tensor:
    return x.expand(REPEATS, -1)


def holds(values: Tensor, truth: float) -> None:
    """|z| < 4."""
    standard_error = max(values.std().item() / math.sqrt(len(values)), 1e-12 * abs(truth))
    z = (values.mean().item() - truth) / standard_error
    assert abs(z) < 4, f"mean {values.mean().item()}, truth {truth}, z = {z}"


@pytest.mark.parametrize(
    ("num_samples", "x"),
    [(3, ODD), (8, CERTAIN), (8, ODD), (16, CERTAIN), (63, ODD)],
    ids=["3-odd", "8-certain", "8-odd", "16-certain", "63-odd"],
)
def test_chains(num_samples: int, x: Tensor) -> None:
    holds(time_free_nll(MODEL, repeated(x), mask_index=2, num_samples=num_samples).nll, ORACLE.nll(x).item())


@pytest.mark.parametrize("proposal", PROPOSALS[1:])
@pytest.mark.parametrize("num_samples", [4, 16])
def test_other_proposals(proposal: str, num_samples: int) -> None:
    estimate = time_free_nll(MODEL, repeated(ODD), mask_index=2, num_samples=num_samples, proposal=proposal)
    holds(estimate.nll, ORACLE.nll(ODD).item())


@each_case(CERTAIN)
def test_tolerances(proposal: str, x: Tensor) -> None:
    """How many passes are made depends on a pilot, and the estimate on nothing of it. Tolerances that pilots decide."""
    tolerance = 12.0 if x is ODD else 3.0
    options = dict(mask_index=2, num_samples=4, tolerance=tolerance, max_samples=12, proposal=proposal)
    estimate = time_free_nll(MODEL, repeated(x), **options)
    assert len(estimate.num_forwards.unique()) > 3
    holds(estimate.nll, ORACLE.nll(x).item())


@each_case(CERTAIN)
def test_conditionals(proposal: str, x: Tensor) -> None:
    prompt, response = repeated(x)[:, :1], repeated(x)[:, 1:]
    estimate = conditional_nll(MODEL, prompt, response, mask_index=2, num_samples=4, proposal=proposal)
    holds(estimate.nll, (ORACLE.nll(x) - ORACLE.nll(x[:, :1])).item())


@each_case(1 - CERTAIN)
def test_ratios(proposal: str, x: Tensor) -> None:
    ratio = log_likelihood_ratio(MODEL, repeated(CERTAIN), repeated(x), mask_index=2, num_samples=4, proposal=proposal)
    holds(ratio.log_ratio, (ORACLE.nll(x) - ORACLE.nll(CERTAIN)).item())


@pytest.mark.parametrize("proposal", ["stratified", "complementary"])
def test_margins(proposal: str) -> None:
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    other = MarkovChain(torch.full((2,), 0.5, dtype=torch.float64), transition)
    options = dict(mask_index=2, num_samples=4, proposal=proposal, reference=Tabled(other, 8))
    margin = log_likelihood_ratio(MODEL, repeated(CERTAIN), repeated(ODD), **options)
    p, reference = ((oracle.nll(ODD) - oracle.nll(CERTAIN)).item() for oracle in (ORACLE, other))
    holds(margin.log_ratio, p - reference)


@each_proposal
def test_gradients(proposal: str) -> None:
    scale = torch.ones(8, 1, dtype=torch.float64, requires_grad=True)

    def model(xt: Tensor) -> Tensor:
        return MODEL(xt) * scale

    options = dict(mask_index=2, differentiable=True)
    truth = torch.autograd.grad(exact_nll(model, ODD, **options).nll.sum(), scale)[0]
    options |= dict(num_samples=8, proposal=proposal)
    parts = [
        torch.autograd.grad(time_free_nll(model, ODD.expand(500, -1), seed=seed, **options).nll.mean(), scale)[0]
        for seed in range(REPEATS // 500)
    ]
    for found, at in zip(torch.stack(parts).flatten(1).T, truth, strict=True):
        holds(found, at.item())


@pytest.mark.parametrize("times", ["stratified", "iid"])
def test_time_integrals(times: str) -> None:
    eps = 0.05
    node, weight = np.polynomial.legendre.leggauss(8)  # exact for polynomials
    level, m = torch.from_numpy(eps + (1 - eps) * (node + 1) / 2).unsqueeze(1), torch.arange(1, 9)
    by_count = 8 * count_losses(ODD)  # of m * binomial(8, m) = 8 * binomial(7, m - 1)
    binomial = torch.tensor([math.comb(7, k) for k in range(8)])
    integrand = (level ** (m - 1) * (1 - level) ** (8 - m) * binomial * by_count).sum(1)
    truth = (1 - eps) / 2 * (torch.from_numpy(weight) * integrand).sum().item()
    holds(time_integral_nll(MODEL, repeated(ODD), mask_index=2, num_samples=8, times=times, eps=eps).nll, truth)


def count_losses(x: Tensor) -> Tensor:
    """g(m) = mean loss of a masked token over the subsets of m, for m = 1..8."""
    mask = (torch.arange(1, 256).unsqueeze(1) >> torch.arange(8)) % 2 == 1
    log_c = MODEL(x.masked_fill(mask, 2))[..., :2].log_softmax(2)
    loss = -(log_c.gather(2, x.expand(255, 8).unsqueeze(2)).squeeze(2) * mask).sum(1) / mask.sum(1)
    return torch.stack([loss[mask.sum(1) == m].mean() for m in range(1, 9)])


@pytest.mark.parametrize("times", ["stratified", "iid"])
def test_score_entropies_of_the_absorbing_graph(times: str) -> None:
    options = dict(graph=Absorbing(3), schedule=LogLinear(), num_samples=8, times=times)
    holds(dse_nll(AbsorbingScores(MODEL), repeated(ODD), **options).nll, ORACLE.nll(ODD).item())


@pytest.mark.parametrize("times", ["stratified", "iid"])
def test_score_entropies_of_the_uniform_graph(times: str) -> None:
    nearly_one = torch.tensor([[0.99, 0.01, 0], [0.02, 0.98, 0]]).double().log()
    twins = Mixture(torch.tensor([0.97, 0.03]).double().log(), nearly_one[:, None].expand(-1, 6, -1), mask_index=2)
    x = torch.tensor([[0, 0, 1, 0, 0, 0]])
    options = dict(graph=Uniform(2), schedule=LogLinear(1e-4), num_samples=8, times=times)
    holds(dse_nll(UniformScores(twins), repeated(x), **options).nll, twins.nll(x).item())
