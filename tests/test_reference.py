"""The specification against itself: identities that tie the formulas to each other and to exact probabilities."""

import itertools
import math

import exact
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


@pytest.mark.parametrize("sigma", [0.05, 0.8, 3.0])
@pytest.mark.parametrize(("graph", "mask"), GRAPHS)
def test_concrete_score_matching_is_half_the_squared_distance_from_the_ratios(graph, mask, sigma):
    s = torch.randn(5, dtype=torch.float64)
    for xt, x0 in itertools.product([M] if mask else range(5), range(4 if mask else 5)):
        conditional = reference.transition(graph, torch.tensor(x0), f64(sigma), 5, mask)
        others = torch.arange(5) != xt
        expected = (s.exp() - conditional / conditional[xt])[others].square().sum() / 2
        given = [s, f64(sigma), torch.tensor(xt), torch.tensor(x0)]
        got = reference.csm_absorb(*given, M) if mask else reference.csm_uniform(*given)
        torch.testing.assert_close(got, expected)


def test_leave_one_out_logits_become_those_that_know_x_t():
    """Bayes: p(x0 | x_t, others) is proportional to p(x_t | x0) p(x0 | others)."""
    logits, xt, sigma = torch.randn(5, 5, dtype=torch.float64), torch.arange(5), f64(0.7)
    posterior = reference.transp_transition("uniform", xt, sigma, 5, None) * torch.softmax(logits, -1)
    found = torch.softmax(reference.leave_one_out(logits, sigma, xt), -1)
    torch.testing.assert_close(found, posterior / posterior.sum(-1, keepdim=True))


class Chain:
    """A chain of three steps over one token, its network a table of logits, and all of its probabilities."""

    def __init__(self, graph):
        self.graph, self.sigmas = graph, [0.0, 0.4, 1.1, 2.5]
        self.mask = M if graph == "absorb" else None
        self.steps = [
            torch.matrix_exp((t - s) * rate_matrix(graph, 5)) for s, t in itertools.pairwise(self.sigmas)
        ]  # [x_t, x_s]
        self.logits = torch.randn(4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def noised(self, step):
        """q(x_step | x0), [x_step, x0]."""
        return torch.matrix_exp(self.sigmas[step] * rate_matrix(self.graph, 5))

    def reverse(self, step, xt):
        """p(x_s | x_t): the mean of q(x_s | x_t, x0) q(x_t | x0) under the network's c, normalised."""
        z = self.logits[step, xt].clone()
        if self.mask is not None:
            z[M] = -torch.inf
        c = torch.softmax(z, -1)
        if step == 1 and self.graph == "uniform":
            return c  # D3PM's last step is the network's own law
        p = self.steps[step - 1][xt] * (self.noised(step - 1) @ c)
        return p / p.sum()

    def bound(self, x0):
        """E_q log q(x_1..x_3 | x0) / p(x_0..x_3) over all paths, where p(x_3) = q(x_3 | x0)."""
        total = 0.0
        for path in itertools.product(range(5), repeat=3):
            steps = list(zip((x0, *path), path, strict=False))
            q = math.prod(float(self.steps[i][t, s]) for i, (s, t) in enumerate(steps))
            if q > 0:
                end = float(self.noised(3)[path[-1], x0])
                p = end * math.prod(float(self.reverse(i + 1, t)[s]) for i, (s, t) in enumerate(steps))
                total += q * math.log(q / p)
        return total

    def losses(self, step):
        """The loss at each x_step, x0."""
        xt, x0 = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
        sigma, before = (f64([s] * 25) for s in (self.sigmas[step], self.sigmas[step - 1]))
        z = self.logits[step, xt]
        if self.graph == "uniform":
            return reference.d3pm_uniform(z, sigma, before, xt, x0).view(5, 5)
        weight = (torch.exp(-before) - torch.exp(-sigma)) / (1 - torch.exp(-sigma))
        return (weight * reference.dce(z, x0, (xt == M) & (x0 != M), M)).view(5, 5)


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_d3pm_is_the_bound_of_a_chain_whose_paths_are_enumerated(graph):
    chain = Chain(graph)
    for x0 in range(4 if graph == "absorb" else 5):
        steps = sum((chain.noised(i)[:, x0] * chain.losses(i)[:, x0]).sum() for i in (1, 2, 3))
        assert float(steps) == pytest.approx(chain.bound(x0), rel=1e-10)


def test_d3pms_divergence_keeps_its_digits_and_tends_to_cross_entropy():
    """Against extended precision, for short steps, little noise and a network that is nearly certain."""
    z = torch.randn(6, 30, dtype=torch.float64)
    z[3:, 7] += 30
    xt, x0 = torch.tensor([7, 2, 9, 7, 2, 9]), torch.full((6,), 7)
    for sigma, before in ((1e-6, 5e-7), (1.0, 0.999999), (3.0, 1e-9), (40.0, 39.0)):
        sigmas, leaf = (f64([sigma] * 6), f64([before] * 6)), z.clone().requires_grad_()
        got = reference.d3pm_uniform(leaf, *sigmas, xt, x0)
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        expected = exact.d3pm_uniform(*(x.numpy().astype(exact.EXTENDED) for x in (z, *sigmas)), xt.numpy(), x0.numpy())
        np.testing.assert_allclose(got.detach().numpy(), expected.loss.astype(float), rtol=1e-9, atol=1e-18)
        error, size = abs(grad.numpy() - expected.grad), abs(expected.grad).max(1, keepdims=True)
        assert (error <= 1e-11 * size + 1e-24).all(), (sigma, (error / size).max(1))
    last = reference.d3pm_uniform(z, f64([0.3] * 6), f64([0.0] * 6), xt, x0, 0.5)
    torch.testing.assert_close(last, 1.5 * reference.dce(z, x0, x0 == x0, None))


@pytest.mark.parametrize("share", [0.3, 1.0, 1e-9])
def test_mixture_is_gidds_divergences(share):
    """From the two laws of x_t as they stand, x_t and x0 anywhere but x0 at the mask."""
    xt, x0 = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(4), indexing="ij"))
    z, sigma = torch.randn(20, 5, dtype=torch.float64), torch.full((20,), 0.7, dtype=torch.float64)
    alpha, mask = math.exp(-0.7), torch.eye(5, dtype=torch.float64)[M]
    noise = (1 - alpha) * (share * (1 - mask) / 4 + (1 - share) * mask)
    c = torch.softmax(z.masked_fill(mask.bool(), -torch.inf), -1)
    q, p = (alpha * law + noise for law in (torch.eye(5, dtype=torch.float64)[x0], c))
    ratio = (q / p).gather(-1, xt[:, None])[:, 0]
    ratio[xt == M] = 1  # also where neither has any
    expected = torch.special.xlogy(q, q / p).nan_to_num().sum(-1) + ratio - 1 - ratio.log()
    got = reference.mixture(z, sigma, torch.full_like(sigma, share), xt, x0, M)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12)


def test_mixture_without_uniform_noise_is_masked_cross_entropy():
    z, x0, sigma = torch.randn(4, 5, dtype=torch.float64), torch.arange(4), torch.full((4,), 0.7, dtype=torch.float64)
    got = reference.mixture(z, sigma, 0 * sigma, torch.full((4,), M), x0, M)
    torch.testing.assert_close(got, math.exp(-0.7) * reference.dce(z, x0, x0 == x0, M))
    near = reference.mixture(z, sigma, 0 * sigma + 1e-13, torch.full((4,), M), x0, M)
    torch.testing.assert_close(got, near, rtol=1e-9, atol=0)


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
