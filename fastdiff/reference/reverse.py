"""The reverse process, from noise sigma_t to sigma_s < sigma_t."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.reference.forward import mixture_limit, reverse_rate, staggered_score, transp_transition
from fastdiff.reference.terms import without_mask


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
    z, num_states = without_mask(logits, mask_index), logits.shape[-1]
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
