"""Losses, gradients and reverse steps from their definitions, in numpy's extended precision, apart from the package.

Nothing is rearranged: 64 bits of significand and 15 of exponent survive what the published sums cancel. Rows are
z [R, V]; tokens, sigma and steps [R]; scores and probabilities [R, V]. A loss and a gradient come with their sizes, by
which a relative error of what they are made of is multiplied.
"""

from typing import NamedTuple

import numpy as np

EXTENDED = np.longdouble


class Loss(NamedTuple):
    loss: np.ndarray  # [R]
    grad: np.ndarray  # [R, V]
    loss_size: np.ndarray  # [R]
    grad_size: np.ndarray  # [R, V], or [R, 1]

    def times(self, factor):
        """All of it for rows that count for so much, [R] >= 0."""
        return Loss(*(x * (factor if x.ndim == 1 else factor[:, None]) for x in self))


def at(x, ids):
    """The numbers of some ids, [R, 1]."""
    return np.take_along_axis(x, ids[:, None], 1)


def is_id(x, ids):
    """Where in x an id is, bool [R, V]."""
    return np.arange(x.shape[1]) == ids[:, None]


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def survival(sigma):
    """alpha = exp(-sigma) and 1 - alpha, [R, 1]."""
    return np.exp(-sigma)[:, None], -np.expm1(-sigma)[:, None]


def sigma_shift(sigma, num_states):
    """log expm1(sigma) + log(V - 1), what SEDD's tail takes off, [R, 1]."""
    return sigma[:, None] + np.log(survival(sigma)[1]) + np.log(EXTENDED(num_states - 1))


# ---------------------------------------------------------------------------------------------------------
# Losses.


def nll_of(z, x0):
    """-log softmax(z)_x0, [R, 1]; of a sum that is 1 but for x0's, even these digits would be too few."""
    top = z.max(1, keepdims=True)
    e = np.exp(z - top)
    rest = np.where(is_id(z, x0), 0, e).sum(1, keepdims=True)
    certain = (at(z, x0) == top) & np.isfinite(top)
    return np.where(certain, np.log1p(rest), np.log(e.sum(1, keepdims=True)) - (at(z, x0) - top))


def dce(z, x0, excluded, z_loss):
    """-log softmax(z)_x0 + z_loss logsumexp(z)^2 over the ids that are not excluded (-1: all)."""
    left_out = is_id(z, excluded)
    z = np.where(left_out, -np.inf, z)
    top = z.max(1, keepdims=True)
    log_sum = np.log(np.exp(z - top).sum(1, keepdims=True))
    nll = nll_of(z, x0)
    drift = top + log_sum if z_loss else np.zeros_like(top)
    slope = 1 + 2 * z_loss * drift
    p = np.exp(z - top - log_sum)
    grad = np.where(left_out, 0, p * slope - is_id(z, x0))
    size = abs(nll) + z_loss * abs(drift) * (1 + abs(drift))
    grad_size = (abs(grad) + p * abs(slope)).max(1, keepdims=True)
    return Loss((nll + z_loss * drift**2)[:, 0], grad, size[:, 0], grad_size)


def dce_stats(z, x0, excluded):
    """The same rows' log-sum-exp, entropy, whether x0 is the argmax, and -log softmax(z)_x0, [4, R]."""
    z = np.where(is_id(z, excluded), -np.inf, z)
    top = z.max(1, keepdims=True)
    log_sum = np.log(np.exp(z - top).sum(1, keepdims=True))
    log_p = z - top - log_sum
    entropy = -np.where(log_p == -np.inf, 0, np.exp(log_p) * log_p).sum(1)
    return np.stack([(top + log_sum)[:, 0], entropy, z.argmax(1) == x0, nll_of(z, x0)[:, 0]])


def logps(z, x0, excluded, of_logp, of_entropy):
    """of_logp log softmax(z)_x0 + of_entropy H, H = -sum p log p, both [R], over the ids that are not excluded."""
    left_out = is_id(z, excluded)
    z = np.where(left_out, -np.inf, z)
    log_p = z - z.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p, of_logp, of_entropy = np.exp(log_p), of_logp[:, None], of_entropy[:, None]
    surprise = np.where(p == 0, 0, p * -log_p)
    entropy = surprise.sum(1, keepdims=True)
    grad = of_logp * (is_id(z, x0) - p) - of_entropy * (p * entropy - surprise)
    size = abs(of_logp) * (p + is_id(z, x0) * (1 - p)) + abs(of_entropy) * (p * (1 + entropy) + surprise)
    parts = [np.where(f == 0, 0, f * x) for f, x in ((of_logp, -nll_of(z, x0)), (of_entropy, entropy))]
    loss, loss_size = sum(parts), sum(map(abs, parts)) + abs(of_entropy)
    return Loss(loss[:, 0], np.where(left_out, 0, grad), loss_size[:, 0], size.max(1, keepdims=True))


