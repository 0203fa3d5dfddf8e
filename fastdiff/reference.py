"""The specification: every formula once, in float64 PyTorch, with no care for speed.

Rows are the last dimension: `logits` and `log_score` are [..., V], tokens and sigma [...]. Everything is
differentiable by autograd, and every other backend is tested against this file. Losses are in nats.

Score entropy: Lou, Meng, Ermon, ICML 2024. Time-free likelihood: Jeon, Shin, Jeon, No, NeurIPS 2025.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------
# 1. Forward process. Column convention: dp/dt = dsigma Q p.


def transition(graph: str, i: Tensor, sigma: Tensor, num_states: int, mask_index: int | None) -> Tensor:
    """The column p(x_t = . | x_0 = i) = exp(sigma Q)(., i): [...] tokens -> [..., num_states]."""
    alpha = torch.exp(-sigma.double()).unsqueeze(-1)
    stay = F.one_hot(i, num_states).double()
    if graph == "uniform":
        return alpha * stay + (1 - alpha) / num_states
    return alpha * stay + (1 - alpha) * F.one_hot(torch.full_like(i, _index(mask_index)), num_states)


def transp_transition(graph: str, i: Tensor, sigma: Tensor, num_states: int, mask_index: int | None) -> Tensor:
    """The row p(x_t = i | x_0 = .) = exp(sigma Q)(i, .): [...] tokens -> [..., num_states]."""
    if graph == "uniform":
        return transition(graph, i, sigma, num_states, mask_index)
    alpha = torch.exp(-sigma.double()).unsqueeze(-1)
    came = torch.eq(i, _index(mask_index)).unsqueeze(-1) * (1 - alpha)
    return alpha * F.one_hot(i, num_states) + came


def mixture_limit(share: Tensor, num_states: int, mask_index: int) -> Tensor:
    """Mixture noise at infinite sigma, [...] -> [..., V]: a share uniform over N = V - 1 ids, the rest the mask."""
    share = share.double().unsqueeze(-1)
    mask = F.one_hot(torch.tensor(mask_index, device=share.device), num_states)
    return (1 - share) * mask + share / (num_states - 1) * (1 - mask)


def mixture_transition(i: Tensor, sigma: Tensor, share: Tensor, num_states: int, mask_index: int) -> Tensor:
    """The column p(x_t = . | x_0 = i) of mixture noise: [...] tokens -> [..., num_states]."""
    alpha = torch.exp(-sigma.double()).unsqueeze(-1)
    return alpha * F.one_hot(i, num_states) + (1 - alpha) * mixture_limit(share, num_states, mask_index)


def reverse_rate(graph: str, i: Tensor, score: Tensor, mask_index: int | None) -> Tensor:
    """Rates of leaving i in reverse time, Q(i, y) score_y off the diagonal, for dsigma = 1: [..., V]."""
    score = score.double()
    leaving = 1 / score.shape[-1] if graph == "uniform" else torch.eq(i, _index(mask_index)).unsqueeze(-1)
    rate = score * leaving
    rate = rate.scatter(-1, i.unsqueeze(-1), 0)
    return rate.scatter(-1, i.unsqueeze(-1), -rate.sum(-1, keepdim=True))


def staggered_score(graph: str, score: Tensor, dsigma: Tensor, mask_index: int | None) -> Tensor:
    """exp(-dsigma Q) score: the score seen from dsigma less noise, [..., V]."""
    score, grow = score.double(), torch.exp(dsigma.double()).unsqueeze(-1)
    spread = (1 - grow) * score.sum(-1, keepdim=True)
    if graph == "uniform":
        return grow * score + spread / score.shape[-1]
    at_mask = torch.zeros_like(score).index_fill(-1, torch.tensor(_index(mask_index), device=score.device), 1)
    return grow * score + spread * at_mask


# ---------------------------------------------------------------------------------------------------------
# 2. Losses. Each is a function of one row and a few scalars; unscored rows are 0.


def dce(
    logits: Tensor,
    x0: Tensor,
    scored: Tensor,
    mask_index: int | None,
    z_loss: float = 0.0,
    sigma: Tensor | None = None,
) -> Tensor:
    """Masked cross-entropy, logsumexp_v z_v - z_x0 + z_loss logsumexp_v^2 over v != mask_index (None: over all v).

    With sigma it is divided by e1, and so the score entropy of the conditionals softmax(z).
    """
    z = _without_mask(logits, mask_index)
    loss = _nll(z, torch.where(scored, x0, 0))
    if z_loss:
        top = z.detach().amax(-1, keepdim=True)  # torch.logsumexp's gradient loses the sum beside a large one
        loss = loss + z_loss * (top + (z - top).exp().sum(-1, keepdim=True).log()).squeeze(-1) ** 2
    if sigma is not None:
        loss = loss * _noise(sigma.double())[1]
    return torch.where(scored, loss, 0)


def dce_stats(logits: Tensor, x0: Tensor, mask_index: int | None) -> Tensor:
    """The log-sum-exp, the entropy -sum_v p_v log p_v, whether x0 is the argmax (1 or 0), and -log p_x0: [4, ...]."""
    z = _without_mask(logits, mask_index)
    log_p = torch.log_softmax(z, -1)
    entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)
    return torch.stack([torch.logsumexp(z, -1), entropy, (z.argmax(-1) == x0).double(), _nll(z, x0)])


def _nll(z: Tensor, x0: Tensor) -> Tensor:
    """-log softmax(z)_x0, with its digits where it is close to 0: then 1 is not added to the sum of the others."""
    index = x0.unsqueeze(-1)
    at_x0, top = z.gather(-1, index), z.detach().amax(-1, keepdim=True)
    largest = (at_x0 == top) & top.isfinite()
    others = torch.where(largest, z - at_x0, -torch.inf).scatter(-1, index, -torch.inf)
    loss = F.cross_entropy(z.flatten(0, -2), x0.flatten(), reduction="none").view(x0.shape)
    return torch.where(largest.squeeze(-1), others.exp().sum(-1).log1p(), loss)


def dse_absorb(log_score: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor, mask_index: int) -> Tensor:
    """Score entropy of the absorbing graph at x_t = M, with e1 = expm1(sigma):

    sum_{y != M, x0} exp(s_y) + (1/e1) phi(s_x0 + log e1), which is
    sum_{y != M} exp(s_y) - s_x0 / e1 + (1/e1) (log(1/e1) - 1) without its cancellation.
    """
    s, scored = log_score.double(), xt == mask_index
    _, inv_e1, log_e1 = _noise(torch.where(scored, sigma.double(), 1))
    x0 = torch.where(scored, x0, 0).unsqueeze(-1)
    others = s.index_fill(-1, torch.tensor(mask_index, device=s.device), -torch.inf).scatter(-1, x0, -torch.inf)
    at_x0 = s.gather(-1, x0).squeeze(-1)
    loss = torch.exp(others).sum(-1) + inv_e1 * phi(at_x0 + log_e1)
    return torch.where(scored, loss, 0)


def dse_uniform(log_score: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """Score entropy of the uniform graph, (1/N) sum_{y != xt} a_y phi(s_y - log a_y).

    a_y is the ratio p(y | x0) / p(xt | x0): r everywhere if xt = x0, else 1 and 1/r at x0, with
    r = e1 / (e1 + N) and e1 = expm1(sigma). Where a = 0 (sigma = 0, nothing moved) the term is exp(s_y).
    """
    s, log_a = log_score.double().scatter(-1, xt.unsqueeze(-1), 0), _log_ratio(log_score, sigma, xt, x0)
    still = log_a == -torch.inf
    safe = torch.where(still, 0, log_a)
    terms = torch.where(still, torch.exp(torch.where(still, s, 0)), torch.exp(safe) * phi(s - safe))
    return terms.scatter(-1, xt.unsqueeze(-1), 0).sum(-1) / log_score.shape[-1]


def _log_ratio(log_score: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """log a_y of the uniform graph, [..., V]."""
    n, moved, sigma = log_score.shape[-1], (xt != x0).unsqueeze(-1), sigma.double().expand(xt.shape)
    log_r = -torch.log1p(n * torch.exp(-sigma) / -torch.expm1(-sigma)).unsqueeze(-1)
    at_x0 = F.one_hot(x0, n).bool() & moved
    return torch.where(at_x0, -log_r, torch.where(moved, 0, log_r))


def dse_uniform_logits(logits: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """Score entropy of the uniform graph at the score that conditionals c = softmax(logits) imply (Duo's NELBO):

    p_t(y) is proportional to 1 + k c_y with k = N / expm1(sigma), so the log score is log(1 + k c_y) - log(1 + k c_xt).
    """
    _, inv_e1, _ = _noise(sigma.double())
    log_p = torch.log1p(logits.shape[-1] * inv_e1.unsqueeze(-1) * torch.softmax(logits.double(), -1))
    return dse_uniform(log_p - log_p.gather(-1, xt.unsqueeze(-1)), sigma, xt, x0)


def csm_absorb(log_score: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor, mask_index: int) -> Tensor:
    """Concrete score matching at x_t = M, (1/2) sum_{y != M} (exp(s_y) - a_y)^2 with a = 1/e1 at x0 and 0 elsewhere."""
    s, scored = log_score.double(), xt == mask_index
    _, _, log_e1 = _noise(torch.where(scored, sigma.double(), 1))
    x0 = torch.where(scored, x0, 0).unsqueeze(-1)
    others = s.index_fill(-1, torch.tensor(mask_index, device=s.device), -torch.inf).scatter(-1, x0, -torch.inf)
    at_x0 = _distance(s.gather(-1, x0).squeeze(-1), -log_e1)
    return torch.where(scored, (torch.exp(2 * others).sum(-1) + at_x0**2) / 2, 0)


def csm_uniform(log_score: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """Concrete score matching, (1/2) sum_{y != x_t} (exp(s_y) - a_y)^2, with the ratios a_y of `dse_uniform`."""
    s, log_a = log_score.double().scatter(-1, xt.unsqueeze(-1), 0), _log_ratio(log_score, sigma, xt, x0)
    return _distance(s, log_a).scatter(-1, xt.unsqueeze(-1), 0).square().sum(-1) / 2


def _distance(s: Tensor, log_a: Tensor) -> Tensor:
    """exp(s) - a, with its digits where the two are close."""
    d = s - log_a
    near = d.abs() < 0.5
    return torch.where(near, torch.exp(log_a) * torch.expm1(torch.where(near, d, 0)), torch.exp(s) - torch.exp(log_a))


def leave_one_out(logits: Tensor, sigma: Tensor, xt: Tensor) -> Tensor:
    """Logits of the clean token given all others and x_t, from those given all others alone, over N ids noised
    uniformly: log(1 + N / e1), by which x_t tells its own id from the rest, is added at x_t."""
    delta = torch.log1p(logits.shape[-1] * _noise(sigma.double())[1])
    return logits.double().scatter_add(-1, xt.unsqueeze(-1), delta.expand(xt.shape).unsqueeze(-1))


def d3pm_uniform(
    logits: Tensor, sigma: Tensor, sigma_s: Tensor, xt: Tensor, x0: Tensor, auxiliary: float = 0.0
) -> Tensor:
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)) of uniform noise from sigma_s < sigma, plus auxiliary (-log c_x0).

    q(y) = q(x_t | y) q(y | x0) / q(x_t | x0), and p has the mixture of q(y | x0) under c = softmax(logits) in the place
    of x0, both in y and in the normaliser. Both sum to 1, so the divergence is sum_y q_y phi(log(p_y / q_y)), with
        p_y / q_y = (1 + k_s c_y) / (1 + k_s 1[y = x0]) (1 + k_t 1[x_t = x0]) / (1 + k_t c_xt), k = N / e1.
    Where sigma_s = 0 it is -log c_x0.
    """
    n, last, moved = logits.shape[-1], sigma_s == 0, (xt != x0).unsqueeze(-1)
    sigma, sigma_s = sigma.double(), torch.where(last, sigma / 2, sigma_s).double()
    (o_t, inv_t, _), (o_s, inv_s, _), (o_ts, inv_ts, _) = (
        [x.unsqueeze(-1) for x in _noise(s)] for s in (sigma, sigma_s, sigma - sigma_s)
    )
    k_t, k_s, k_ts = n * inv_t, n * inv_s, n * inv_ts
    here, there = F.one_hot(x0, n).bool(), F.one_hot(xt, n).bool()
    c = torch.softmax(logits.double(), -1)
    c_xt, rest = c.gather(-1, xt.unsqueeze(-1)), torch.where(here, 0, c).sum(-1, keepdim=True)
    log_ratio = torch.where(here, _log_mixed(k_s, c, rest), torch.log1p(k_s * c))
    log_ratio = log_ratio - torch.where(moved, torch.log1p(k_t * c_xt), _log_mixed(k_t, c_xt, rest))
    # q is a product of three (1 - alpha) / n, times 1 + k where its two ids are one.
    q = o_ts * o_s / (n * o_t) * torch.where(there, 1 + k_ts, 1) * torch.where(here, 1 + k_s, 1)
    nll = _nll(logits.double(), x0)
    kl = (torch.where(moved, q, q / (1 + k_t)) * phi(log_ratio)).sum(-1)
    return torch.where(last, nll, kl) + auxiliary * nll


def _log_mixed(k: Tensor, c: Tensor, rest: Tensor) -> Tensor:
    """log((1 + k c) / (1 + k)), where rest = 1 - c."""
    near = rest < 0.5
    return torch.where(
        near, torch.log1p(-k / (1 + k) * torch.where(near, rest, 0)), torch.log1p(k * c) - torch.log1p(k)
    )


def mixture(logits: Tensor, sigma: Tensor, share: Tensor, xt: Tensor, x0: Tensor, mask_index: int) -> Tensor:
    """GIDD's KL(q_t(. | x0) || q_t(. | c)) + IS(x_t), where a share of the noise is uniform over the N other ids and
    the rest is the mask: with alpha = exp(-sigma) and B = (1 - alpha) share / N

    q_t(y | x0) = alpha 1[y = x0] + B, q_t(M | x0) = (1 - alpha) (1 - share),

    and q_t(. | c) its mean under c = softmax of the logits but the mask's. Both sum to 1, so the divergence is
    sum_y q_y phi(log rho_y), rho = q_t(y | c) / q_t(y | x0). IS = phi(-log rho_xt), which is 0 at the mask.
    """
    n, z = logits.shape[-1] - 1, _without_mask(logits, mask_index)
    o, alpha = -torch.expm1(-sigma.double()).unsqueeze(-1), torch.exp(-sigma.double()).unsqueeze(-1)
    spread = o * share.double().unsqueeze(-1) / n  # B
    only_masks, here, c = spread == 0, F.one_hot(x0, n + 1).bool(), torch.softmax(z, -1)
    k = alpha / torch.where(only_masks, 1, spread)
    rest = torch.where(here, 0, c).sum(-1, keepdim=True)
    log_rho = torch.where(here, _log_mixed(k, c, rest), torch.log1p(k * c))
    log_rho = torch.where(only_masks & here, -_nll(z, x0).unsqueeze(-1), log_rho)
    q = torch.where(here, alpha + spread, spread)
    kl = torch.where(only_masks & ~here, alpha * c, q * phi(log_rho)).sum(-1)
    return kl + torch.where(xt == mask_index, 0, phi(-log_rho.gather(-1, xt.unsqueeze(-1)).squeeze(-1)))


def distill(z: Tensor, teacher: Tensor, ids: Tensor | None, mask_index: int | None, reverse: bool) -> Tensor:
    """KL(p || q), or KL(q || p) if reverse, of q = softmax(z) and p = softmax(teacher) over v != mask_index.

    With ids [..., k] the teacher holds log p at those ids, and all other ids count as one. A sum of p that is off by
    rounding, above 1 or where there are no others, is divided by.
    """
    log_q = torch.log_softmax(_without_mask(z, mask_index), -1)
    if ids is None:
        log_p = torch.log_softmax(_without_mask(teacher, mask_index), -1)
    else:
        total = teacher.double().exp().sum(-1, keepdim=True)
        are_all = ids.shape[-1] == z.shape[-1] - (mask_index is not None)
        log_p = teacher.double() - (total if are_all else total.clamp_min(1)).log()
        rest = (1 - (torch.ones_like(total) if are_all else total)).clamp_min(0).log()
        others = log_q.scatter(-1, ids, -torch.inf)
        none = torch.isneginf(others).all(-1, keepdim=True)
        others = torch.logsumexp(torch.where(none, 0, others), -1, keepdim=True)
        log_p = torch.cat([log_p, rest], -1)
        log_q = torch.cat([log_q.gather(-1, ids), torch.where(none, -torch.inf, others)], -1)
    return kl(log_q, log_p) if reverse else kl(log_p, log_q)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p phi(log q - log p) for numbers that sum to 1: no term is negative, none cancels another.

    A term is q - p - p (log q - log p): q where p is 0, infinite where only q is.
    """
    d = log_q - log_p
    absent, apart = torch.isneginf(log_p), torch.isneginf(log_q)
    d = torch.where(absent | apart, 0, d)
    p, q = torch.exp(log_p), torch.exp(log_q)
    near = d.abs() < 1
    terms = torch.where(near, p * phi(torch.where(near, d, 0)), q - p - p * d)
    terms = torch.where(absent, q, torch.where(apart, torch.inf, terms))
    return terms.sum(-1)


def phi(d: Tensor) -> Tensor:
    """expm1(d) - d >= 0, by its Taylor series near 0 where the difference cancels."""
    near = d.abs() < 1e-2
    t = torch.where(near, d, 0)
    series = t * t * (1 / 2 + t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t / 720))))
    far = torch.where(near, 1, d)
    return torch.where(near, series, torch.expm1(far) - far)


def log_score_from_logits(logits: Tensor, sigma: Tensor, mask_index: int) -> Tensor:
    """Absorbing log score of the conditionals c = softmax over v != M: log c_v - log e1, and 0 at M."""
    z = logits.double()
    at_mask = torch.tensor(mask_index, device=z.device)
    log_c = torch.log_softmax(z.index_fill(-1, at_mask, -torch.inf), -1)
    return (log_c - _noise(sigma.double())[2].unsqueeze(-1)).index_fill(-1, at_mask, 0)


def scale_by_sigma(out: Tensor, sigma: Tensor, xt: Tensor) -> Tensor:
    """SEDD's tail: log score = out - log e1 - log(V - 1), and 0 at x_t."""
    return (out.double() - sigma_shift(sigma, out.shape[-1]).unsqueeze(-1)).scatter(-1, xt.unsqueeze(-1), 0)


def sigma_shift(sigma: Tensor, num_states: int) -> Tensor:
    """log e1 + log(V - 1)."""
    return _noise(sigma.double())[2] + math.log(num_states - 1)


# ---------------------------------------------------------------------------------------------------------
# 3. Time-free likelihood: NLL(x0) = sum_m E_{|S| = m} [(1/m) sum_{i in S} -log c(x0_i | x0 with S masked)].


def subsets(length: int) -> tuple[Tensor, Tensor]:
    """All non-empty masks, bool [2^L - 1, L], and their weights 1 / (m C(L, m)) on the summed loss."""
    codes = torch.arange(1, 2**length, device="cpu")
    masks = (codes.unsqueeze(1) >> torch.arange(length, device="cpu")) & 1 == 1
    return masks, subset_weight(torch.full_like(codes, length), masks.sum(1))


def subset_weight(length: Tensor, m: Tensor) -> Tensor:
    """1 / (m C(L, m)), float64: what the summed loss of one subset of m >= 1 among L tokens counts for."""
    size = int(length.max()) + 1
    table = [[j * math.comb(i, j) for j in range(size)] for i in range(size)]
    return 1 / torch.tensor(table, dtype=torch.float64, device=length.device)[length, m]


def count_law(length: int, proposal: str) -> Tensor:
    """q(m) for m = 1..L, float64: 1/(m H_L) for "harmonic", 1/L for "uniform". The weight is 1/(m q(m))."""
    m = torch.arange(1, length + 1, dtype=torch.float64, device="cpu")
    return (1 / m) / (1 / m).sum() if proposal == "harmonic" else torch.full_like(m, 1 / length)


# ---------------------------------------------------------------------------------------------------------
# 4. Reverse process, from noise sigma_t to sigma_s < sigma_t.


def reverse_step(
    graph: str, log_score: Tensor, xt: Tensor, sigma_t: Tensor, sigma_s: Tensor, mask_index: int | None
) -> Tensor:
    """Tweedie's p(x_s | x_t), proportional to (exp(-dS Q) score)_y exp(dS Q)(x_t, y): [..., V].

    A learned score can make entries negative: they are clamped at 0 before normalising.
    """
    d_sigma = sigma_t.double() - sigma_s.double()
    stagger = staggered_score(graph, torch.exp(log_score.double()), d_sigma, mask_index)
    probs = stagger * transp_transition(graph, xt, d_sigma, log_score.shape[-1], mask_index)
    probs = probs.clamp_min(0)
    return probs / probs.sum(-1, keepdim=True)


def absorb_reverse_step(logits: Tensor, xt: Tensor, sigma_t: Tensor, sigma_s: Tensor, mask_index: int) -> Tensor:
    """The absorbing p(x_s | x_t) from conditionals: a mask stays with (1-alpha_s)/(1-alpha_t), else c."""
    z = logits.double()
    at_mask = torch.tensor(mask_index, device=z.device)
    stay = (torch.expm1(-sigma_s.double()) / torch.expm1(-sigma_t.double())).unsqueeze(-1)
    c = torch.softmax(z.index_fill(-1, at_mask, -torch.inf), -1)
    mask = torch.zeros_like(z).index_fill(-1, at_mask, 1)
    probs = stay * mask + (1 - stay) * c
    return torch.where((xt == mask_index).unsqueeze(-1), probs, F.one_hot(xt, z.shape[-1]).double())


def mixture_reverse_step(
    logits: Tensor, xt: Tensor, sigma_t: Tensor, share_t: Tensor, sigma_s: Tensor, share_s: Tensor, mask_index: int
) -> Tensor:
    """p(x_s | x_t) of mixture noise, proportional to q(x_t | y) q_s(y | c): [..., V].

    c = softmax over y != M is the law of x_0 before x_t at this position is looked at. Between s and t a token survives
    with a = alpha_t / alpha_s and else becomes y with probability b_y = q_t(y) - a q_s(y), q the noise alone.
    """
    z, num_states = _without_mask(logits, mask_index), logits.shape[-1]
    (alpha_t, noise_t), (alpha_s, noise_s) = (
        (torch.exp(-s).unsqueeze(-1), -torch.expm1(-s).unsqueeze(-1) * mixture_limit(share, num_states, mask_index))
        for s, share in ((sigma_t.double(), share_t), (sigma_s.double(), share_s))
    )
    here, a = xt.unsqueeze(-1), alpha_t / alpha_s
    came = (noise_t - a * noise_s).expand(z.shape).gather(-1, here) + a * F.one_hot(xt, num_states)
    probs = came * (alpha_s * torch.softmax(z, -1) + noise_s)
    return probs / probs.sum(-1, keepdim=True)


def euler_step(graph: str, log_score: Tensor, xt: Tensor, step_size: Tensor, mask_index: int | None) -> Tensor:
    """delta + step_size Qbar, with step_size = dt dsigma: [..., V], clamped at 0 and normalised."""
    rate = reverse_rate(graph, xt, torch.exp(log_score.double()), mask_index)
    probs = (F.one_hot(xt, rate.shape[-1]) + step_size.double().unsqueeze(-1) * rate).clamp_min(0)
    return probs / probs.sum(-1, keepdim=True)


def reverse_weights(z: Tensor, xt: Tensor, law: Tensor) -> Tensor:
    """What every reverse step above is, before it is normalised, with law = (theta, kappa, lam, log_here) [..., 4]:

    (e_y - theta T)+ for y != x_t and (kappa e_xt - lam T)+ for x_t, where e = exp(z), T = sum_y e_y, and log_here
    stands for z at x_t unless it is NaN. Rows are scaled by a number of their own.
    """
    theta, kappa, lam, log_here = law.double().unsqueeze(-2).unbind(-1)
    here = xt.unsqueeze(-1)
    z = z.double().scatter(-1, here, torch.where(log_here.isnan(), z.double().gather(-1, here), log_here))
    e = torch.exp(z - z.amax(-1, keepdim=True))
    total = e.sum(-1, keepdim=True)
    stay = kappa * e.gather(-1, here) - lam * total
    return (e - theta * total).scatter(-1, here, stay).clamp_min(0)


def kept_logits(z: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """z / temperature where it is at least the top_k-th largest (0: all) and, of those, in the smallest set of largest
    ones with probability >= top_p; -inf elsewhere. Ties stay together. Temperature 0 keeps the first of the largest."""
    z = z.double()
    if temperature == 0:
        return torch.full_like(z, -torch.inf).scatter(-1, z.argmax(-1, keepdim=True), 0)
    z = z / temperature
    if 0 < top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(top_k, -1).values[..., -1:], -torch.inf)
    if top_p < 1:
        ranked = z.sort(-1, descending=True).values
        before = torch.softmax(ranked, -1).cumsum(-1) - torch.softmax(ranked, -1)
        least = ranked.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
        z = z.masked_fill(z < least, -torch.inf)
    return z


def race(log_w: Tensor, draws: Tensor) -> Tensor:
    """An id v with probability w_v / sum w, by two exponential races from unsigned 32-bit draws [..., 1 + J, C].

    Ids with the same v mod C are a class. Classes race first, argmin E / (sum of their w), with draws[..., 0, :]; then
    the J ids of the winner, id v with draws[..., 1 + v // C, v % C]. Where V <= C that is one race of all ids. Ties go
    to the lowest.
    """
    classes = draws.shape[-1]
    log_w = F.pad(log_w.double(), (0, -log_w.shape[-1] % classes), value=-torch.inf).unflatten(-1, (-1, classes))
    log_e = exponential(draws).log()
    first = torch.argmin(log_e[..., 0, :] - torch.logsumexp(log_w, -2), -1)
    at = first[..., None, None].expand(*log_w.shape[:-1], 1)
    member = torch.argmin((log_e[..., 1:, :].gather(-1, at) - log_w.gather(-1, at)).squeeze(-1), -1)
    return member * classes + first


def exponential(draws: Tensor) -> Tensor:
    """-log of a uniform, from whichever end of (0, 1) keeps its digits."""
    u = (torch.where(draws < 2**31, draws, 2**32 - 1 - draws).double() + 0.5) * 2.0**-32
    return torch.where(draws < 2**31, -torch.log1p(-u), -torch.log(u))


# ---------------------------------------------------------------------------------------------------------


def _noise(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """o = 1 - alpha, 1/e1 = alpha/o and log e1 = sigma + log o, never forming e1 = expm1(sigma)."""
    o = -torch.expm1(-sigma)
    return o, torch.exp(-sigma) / o, sigma + torch.log(o)


def _without_mask(logits: Tensor, mask_index: int | None) -> Tensor:
    z = logits.double()
    return z if mask_index is None else z.index_fill(-1, torch.tensor(mask_index, device=z.device), -torch.inf)


def _index(mask_index: int | None) -> int:
    if mask_index is None:
        raise ValueError("mask_index: expected an integer for the absorbing graph, got None")
    return mask_index
