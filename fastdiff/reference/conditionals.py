"""Losses of logits. Each is a function of one row and a few scalars; unscored rows are 0."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.reference.terms import nll_of, noise_of, phi, without_mask


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
    z = without_mask(logits, mask_index)
    loss = nll_of(z, torch.where(scored, x0, 0))
    if z_loss:
        top = z.detach().amax(-1, keepdim=True)  # torch.logsumexp's gradient loses the sum beside a large one
        loss = loss + z_loss * (top + (z - top).exp().sum(-1, keepdim=True).log()).squeeze(-1) ** 2
    if sigma is not None:
        loss = loss * noise_of(sigma.double())[1]
    return torch.where(scored, loss, 0)


def dce_stats(logits: Tensor, x0: Tensor, mask_index: int | None) -> Tensor:
    """The log-sum-exp, the entropy -sum_v p_v log p_v, whether x0 is the argmax (1 or 0), and -log p_x0: [4, ...]."""
    z = without_mask(logits, mask_index)
    log_p = torch.log_softmax(z, -1)
    entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)
    return torch.stack([torch.logsumexp(z, -1), entropy, (z.argmax(-1) == x0).double(), nll_of(z, x0)])


def leave_one_out(logits: Tensor, sigma: Tensor, xt: Tensor) -> Tensor:
    """Logits of the clean token given all others and x_t, from those given all others alone, over N ids noised
    uniformly: log(1 + N / e1), by which x_t tells its own id from the rest, is added at x_t."""
    delta = torch.log1p(logits.shape[-1] * noise_of(sigma.double())[1])
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
        [x.unsqueeze(-1) for x in noise_of(s)] for s in (sigma, sigma_s, sigma - sigma_s)
    )
    k_t, k_s, k_ts = n * inv_t, n * inv_s, n * inv_ts
    here, there = F.one_hot(x0, n).bool(), F.one_hot(xt, n).bool()
    c = torch.softmax(logits.double(), -1)
    c_xt, rest = c.gather(-1, xt.unsqueeze(-1)), torch.where(here, 0, c).sum(-1, keepdim=True)
    log_ratio = torch.where(here, _log_mixed(k_s, c, rest), torch.log1p(k_s * c))
    log_ratio = log_ratio - torch.where(moved, torch.log1p(k_t * c_xt), _log_mixed(k_t, c_xt, rest))
    # q is a product of three (1 - alpha) / n, times 1 + k where its two ids are one.
    q = o_ts * o_s / (n * o_t) * torch.where(there, 1 + k_ts, 1) * torch.where(here, 1 + k_s, 1)
    nll = nll_of(logits.double(), x0)
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
    n, z = logits.shape[-1] - 1, without_mask(logits, mask_index)
    o, alpha = -torch.expm1(-sigma.double()).unsqueeze(-1), torch.exp(-sigma.double()).unsqueeze(-1)
    spread = o * share.double().unsqueeze(-1) / n  # B
    only_masks, here, c = spread == 0, F.one_hot(x0, n + 1).bool(), torch.softmax(z, -1)
    k = alpha / torch.where(only_masks, 1, spread)
    rest = torch.where(here, 0, c).sum(-1, keepdim=True)
    log_rho = torch.where(here, _log_mixed(k, c, rest), torch.log1p(k * c))
    log_rho = torch.where(only_masks & here, -nll_of(z, x0).unsqueeze(-1), log_rho)
    q = torch.where(here, alpha + spread, spread)
    kl = torch.where(only_masks & ~here, alpha * c, q * phi(log_rho)).sum(-1)
    return kl + torch.where(xt == mask_index, 0, phi(-log_rho.gather(-1, xt.unsqueeze(-1)).squeeze(-1)))