def dse(score, log_score, ratio, excluded, rate, rounded=0.0):
    """rate sum_y s_y - a_y log s_y + a_y (log a_y - 1) over y != excluded, and its derivative for log s.

    a is the ratio p(y | x0) / p(x_t | x0). Its logarithm may be rounded, and so may what comes to log s.
    """
    counts, left_out = ratio > 0, is_id(score, excluded)
    log_ratio = np.log(np.where(counts, ratio, 1))
    value = score + np.where(counts, ratio * (log_ratio - 1 - np.where(counts, log_score, 0)), 0)
    slope = score - ratio
    value, slope, ratio, score = (np.where(left_out, 0, rate * x) for x in (value, slope, ratio, score))
    size = abs(value) + abs(slope) * (1 + abs(log_ratio) + rounded) + 1e-6 * ratio
    grad_size = (score + ratio) * (1 + abs(log_ratio) + rounded)
    return Loss(value.sum(1), slope, size.sum(1), grad_size)


def uniform_ratio(z, sigma, xt, x0):
    alpha, moved = survival(sigma)
    p = alpha * is_id(z, x0) + moved / z.shape[1]
    return p / at(p, xt)


def dse_absorb(z, sigma, x0, mask_index, shift):
    """Of the scores exp(z - shift), [R, 1], at x_t = mask_index."""
    alpha, moved = survival(sigma)
    s = z - shift
    return dse(np.exp(s), s, alpha / moved * is_id(z, x0), np.full_like(x0, mask_index), EXTENDED(1), abs(shift))


def dse_uniform(z, sigma, xt, x0, shift):
    s = z - shift
    return dse(np.exp(s), s, uniform_ratio(z, sigma, xt, x0), xt, 1 / EXTENDED(z.shape[1]), abs(shift))


def noised(c, sigma):
    """p_t of the uniform graph, if p_0 is c."""
    alpha, moved = survival(sigma)
    return alpha * c + moved / c.shape[1]


def dse_uniform_logits(z, sigma, xt, x0):
    """Of the scores p_t(y) / p_t(x_t), p_0 = softmax(z)."""
    c, rate, here = softmax(z), 1 / EXTENDED(z.shape[1]), is_id(z, xt)
    q = noised(c, sigma)
    score = q / at(q, xt)
    of_score = dse(score, np.log(score), uniform_ratio(z, sigma, xt, x0), xt, rate)
    pull = np.where(here, -of_score.grad.sum(1, keepdims=True), of_score.grad) * survival(sigma)[0] / q  # for c
    unit = rate * survival(sigma)[0] / at(q, xt)
    size = c * (unit + abs(pull) + (c * abs(pull)).sum(1, keepdims=True))
    grad = c * (pull - (c * pull).sum(1, keepdims=True))
    return Loss(of_score.loss, grad, of_score.loss_size, size.max(1, keepdims=True))


def csm(score, ratio, excluded, rounded=0.0):
    """(1/2) sum_y (s_y - a_y)^2 over y != excluded, and its derivative for log s, as `dse`."""
    left_out = is_id(score, excluded)
    log_ratio = np.log(np.where(ratio > 0, ratio, 1))
    off, score, ratio = (np.where(left_out, 0, x) for x in (score - ratio, score, ratio))
    slipped = (score + ratio) * (1 + abs(log_ratio) + rounded)
    grad_size = abs(off) * score * (1 + rounded) + score * slipped
    return Loss((off**2).sum(1) / 2, off * score, (abs(off) * slipped).sum(1), grad_size)


def csm_absorb(z, sigma, x0, mask_index, shift):
    alpha, moved = survival(sigma)
    return csm(np.exp(z - shift), alpha / moved * is_id(z, x0), np.full_like(x0, mask_index), abs(shift))


def csm_uniform(z, sigma, xt, x0, shift):
    return csm(np.exp(z - shift), uniform_ratio(z, sigma, xt, x0), xt, abs(shift))


def loo(z, sigma, xt, x0, z_loss):
    """Cross-entropy over all ids once log(1 + N alpha / (1 - alpha)) is added at x_t."""
    alpha, moved = survival(sigma)
    delta = np.log1p(z.shape[1] * alpha / moved)
    found = dce(z + is_id(z, xt) * delta, x0, np.full_like(x0, -1), z_loss)
    return found._replace(loss_size=found.loss_size + 1e-6 * delta[:, 0])


