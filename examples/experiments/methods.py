"""Eight ways to model the same letters: what each is trained with, and how its likelihood is taken.

Of a network and clean tokens [B, L], `loss` is a mean in nats per letter and `nll` [B] in nats; both are unbiased for
the same number, the method's bound of -log p(x0), but for D3PM's auxiliary cross-entropy, which is trained with alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import Absorbing, LogLinear, Uniform, block_nll, corrupt, d3pm_loss, dse_nll, sample_times, time_free_nll
from fastdiff.model import DiffusionTransformer
from fastdiff.training.objectives import SCHEDULE, SCORES, diffusion_loss, noise

from .texts import ALPHABET

N = len(ALPHABET)
MASK = N
BLOCK = 16
STEPS = 1000  # of D3PM's chain
AUXILIARY = 0.001  # of cross-entropy beside each step of it
WHOLE = LogLinear(1e-9)  # masks everything at time 1, as D3PM does

Network = DiffusionTransformer
Loss = Callable[[Network, Tensor, int], Tensor]  # x0, step
Likelihood = Callable[[Network, Tensor, int], Tensor]  # x0, passes


@dataclass(frozen=True)
class Method:
    """A method; paper is SEDD's table for text8, in bits per character."""

    title: str
    loss: Loss
    nll: Likelihood
    timed: bool = False  # the network sees the noise level
    masked: bool = True  # it has a state for the mask
    paper: float | None = None


def next_letters(model: Network, x0: Tensor) -> Tensor:
    """Logits of each letter given those before it; the mask stands before the first."""
    before = F.pad(x0[:, :-1], (1, 0), value=MASK)
    return model(before, sees=torch.ones(2 * x0.shape[1:], dtype=torch.bool).tril())


def autoregressive_loss(model: Network, x0: Tensor, step: int) -> Tensor:
    return F.cross_entropy(next_letters(model, x0).flatten(0, 1), x0.flatten())


@torch.no_grad()
def autoregressive_nll(model: Network, x0: Tensor, passes: int = 1) -> Tensor:
    """Exact in one pass, however many are allowed."""
    loss = F.cross_entropy(next_letters(model, x0).transpose(1, 2), x0, reduction="none")
    return loss.double().sum(1)


def trained_with(objective: str, block_length: int = 0) -> Loss:
    """The loss of one of `fastdiff train`'s objectives."""

    def loss(model: Network, x0: Tensor, step: int) -> Tensor:
        noised = noise(x0, objective, model.config.num_states, seed=0, step=step, block_length=block_length)
        return diffusion_loss(model, noised, objective, reduction="mean", num_items=x0.numel())

    return loss


def time_free(model: Network, x0: Tensor, passes: int) -> Tensor:
    return time_free_nll((model.body, model.lm_head), x0, mask_index=MASK, num_samples=passes).nll


def in_blocks(model: Network, x0: Tensor, passes: int) -> Tensor:
    blocks = model.block_conditionals(BLOCK, MASK, SCHEDULE.total_noise)
    return block_nll(blocks, x0, mask_index=MASK, block_length=BLOCK, num_samples=passes).nll


def scored(model: Network, x0: Tensor, passes: int, graph: Absorbing | Uniform) -> Tensor:
    options = dict(graph=graph, schedule=SCHEDULE, parametrization=SCORES[graph.name])
    return dse_nll(model, x0, num_samples=passes, **options).nll


def d3pm(model: Network, x0: Tensor, graph: Absorbing | Uniform, draw: int, auxiliary: float) -> Tensor:
    """A step of the bound for each sequence, unbiased for the sum over all: [B].

    Steps are those of times u^2, u stratified over the sequences: of uniform ones the first, which alone weighs as much
    as many, would be met once in a thousand.
    """
    step = 1 + (sample_times(len(x0), eps=0.0, seed=0, step=draw).double() ** 2 * STEPS).long().clamp_max(STEPS - 1)
    weight = 1 / (STEPS * ((step / STEPS).sqrt() - ((step - 1) / STEPS).sqrt()))
    kind, schedule = ("absorb", WHOLE) if isinstance(graph, Absorbing) else ("uniform", SCHEDULE)
    sigma = schedule.total_noise(step.double() / STEPS).float()
    xt = corrupt(x0, sigma, graph, seed=0, step=draw)
    options = dict(graph=kind, schedule=schedule, auxiliary=auxiliary, weight=weight)
    return d3pm_loss(model(xt, sigma), step, xt, x0, num_steps=STEPS, **options).double().sum(1)


def d3pm_trained(model: Network, x0: Tensor, step: int, graph: Absorbing | Uniform) -> Tensor:
    return d3pm(model, x0, graph, step, AUXILIARY).mean() / x0.shape[1]


@torch.no_grad()
def d3pm_nll(model: Network, x0: Tensor, passes: int, graph: Absorbing | Uniform) -> Tensor:
    total = sum(d3pm(model, x0, graph, draw, 0.0) for draw in range(passes)) / passes
    return total + divergence_at_end(x0, graph)


def divergence_at_end(x0: Tensor, graph: Absorbing | Uniform) -> Tensor:
    """KL of the last step from what sampling starts with; of masks it is 0."""
    if isinstance(graph, Absorbing):
        return torch.zeros(len(x0), dtype=torch.float64)
    law = graph.transition(x0, SCHEDULE.total_noise(torch.ones(len(x0), dtype=torch.float64)))
    return (law * torch.log(law * N)).sum((1, 2))


ABSORBING, UNIFORM = Absorbing(N + 1, MASK), Uniform(N)
METHODS = {  # the one that takes twice as long comes first: it should not go on alone
    "block": Method(f"block diffusion, blocks of {BLOCK}", trained_with("dce-k", BLOCK), in_blocks),
    "ar": Method("autoregressive", autoregressive_loss, autoregressive_nll, paper=1.23),
    "sedd-absorb": Method(
        "SEDD, absorbing", trained_with("dse-absorb"), partial(scored, graph=ABSORBING), timed=True, paper=1.39
    ),
    "sedd-uniform": Method(
        "SEDD, uniform",
        trained_with("dse-uniform"),
        partial(scored, graph=UNIFORM),
        timed=True,
        masked=False,
        paper=1.47,
    ),
    "d3pm-absorb": Method(
        "D3PM, absorbing",
        partial(d3pm_trained, graph=ABSORBING),
        partial(d3pm_nll, graph=ABSORBING),
        timed=True,
        paper=1.45,
    ),
    "d3pm-uniform": Method(
        "D3PM, uniform",
        partial(d3pm_trained, graph=UNIFORM),
        partial(d3pm_nll, graph=UNIFORM),
        timed=True,
        masked=False,
        paper=1.61,
    ),
    "radd": Method("RADD, counts of masks", trained_with("dce-k"), time_free),
    "mdlm": Method("MDLM, times", trained_with("dce-t"), time_free),
}
