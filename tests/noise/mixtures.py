"""Noise that is part mask and part uniform, and the laws of its processes."""

import pytest
import torch
from laws import strings

from fastdiff import (
    Hybrid,
    LogLinear,
    Mixture,
    corrupt,
    dse_nll,
    mixture_reverse_step,
    mixture_weight,
)

V, MASKS = 4, [3, 1, 0]
each_mask = pytest.mark.parametrize("mask", MASKS)
STRINGS = strings(V, 2)
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


def logits_of(c, mask):
    """[..., N] laws as logits [..., V], with a large number at the mask, which is to be left out."""
    return torch.full((*c.shape[:-1], V), 9.0, dtype=c.dtype).index_copy(-1, ids(mask), c.log())


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


def noised(share):
    return corrupt(torch.zeros(2, 3).long(), 1.0, Mixture(4, share=share))


def step(**options):
    return mixture_reverse_step(torch.zeros(1, 2, 4), torch.zeros(1, 2).long(), 1.0, 0.3, **options)


def weight(share=0.5, dshare=0.0):
    return mixture_weight(torch.tensor([1, 3]), torch.tensor([0, 0]), 1.0, 1.0, Mixture(4, share=share), dshare=dshare)


def nll(**options):
    return dse_nll(lambda xt, sigma: 0, torch.zeros(2, 3).long(), graph=Mixture(4), schedule=Hybrid(), **options)
