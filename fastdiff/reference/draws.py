"""Tokens drawn from a row."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
