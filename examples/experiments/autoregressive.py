"""Letters drawn one after another from the autoregressive network."""

import torch
from torch import Tensor

from .methods import N, Network, next_letters


@torch.no_grad()
def continued(model: Network, prompt: Tensor, length: int, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
    """Windows that begin with the prompts, which may be empty: [n, P] -> [n, length]."""
    generator = torch.Generator().manual_seed(seed)
    x = prompt
    for _ in range(length - prompt.shape[1]):
        x = torch.nn.functional.pad(x, (0, 1))
        law = torch.softmax(next_letters(model, x)[:, -1, :N].double() / temperature, 1)
        x[:, -1:] = torch.multinomial(law, 1, generator=generator)
    return x
