"""Networks whose conditionals no distribution has, and what the tests of estimators share."""

import math

import torch
from torch import Tensor

from fastdiff.estimators import NLLEstimate


class RandomNetwork:
    """Conditionals that no distribution has; keeps the masked sequences it was asked about."""

    def __init__(self, length: int, num_tokens: int = 4, dim: int = 16) -> None:
        generator = torch.Generator().manual_seed(7)
        shapes = [(length, num_tokens + 1, dim), (length, dim), (dim, num_tokens + 1)]
        self.embed, self.place, self.head = (
            torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes
        )
        self.mask_index = num_tokens
        self.asked: list[Tensor] = []

    def __call__(self, xt: Tensor) -> Tensor:
        self.asked.append(xt)
        seen = self.embed[torch.arange(xt.shape[1]), xt].sum(1, keepdim=True)
        return torch.tanh(seen / 2 + self.place) @ self.head


def random_tokens(batch: int, length: int, num_tokens: int = 4, seed: int = 3) -> Tensor:
    return torch.randint(num_tokens, (batch, length), generator=torch.Generator().manual_seed(seed))


def nll_by_chain_rule(model, x0: Tensor, order: tuple[int, ...]) -> float:
    """-log p(x0), a token at a time in the given order: [1, L]."""
    return token_nll_by_chain_rule(model, x0, order).sum().item()


def token_nll_by_chain_rule(model, x0: Tensor, order: tuple[int, ...]) -> Tensor:
    xt, token_nll = torch.full_like(x0, model.mask_index), torch.zeros(x0.shape[1], dtype=torch.float64)
    for i in order:
        logits = model(xt)[0, i].clone()
        logits[model.mask_index] = -math.inf
        token_nll[i] = -logits.log_softmax(0)[x0[0, i]]
        xt[0, i] = x0[0, i]
    return token_nll


def z_score(estimate: NLLEstimate, truth: Tensor) -> float:
    """How many standard errors the mean over repeats lies from the truth."""
    repeats = len(estimate.nll)
    return ((estimate.nll.mean() - truth) / (estimate.nll.std() / math.sqrt(repeats))).item()
