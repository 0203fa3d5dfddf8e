"""Losses of scores, as conditionals.py has those of logits, and what makes log scores of a network's output."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.reference.terms import noise_of, phi


def dse_absorb(log_score: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor, mask_index: int) -> Tensor:
    """Score entropy of the absorbing graph at x_t = M, with e1 = expm1(sigma):

    sum_{y != M, x0} exp(s_y) + (1/e1) phi(s_x0 + log e1), which is
    sum_{y != M} exp(s_y) - s_x0 / e1 + (1/e1) (log(1/e1) - 1) without its cancellation.
    """
    s, scored = log_score.double(), xt == mask_index
    _, inv_e1, log_e1 = noise_of(torch.where(scored, sigma.double(), 1))
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
    _, inv_e1, _ = noise_of(sigma.double())
    log_p = torch.log1p(logits.shape[-1] * inv_e1.unsqueeze(-1) * torch.softmax(logits.double(), -1))
    return dse_uniform(log_p - log_p.gather(-1, xt.unsqueeze(-1)), sigma, xt, x0)


def csm_absorb(log_score: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor, mask_index: int) -> Tensor:
    """Concrete score matching at x_t = M, (1/2) sum_{y != M} (exp(s_y) - a_y)^2 with a = 1/e1 at x0 and 0 elsewhere."""
    s, scored = log_score.double(), xt == mask_index
    _, _, log_e1 = noise_of(torch.where(scored, sigma.double(), 1))
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


def log_score_from_logits(logits: Tensor, sigma: Tensor, mask_index: int) -> Tensor:
    """Absorbing log score of the conditionals c = softmax over v != M: log c_v - log e1, and 0 at M."""
    z = logits.double()
    at_mask = torch.tensor(mask_index, device=z.device)
    log_c = torch.log_softmax(z.index_fill(-1, at_mask, -torch.inf), -1)
    return (log_c - noise_of(sigma.double())[2].unsqueeze(-1)).index_fill(-1, at_mask, 0)


def scale_by_sigma(out: Tensor, sigma: Tensor, xt: Tensor) -> Tensor:
    """SEDD's tail: log score = out - log e1 - log(V - 1), and 0 at x_t."""
    return (out.double() - sigma_shift(sigma, out.shape[-1]).unsqueeze(-1)).scatter(-1, xt.unsqueeze(-1), 0)


def sigma_shift(sigma: Tensor, num_states: int) -> Tensor:
    """log e1 + log(V - 1)."""
    return noise_of(sigma.double())[2] + math.log(num_states - 1)
