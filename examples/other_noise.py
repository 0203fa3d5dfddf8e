"""Noise that is part mask and part uniform letters, and score entropy without clean strings: what they cost and give
where the conditionals of 128 DNA strings are known exactly.

python examples/other_noise.py
"""

import torch
from dna import dna_strings
from torch import Tensor

from fastdiff import (
    Absorbing,
    Hybrid,
    Mixture,
    corrupt,
    dse_loss,
    implicit_score_entropy,
    mixture_loss,
    mixture_weight,
    sample,
    sample_times,
)

V, MASK = 5, 4
STRINGS, P = dna_strings()
LETTERS = torch.nn.functional.one_hot(STRINGS, V).double()  # [128, 8, V]


class Exact:
    """log p(x0 at a position | x_t at the others), under GIDD's noise: what a network is trained towards."""

    def __init__(self, schedule: Hybrid) -> None:
        self.schedule = schedule

    def __call__(self, xt: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.double()
        graph, _ = Mixture(V, MASK).at(self.schedule, self.schedule.inverse(sigma))
        from_letter = graph.transp_transition(xt, sigma).clamp_min(1e-30).log()  # log p(x_t | x0), [b, 8, V]
        each = torch.einsum("blv,slv->bls", from_letter, LETTERS)
        others = each.sum(1, keepdim=True) - each + P.log()
        return torch.einsum("bls,slv->blv", others.softmax(2), LETTERS).clamp_min(1e-30).log()


def drawn_strings(n: int) -> Tensor:
    return STRINGS[torch.multinomial(P, n, replacement=True)]


def bound(model: Exact, x0: Tensor) -> Tensor:
    """GIDD's, of strings at a time each, in nats: [n]."""
    schedule, t = model.schedule, sample_times(len(x0), eps=1e-4, seed=2).double()
    sigma, dsigma = schedule(t)
    graph, dshare = Mixture(V, MASK).at(schedule, t)
    xt = corrupt(x0, sigma, graph, seed=2)
    weight = mixture_weight(xt, x0, sigma, dsigma, graph, dshare=dshare)
    return mixture_loss(model(xt, sigma), sigma, graph.share, xt, x0, weight=weight, mask_index=MASK).sum(1)


def mixtures() -> None:
    print(f"entropy of the strings {-(P * P.log()).sum():.3f} nats")
    for p_uniform in (0.0, 0.1, 0.2, 0.5):
        model = Exact(Hybrid(p_uniform))
        loss = bound(model, drawn_strings(40000))
        print(f"p_uniform {p_uniform}: bound {loss.mean():.3f} ± {loss.std() / len(loss) ** 0.5:.3f} nats")
        for steps in (8, 32, 128):
            options = dict(graph=Mixture(V, MASK), schedule=model.schedule, num_samples=1000, length=8, seed=3)
            drawn = sample(model, steps=steps, return_trajectory=True, **options)
            known = (drawn.tokens.unsqueeze(1) == STRINGS).all(2).any(1)
            before, after = drawn.trajectory[:-1], drawn.trajectory[1:]
            edits = ((before != after) & (before != MASK)).sum((0, 2)).double()
            print(f"  {steps:3} steps: {known.double().mean():.1%} are of the 128, {edits.mean():.2f} letters edited")


def implicit() -> None:
    """Of texts of independent strings, one after the other."""
    masks_only, sigma = Exact(Hybrid(0.0)), 0.7

    def log_score(xt: Tensor, sigma: Tensor) -> Tensor:
        count = xt.shape[1] // 8
        log_c = masks_only(xt.reshape(-1, 8), sigma.repeat_interleave(count)).reshape(*xt.shape, V)
        return log_c - torch.log(torch.expm1(sigma.double())).view(-1, 1, 1)

    for count in (1, 8):
        x0 = drawn_strings(5000 * count).view(5000, -1)
        xt = corrupt(x0, sigma, Absorbing(V, MASK), seed=5)
        z = log_score(xt, torch.full((len(xt),), sigma))
        denoising = dse_loss(z, sigma, xt, x0, mask_index=MASK).sum(1)
        implicit = implicit_score_entropy(log_score, xt, sigma, mask_index=MASK, seed=5)
        print(f"{8 * count} letters, standard deviation of the score entropy of a text at sigma 0.7:")
        print(f"  denoising {denoising.std():.2f}, implicit {implicit.std():.2f} nats")


if __name__ == "__main__":
    torch.manual_seed(0)
    mixtures()
    implicit()
