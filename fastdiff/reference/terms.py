"""What several formulas are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor


def phi(d: Tensor) -> Tensor:
    """expm1(d) - d >= 0, by its Taylor series near 0 where the difference cancels."""
    near = d.abs() < 1e-2
    t = torch.where(near, d, 0)
    series = t * t * (1 / 2 + t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t / 720))))
    far = torch.where(near, 1, d)
    return torch.where(near, series, torch.expm1(far) - far)


def nll_of(z: Tensor, x0: Tensor) -> Tensor:
    """-log softmax(z)_x0, with its digits where it is close to 0: then 1 is not added to the sum of the others."""
    index = x0.unsqueeze(-1)
    at_x0, top = z.gather(-1, index), z.detach().amax(-1, keepdim=True)
    largest = (at_x0 == top) & top.isfinite()
    others = torch.where(largest, z - at_x0, -torch.inf).scatter(-1, index, -torch.inf)
    loss = F.cross_entropy(z.flatten(0, -2), x0.flatten(), reduction="none").view(x0.shape)
    return torch.where(largest.squeeze(-1), others.exp().sum(-1).log1p(), loss)


def noise_of(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """o = 1 - alpha, 1/e1 = alpha/o and log e1 = sigma + log o, never forming e1 = expm1(sigma)."""
    o = -torch.expm1(-sigma)
    return o, torch.exp(-sigma) / o, sigma + torch.log(o)


def without_mask(logits: Tensor, mask_index: int | None) -> Tensor:
    z = logits.double()
    return z if mask_index is None else z.index_fill(-1, torch.tensor(mask_index, device=z.device), -torch.inf)


def index_of(mask_index: int | None) -> int:
    if mask_index is None:
        raise ValueError("mask_index: expected an integer for the absorbing graph, got None")
    return mask_index
