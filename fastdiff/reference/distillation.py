"""Divergences between two rows."""

import torch
from torch import Tensor

from fastdiff.reference.terms import phi, without_mask


def distill(z: Tensor, teacher: Tensor, ids: Tensor | None, mask_index: int | None, reverse: bool) -> Tensor:
    """KL(p || q), or KL(q || p) if reverse, of q = softmax(z) and p = softmax(teacher) over v != mask_index.

    With ids [..., k] the teacher holds log p at those ids, and all other ids count as one. A sum of p that is off by
    rounding, above 1 or where there are no others, is divided by.
    """
    log_q = torch.log_softmax(without_mask(z, mask_index), -1)
    if ids is None:
        log_p = torch.log_softmax(without_mask(teacher, mask_index), -1)
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
