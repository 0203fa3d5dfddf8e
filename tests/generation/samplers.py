"""Samplers by their names, and processes whose laws are known."""

import math
from types import SimpleNamespace

import torch
from laws import strings

TIMED = ["tweedie", "euler", "ancestral"]
RANKED = ["confidence", "margin", "entropy"]
SAMPLERS = [*TIMED, "first_hitting", *RANKED, "random"]
P = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.05, 0.45]])  # [L, 4] laws


def product(xt):
    """Conditionals of independent tokens with laws P. The mask is 4, whose own logit never matters."""
    return torch.cat((P.log(), torch.full((len(P), 1), 7.0)), 1).expand(len(xt), -1, -1)


def product_scores(xt, sigma):
    """The same as SEDD's output: its tail, - log e1 - log(V - 1), leaves log c - log e1."""
    return product(xt) + math.log(4)


class UniformProduct:
    """True scores p_t(y) / p_t(x_t) of independent tokens with laws P, noised uniformly."""

    config = SimpleNamespace(num_states=4)

    def __call__(self, xt, sigma):
        alpha = torch.exp(-sigma.double()).view(-1, 1, 1)
        pt = alpha * P.double() + (1 - alpha) / 4
        score = pt / pt.gather(-1, xt.unsqueeze(-1))
        return score.log() + torch.log(torch.expm1(sigma.double())).view(-1, 1, 1) + math.log(3)


def independent(laws):
    """The law over strings of independent tokens with laws [L, V]."""
    index = strings(laws.shape[1], len(laws)).T.unsqueeze(2)
    return laws.double().unsqueeze(1).expand(-1, index.shape[1], -1).gather(2, index).prod(0).squeeze(1)


def steps_of(schedule, steps, sampler):
    """(sigma, what reverse_step is told of where it goes) of each step."""
    for i in range(steps):
        t, s = (torch.tensor(1 - j / steps, dtype=torch.float64) for j in (i, i + 1))
        sigma, dsigma = schedule(t)
        if i == steps - 1:
            yield sigma.item(), dict(sigma_next=0.0)
        elif sampler == "euler":
            yield sigma.item(), dict(step_size=dsigma.item() / steps)
        else:
            yield sigma.item(), dict(sigma_next=schedule.total_noise(s).item())
