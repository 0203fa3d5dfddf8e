"""The DNA toys of Jeon et al. (2025): distributions over strings whose true likelihood is known; a network of one."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LETTERS = "ACGT"


def dna_strings(seed: int = 0) -> tuple[Tensor, Tensor]:
    """128 distinct strings of length 8 over ACGT, int64 [128, 8], and p proportional to exp(u / 0.5), u uniform."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randperm(4**8, generator=generator)[:128]
    strings = (codes.unsqueeze(1) >> (2 * torch.arange(8))) & 3
    return strings, torch.softmax(torch.rand(128, dtype=torch.float64, generator=generator) / 0.5, 0)


class Conditionals(nn.Module):
    """A small network of one-hot strings [B, 8] -> logits [B, 8, 5]; any callable will do for the library."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        sizes = (40, width, width, width)
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.GELU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 40))

    def forward(self, xt: Tensor) -> Tensor:
        return self.net(F.one_hot(xt, 5).float().flatten(1)).view(-1, 8, 5)


def markov_transition(order: int = 4, *, seed: int = 0, num_letters: int = 4, sharpness: float = 1.5) -> Tensor:
    """p(next letter | the `order` letters before it, oldest first) of a chain, float64 [A^order, A].

    Each of the letters before adds random logits of its own, so that a small network learns the chain in minutes.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(order, num_letters, num_letters, dtype=torch.float64, generator=generator)
    place = torch.arange(order)
    letters = torch.arange(num_letters**order).unsqueeze(1) // num_letters ** place.flip(0) % num_letters
    return torch.softmax(sharpness / order**0.5 * logits[place, letters].sum(1), 1)


def markov_strings(transition: Tensor, n: int, length: int, *, seed: int = 0) -> Tensor:
    """n strings of a chain that go on from letters drawn uniformly, and do not hold them: int64 [n, length]."""
    generator, (contexts, letters) = torch.Generator().manual_seed(seed), transition.shape
    context, strings = torch.randint(contexts, (n,), generator=generator), torch.empty(n, length, dtype=torch.int64)
    for i in range(length):
        strings[:, i] = torch.multinomial(transition[context], 1, generator=generator).squeeze(1)
        context = (context * letters + strings[:, i]) % contexts
    return strings


def markov_nll(transition: Tensor, strings: Tensor, start: int) -> Tensor:
    """-log p of the letters from place `start` on, given all before them, in nats: [n, length] -> float64 [n].

    `start` is at least the order of the chain.
    """
    contexts, letters = transition.shape
    context, nll = torch.zeros(len(strings), dtype=torch.int64), torch.zeros(len(strings), dtype=transition.dtype)
    for i, letter in enumerate(strings.unbind(1)):
        if i >= start:
            nll -= transition[context, letter].log()
        context = (context * letters + letter) % contexts
    return nll