def divergence(c, q, p, of_c):
    """sum q log(q / p) + p - q, its derivative for z through p' = of_c for c = softmax(z), and their sizes."""
    ratio = np.where(p > 0, q, 1) / np.where(p > 0, p, 1)
    value, pull = p - q + q * np.log(np.where(q > 0, ratio, 1)), of_c * (1 - ratio)
    grad = c * (pull - (c * pull).sum(1, keepdims=True))
    unit = abs(pull) + of_c
    size = c * (unit + (c * unit).sum(1, keepdims=True))
    return Loss(value.sum(1), grad, (abs(value) + 1e-6 * q).sum(1), size.max(1, keepdims=True))


def d3pm_uniform(z, sigma, sigma_s, xt, x0, auxiliary=0.0):
    c, n = softmax(z), z.shape[1]
    (alpha, noise), (kept, before), (step, moved) = (survival(s) for s in (sigma, sigma_s, sigma - sigma_s))
    came = step * is_id(z, xt) + moved / n  # q(x_t | y)
    q = came * (kept * is_id(z, x0) + before / n) / at(alpha * is_id(z, x0) + noise / n, xt)
    normaliser = at(alpha * c + noise / n, xt)
    p = came * (kept * c + before / n) / normaliser
    # In sum the derivative through the normaliser is nothing.
    kl = divergence(c, q, p, came * kept / normaliser)
    nll = dce(z, x0, np.full_like(x0, -1), 0.0)
    last = sigma_s == 0
    both = zip(kl.times((~last).astype(EXTENDED)), nll.times(auxiliary + last), strict=True)
    return Loss(*(np.where(np.isnan(a), 0, a) + b for a, b in both))


def mixture(z, sigma, share, xt, x0, mask_index):
    """GIDD's two divergences between q_t(. | x0) and q_t(. | c)."""
    n, mask = z.shape[1] - 1, is_id(z, np.full_like(x0, mask_index))
    c, (alpha, noise) = softmax(np.where(mask, -np.inf, z)), survival(sigma)
    noise = noise * np.where(mask, 1 - share[:, None], share[:, None] / n)
    q, p = alpha * is_id(z, x0) + noise, alpha * c + noise
    kl = divergence(c, q, p, alpha)
    here = is_id(z, xt) & ~mask
    q_xt, p_xt = np.where(here, q, 1), np.where(here, p, 1)
    off = np.where(here, alpha * (is_id(z, x0) - c) / p_xt, 0)  # q / p - 1, not from numbers near 1
    value = (off - np.where(abs(off) < 0.5, np.log1p(off), np.log(q_xt / p_xt))).sum(1)
    pull = -alpha * off / p_xt
    grad = c * (pull - (c * pull).sum(1, keepdims=True))
    size = c * (abs(pull) + (c * abs(pull)).sum(1, keepdims=True))
    return Loss(kl.loss + value, kl.grad + grad, kl.loss_size + abs(value), kl.grad_size + size.max(1, keepdims=True))


# ---------------------------------------------------------------------------------------------------------
# Reverse steps: p(x_s | x_t), from scores with 1 at x_t.


def normalised(weights, xt):
    """Entries below 0 count as 0; where nothing is left x_t stays."""
    weights = np.maximum(weights, 0)
    total = weights.sum(1, keepdims=True)
    return np.where(total > 0, weights / np.where(total > 0, total, 1), is_id(weights, xt))


def tweedie(score, xt, sigma, after, uniform):
    """(exp(-dS Q) score)_y exp(dS Q)(x_t, y), dS = sigma - after; to 0 no mask stays."""
    step, at_xt = sigma - after, is_id(score, xt)
    grow, (stays, moved) = np.exp(step)[:, None], survival(step)
    total = (1 - grow) * score.sum(1, keepdims=True)
    if uniform:
        weights = (grow * score + total / score.shape[1]) * (stays * at_xt + moved / score.shape[1])
    else:
        weights = np.where(at_xt, (after[:, None] > 0) * (grow * score + total), grow * score * moved)
    return normalised(weights, xt)


def euler(score, xt, step, uniform):
    """delta + step Qbar."""
    at_xt = is_id(score, xt)
    jumps = np.where(at_xt, 0, step[:, None] * score / (score.shape[1] if uniform else 1))
    return normalised(np.where(at_xt, 1 - jumps.sum(1, keepdims=True), jumps), xt)


def implied_score(z, sigma, xt, uniform):
    """The score that the conditionals softmax(z) imply; absorbing, at x_t = M, which they leave out."""
    if uniform:
        q = noised(softmax(z), sigma)
        return q / at(q, xt)
    alpha, moved = survival(sigma)
    c = softmax(np.where(is_id(z, xt), -np.inf, z))
    return np.where(is_id(z, xt), 1, c * alpha / moved)
