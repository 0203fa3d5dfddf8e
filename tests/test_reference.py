"""The specification against itself: identities that tie the formulas to each other and to exact probabilities."""

import itertools
import math

import numpy as np
import pytest
import torch

from fastdiff import reference
from fastdiff.philox import Purpose, draw32

M = 4  # the mask of a five-state absorbing graph
GRAPHS = [("absorb", M), ("uniform", None)]


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def rate_matrix(graph, n):
    if graph == "uniform":
        return torch.full((n, n), 1 / n, dtype=torch.float64) - torch.eye(n, dtype=torch.float64)
    q = -torch.eye(n, dtype=torch.float64)
    q[M] += 1
    return q


def toy(n=5, seed=0, graph="absorb"):
    """A distribution over one token; the mask has none of it."""
    p = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    if graph == "absorb":
        p[M] = 0
    return p / p.sum()


@pytest.mark.parametrize(("graph", "mask"), GRAPHS)
def test_transitions_are_the_matrix_exponential(graph, mask):
    sigma, i = f64(0.7), torch.arange(5)
    exact = torch.matrix_exp(0.7 * rate_matrix(graph, 5))
    columns = reference.transition(graph, i, sigma, 5, mask)
    torch.testing.assert_close(columns, exact.T)
    torch.testing.assert_close(columns.sum(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(reference.transp_transition(graph, i, sigma, 5, mask), exact)


@pytest.mark.parametrize(("graph", "mask"), GRAPHS)
def test_staggered_score_is_the_inverse_exponential(graph, mask):
    score = torch.rand(3, 5, dtype=torch.float64)
    expected = score @ torch.matrix_exp(-0.4 * rate_matrix(graph, 5)).T
    torch.testing.assert_close(reference.staggered_score(graph, score, f64([0.4] * 3), mask), expected)


@pytest.mark.parametrize(("graph", "mask"), GRAPHS)
def test_reverse_rate_is_the_time_reversal(graph, mask):
    score, i = torch.rand(5, 5, dtype=torch.float64), torch.arange(5)
    expected = rate_matrix(graph, 5) * score
    expected -= torch.diag(expected.diag())
    expected -= torch.diag(expected.sum(-1))
    torch.testing.assert_close(reference.reverse_rate(graph, i, score, mask), expected)


@pytest.mark.parametrize(("graph", "mask"), GRAPHS)
def test_tweedie_at_the_true_score_is_the_exact_reverse_kernel(graph, mask):
    p0, q = toy(graph=graph), rate_matrix(graph, 5)
    sigma_t, sigma_s = 1.3, 0.5
    p_s, p_t = (torch.matrix_exp(s * q) @ p0 for s in (sigma_s, sigma_t))
    for xt in range(5):
        if p_t[xt] < 1e-12:
            continue
        exact = torch.matrix_exp((sigma_t - sigma_s) * q)[xt] * p_s / p_t[xt]
        log_score = (p_t / p_t[xt]).log()
        step = reference.reverse_step(graph, log_score, torch.tensor(xt), f64(sigma_t), f64(sigma_s), mask)
        torch.testing.assert_close(step, exact, rtol=1e-9, atol=1e-12)


def test_absorbing_reverse_step_agrees_with_tweedie():
    logits, xt = torch.randn(6, 5, dtype=torch.float64), torch.tensor([M, M, 0, 3, M, 1])
    sigma_t, sigma_s = torch.full((6,), 1.1, dtype=torch.float64), torch.full((6,), 0.3, dtype=torch.float64)
    log_score = reference.log_score_from_logits(logits, sigma_t, M)
    tweedie = reference.reverse_step("absorb", log_score, xt, sigma_t, sigma_s, M)
    torch.testing.assert_close(reference.absorb_reverse_step(logits, xt, sigma_t, sigma_s, M), tweedie)


def naive_absorb(s, sigma, x0):
    e1 = math.expm1(sigma)
    total = sum(math.exp(s[y]) for y in range(5) if y != M)
    return total - s[x0] / e1 + (1 / e1) * (math.log(1 / e1) - 1)


def naive_uniform(s, sigma, xt, x0):
    n, e1 = len(s), math.expm1(sigma)
    r = e1 / (e1 + n)
    positive = sum(math.exp(s[y]) for y in range(n) if y != xt) / n
    plain = sum(s[y] for y in range(n) if y != xt) / n
    if xt == x0:
        return positive - r * plain + (n - 1) / n * r * (math.log(r) - 1)
    return positive - (plain + s[x0] / e1) + ((-math.log(r) - 1) / r - (n - 2)) / n


@pytest.mark.parametrize("sigma", [0.05, 0.8, 3.0])
def test_dse_equals_the_published_sums(sigma):
    s = torch.randn(5, dtype=torch.float64)
    for xt, x0 in itertools.product(range(5), range(5)):
        at = [f64(sigma), torch.tensor(xt), torch.tensor(x0)]
        got = reference.dse_uniform(s, *at)
        assert float(got) == pytest.approx(naive_uniform(s.tolist(), sigma, xt, x0), rel=1e-9)
        if x0 != M:
            got = reference.dse_absorb(s, *at, M)
            expected = naive_absorb(s.tolist(), sigma, x0) if xt == M else 0.0
            assert float(got) == pytest.approx(expected, rel=1e-9)


def test_absorbing_dse_of_conditionals_is_weighted_cross_entropy():
    """Identity 3: DSE = (1/e1) [-log c_x0 + (sum c - 1)], plain cross-entropy / e1 when c is normalised."""
    logits, x0, xt = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 4, torch.full((8,), M)
    sigma = torch.rand(8, dtype=torch.float64) + 0.2
    inv_e1 = 1 / torch.expm1(sigma)
    log_score = reference.log_score_from_logits(logits, sigma, M)
    expected = inv_e1 * reference.dce(logits, x0, xt == M, M)
    torch.testing.assert_close(reference.dse_absorb(log_score, sigma, xt, x0, M), expected)
    excess = inv_e1 * (expected / inv_e1 - 0.3 + (math.exp(0.3) - 1))
    torch.testing.assert_close(reference.dse_absorb(log_score + 0.3, sigma, xt, x0, M), excess)


class Information:
    """KL(p_{t|0}(.|x0) || p_t) and the expected score entropy at the true score, as functions of sigma."""

    def __init__(self, graph, x0=2):
        self.graph, self.x0, self.p0 = graph, x0, toy(graph=graph)

    def laws(self, sigma):
        noised = torch.matrix_exp(f64(sigma) * rate_matrix(self.graph, 5))
        return noised[:, self.x0], noised @ self.p0

    def kl(self, sigma):
        conditional, marginal = self.laws(sigma)
        return float(torch.special.xlogy(conditional, conditional / marginal).nan_to_num().sum())

    def loss(self, sigma):
        conditional, marginal = self.laws(sigma)
        total = 0.0
        for xt in conditional.nonzero().flatten():
            log_score, at = (marginal / marginal[xt]).log(), (f64(sigma), xt, torch.tensor(self.x0))
            absorb = self.graph == "absorb"
            loss = reference.dse_absorb(log_score, *at, M) if absorb else reference.dse_uniform(log_score, *at)
            total += float(conditional[xt] * loss)
        return total


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_score_entropy_is_the_rate_of_the_information(graph, sigma):
    """Identity 4: d/dsigma KL(p_{t|0}(.|x0) || p_t) = -E[l] at the true score."""
    information, h = Information(graph), 1e-4
    slope = (information.kl(sigma + h) - information.kl(sigma - h)) / (2 * h)
    assert slope == pytest.approx(-information.loss(sigma), rel=1e-6)


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_integrated_score_entropy_is_the_likelihood(graph):
    """Identity 4: the integral from 0 to sigma plus KL(p_{t|0} || p_t) there is -log p(x0)."""
    information, end = Information(graph), 6.0
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u = (nodes + 1) / 2  # sigma = end u^4 smooths the log sigma at 0
    integral = sum(w / 2 * 4 * end * v**3 * information.loss(end * v**4) for v, w in zip(u, weights, strict=True))
    exact = -math.log(information.p0[information.x0])
    assert integral + information.kl(end) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_dse_is_nonnegative_and_zero_at_the_conditional_ratio(graph):
    """Identity 9."""
    sigma, x0 = f64(0.6), torch.tensor(1)
    for xt in [M] if graph == "absorb" else range(5):
        conditional = reference.transition(graph, x0, sigma, 5, M if graph == "absorb" else None)
        ratio = (conditional / conditional[xt]).log().clamp_min(-700)
        at = [sigma, torch.tensor(xt), x0]
        loss = reference.dse_absorb(ratio, *at, M) if graph == "absorb" else reference.dse_uniform(ratio, *at)
        assert float(loss) == pytest.approx(0, abs=1e-12)
        worse = ratio + torch.randn(5, dtype=torch.float64)
        loss = reference.dse_absorb(worse, *at, M) if graph == "absorb" else reference.dse_uniform(worse, *at)
        assert loss > 0


def test_scale_by_sigma_is_sedds_tail():
    out, sigma, xt = torch.randn(2, 5), torch.tensor([0.4, 2.0]), torch.tensor([M, 1])
    expected = out.double() - torch.log(torch.expm1(sigma.double())).unsqueeze(1) - math.log(4)
    expected[0, M] = expected[1, 1] = 0
    torch.testing.assert_close(reference.scale_by_sigma(out, sigma, xt), expected)


@pytest.mark.parametrize("length", [1, 2, 8])
def test_subset_weights_and_count_laws(length):
    """Identity 5: sum_m C(L, m) B(m, L - m + 1) = H_L, and the harmonic law is 1 / (m H_L)."""
    masks, weights = reference.subsets(length)
    assert len({tuple(m) for m in masks.tolist()}) == 2**length - 1
    harmonic = sum(1 / m for m in range(1, length + 1))
    beta = sum(
        math.comb(length, m) * math.gamma(m) * math.gamma(length - m + 1) / math.gamma(length + 1)
        for m in range(1, length + 1)
    )
    assert beta == pytest.approx(harmonic)
    assert float(weights.sum()) == pytest.approx(harmonic)
    assert float((weights * masks.sum(1)).sum()) == pytest.approx(length)
    for proposal in ("harmonic", "uniform"):
        assert float(reference.count_law(length, proposal).sum()) == pytest.approx(1)


@pytest.mark.parametrize("classes", [5, 2, 1])
def test_race_follows_softmax_and_keeps_the_tail(classes):
    p = torch.tensor([0.5, 0.3, 0.15, 0.0499, 1e-4], dtype=torch.float64)
    index = torch.arange(classes * (1 + -(-5 // classes))).view(-1, classes)
    draws = draw32(1, Purpose.RACE, 0, torch.arange(100_000).view(-1, 1, 1), 0, index)
    counts = torch.bincount(reference.race(p.log().expand(100_000, 5), draws), minlength=5)
    expected = 1e5 * p / p.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom, 0.1%
    assert counts[4] > 0


def test_non_finite_rows():
    x0, scored = torch.tensor([1]), torch.tensor([True])
    row = torch.tensor([[0.0, 1.0, float("nan"), 0.0, 0.0]])
    assert reference.dce(row, x0, scored, M).isnan()
    row[0, 2] = -torch.inf
    assert reference.dce(row, x0, scored, M).isfinite()
    row[0, M] = torch.nan
    assert reference.dce(row, x0, scored, M).isfinite()


def test_z_loss_beside_large_logits():
    x0, scored = torch.tensor([1]), torch.tensor([True])
    for size in (1e6, 1e150):
        logits = torch.full((1, 4), size, dtype=torch.float64, requires_grad=True)
        loss = reference.dce(logits, x0, scored, None, 0.1)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        torch.testing.assert_close(grad[0, 0], f64((1 + 0.2 * (size + math.log(4))) / 4))
    assert float(reference.dce(f64([[1e300] * 4]), x0, scored, None)) == pytest.approx(math.log(4))
