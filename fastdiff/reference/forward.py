"""The forward process. Column convention: dp/dt = dsigma Q p."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.reference.terms import index_of


def transition(graph: str, i: Tensor, sigma: Tensor, num_states: int, mask_index: int | None) -> Tensor:
    """The column p(x_t = . | x_0 = i) = exp(sigma Q)(., i): [...] tokens -> [..., num_states]."""
    alpha = torch.exp(-sigma.double()).unsqueeze(-1)
    stay = F.one_hot(i, num_states).double()
    if graph == "uniform":
        return alpha * stay + (1 - alpha) / num_states
    return alpha * stay + (1 - alpha) * F.one_hot(torch.full_like(i, index_of(mask_index)), num_states)


def transp_transition(graph: str, i: Tensor, sigma: Tensor, num_states: int, mask_index: int | None) -> Tensor:
    """The row p(x_t = i | x_0 = .) = exp(sigma Q)(i, .): [...] tokens -> [..., num_states]."""
    if graph == "uniform":
        return transition(graph, i, sigma, num_states, mask_index)
    alpha = torch.exp(-sigma.double()).unsqueeze(-1)
    came = torch.eq(i, index_of(mask_index)).unsqueeze(-1) * (1 - alpha)
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
    leaving = 1 / score.shape[-1] if graph == "uniform" else torch.eq(i, index_of(mask_index)).unsqueeze(-1)
    rate = score * leaving
    rate = rate.scatter(-1, i.unsqueeze(-1), 0)
    return rate.scatter(-1, i.unsqueeze(-1), -rate.sum(-1, keepdim=True))


def staggered_score(graph: str, score: Tensor, dsigma: Tensor, mask_index: int | None) -> Tensor:
    """exp(-dsigma Q) score: the score seen from dsigma less noise, [..., V]."""
    score, grow = score.double(), torch.exp(dsigma.double()).unsqueeze(-1)
    spread = (1 - grow) * score.sum(-1, keepdim=True)
    if graph == "uniform":
        return grow * score + spread / score.shape[-1]
    at_mask = torch.zeros_like(score).index_fill(-1, torch.tensor(index_of(mask_index), device=score.device), 1)
    return grow * score + spread * at_mask
