"""The default estimator: chains of nested masks, with a control variate fitted on the other chains.

A chain reveals the L target tokens one by one, in a random order. It is looked at with all of them masked, and at
other counts m of masked tokens, each with probability rho(m). A look scores the tokens that are revealed before the
next look: a uniform draw among the masked ones, so their mean loss, times 1 / rho(m), makes the chain's sum an
unbiased estimate of sum_m g(m). A chain looked at after every token gives -log p(x0) along one order, which all
orders agree on where the conditionals are consistent.

Most of what is left comes from the tokens themselves: some are harder, and hardest before what tells of them is seen.
Chains other than its own guess a token's loss from which tokens around it are visible (`potential`). The mean of such a
guess over random orders is known: of tokens that must come before a token and others that must come after it, all do
in a known share of the orders. So subtracting the guess and adding its mean changes no expectation.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdiff.estimators.estimate import mean_of_independent
from fastdiff.estimators.potential import Moments, fit, mean_terms, moments, products, terms
from fastdiff.estimators.scoring import draw_masks
from fastdiff.philox import Purpose, uniform

_LOOKS = 3  # beside the one at the full mask: longer chains leave too few of them to fit the control on
_FOLDS = 16  # groups of chains that share one fit, made on the others
_SHARED = 5  # measured: docs/estimators.md
_TOGETHER = 4  # folds that are fitted at once
_FITTED = 2**14  # tokens, by fold, of sequences whose fits share a graph: some 100 MB


class Passes(NamedTuple):
    """Passes of K sequences, yet to be run: masks [K, P, L], and what makes of their losses [K, P, L] R independent
    estimates by token, [K, R, L]."""

    mask: Tensor
    replicates: Callable[[Tensor], Tensor]


def mean_of_chains(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard error and degrees of freedom, [K] each, of chains' values [K, R].

    Chains share a little through their fits, which take from each what they give to all others. Their spread misses
    that; the standard error allows for it as if for `_SHARED` parameters.
    """
    mean, stderr, freedom = mean_of_independent(values)
    return mean, stderr * math.sqrt(allowance(values.shape[1])), freedom


def allowance(chains: int) -> float:
    """By how much the variance is larger than the spread of chains that share fits tells."""
    return 1 + _SHARED / (chains - 1)


def plan(num_samples: int, length: int) -> tuple[int, int]:
    """How many chains, and looks at each beside the full mask, num_samples >= 3 network passes buy."""
    passes, every = num_samples - 1, length - 1
    looks = every if passes // every >= 8 else min(_LOOKS, every, max(1, passes // 4))
    return passes // looks, looks


def plan_chains(
    target: Tensor, chains: int, looks: int, seed: Tensor, sample_ids: Tensor, step: int, backend: str | None
) -> Passes:
    """Chains of sequences with targets [K, L] of the same number n >= 2 of tokens; replicates are by token."""
    n = int(target[0].sum())
    chain = torch.arange(chains, device=target.device)
    rho = look_probabilities(n, looks).to(target.device)
    u = uniform(seed, Purpose.COUNT, step, sample_ids.unsqueeze(1), 0, chain)
    counts = _draw_looks(u, rho)  # [K, R, looks]
    full = counts.new_full((len(target), 1), n)
    steps = step + torch.cat([chain[:1], chain.repeat_interleave(looks)])
    mask = draw_masks(target, torch.cat([full, counts.flatten(1)], 1), steps, seed, sample_ids, backend)
    weight = torch.cat([torch.ones_like(rho[:1]).expand(*counts.shape[:2], 1), 1 / rho[counts - 1]], 2)

    def replicates(loss: Tensor) -> Tensor:
        # The graph of the fits is larger than a pass of a small network: backward makes it anew.
        inputs = _by_chain(loss, chains), _by_chain(mask, chains), weight, target
        few = max(1, _FITTED // (min(_FOLDS, chains) * target.shape[1]))
        parts = zip(*(x.split(few) for x in inputs), strict=True)
        return torch.cat([checkpoint(_replicates, *x, use_reentrant=False, preserve_rng_state=False) for x in parts])

    return Passes(mask, replicates)


@lru_cache(maxsize=256)
def look_probabilities(length: int, looks: int) -> Tensor:
    """rho(m) for m = 1..length-1, at most 1, `looks` in all: [length - 1] float64.

    Losses vary most where few tokens are masked, and depend most on which ones where few are seen. So looks are spread
    by m^(-1/2), by (length - m)^(-3/4) and evenly, 1 : 3 : 1. Single looks of few chains, 2 : 1 : 1, for gradients vary
    most where few tokens are masked.
    """
    if looks == length - 1:
        return torch.ones(length - 1, dtype=torch.float64, device="cpu")
    m = torch.arange(1, length, dtype=torch.float64, device="cpu")
    shares, parts = (2, 1, 1) if looks == 1 else (1, 3, 1), (m**-0.5, (length - m) ** -0.75, torch.ones_like(m))
    density = torch.stack([share * part / part.sum() for share, part in zip(shares, parts, strict=True)]).sum(0)
    rho = looks * density / density.sum()
    while (rho > 1).any():  # what is over 1 goes to the others
        free = rho < 1
        rho = torch.where(free, rho * (looks - (~free).sum()) / rho[free].sum(), 1.0)
    return rho


def _draw_looks(u: Tensor, rho: Tensor) -> Tensor:
    """Counts in falling order, m with probability rho(m): those at which the sum of rho from above passes u + j."""
    passed, looks = rho.flip(0).cumsum(0), round(rho.sum().item())
    passed[-1] = looks
    at = u.unsqueeze(-1) + torch.arange(looks, device=u.device)
    return len(rho) - torch.searchsorted(passed, at, right=True)


def _by_chain(passes: Tensor, chains: int) -> Tensor:
    """[K, 1 + chains * looks, L] -> [K, chains, 1 + looks, L]: each chain begins with the full mask."""
    full, rest = passes[:, :1], passes[:, 1:].unflatten(1, (chains, -1))
    return torch.cat([full.unsqueeze(1).expand(-1, chains, -1, -1), rest], 2)


def _replicates(loss: Tensor, mask: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What chains' tokens give, [K, R, L], from losses and masks [K, R, Q, L], weights [K, R, Q] and the target [K, L].

    A chain gives raw - sum_i (times_i - 1) a_i + (seen_i - E seen_i) . b_i, where times_i and seen_i sum over its looks
    the weight that token i is scored with, and that weight on what the token's pairs do. The a_i and b_i come from
    chains of other folds alone. Given those they are numbers, and what they multiply has expectation 0. So it is of a
    gradient, through which parts of a_i and b_i it may pass: those take it from chains of other folds alone too.
    """
    revealed = mask & ~torch.cat([mask[:, :, 1:], torch.zeros_like(mask[:, :, :1])], 2)
    scored = weight.unsqueeze(3) * revealed / revealed.sum(3, keepdim=True).clamp(min=1)
    raw = torch.where(scored > 0, scored * loss, 0.0).sum(2)
    if loss.shape[2] == target[0].sum():  # looked at after every token: exact already, or hardly to be guessed
        return raw

    # An infinite loss makes the estimate infinite, not NaN: any fit leaves it unbiased.
    known, observed = loss.nan_to_num(0.0, 0.0, 0.0), (weight / mask.sum(3)).unsqueeze(3) * mask
    chains = torch.arange(loss.shape[1], device=loss.device)
    folds = [chains[first::_FOLDS] for first in range(min(_FOLDS, len(chains)))]
    level, slope = _fits(known, mask, observed, folds)
    was_seen = [(scored[:, fold].unsqueeze(4) * terms(mask[:, fold])).sum(2) for fold in folds]
    expected = target.unsqueeze(1) * (slope * mean_terms(target).unsqueeze(1)).sum(3)
    excess = scored.sum(2) - target.unsqueeze(1).double()
    controls = torch.cat(
        [
            excess[:, fold] * level[:, [i]] + (slope[:, [i]] * seen).sum(3) - expected[:, [i]]
            for i, (fold, seen) in enumerate(zip(folds, was_seen, strict=True))
        ],
        1,
    )
    return raw - controls[:, torch.cat(folds).argsort()]


def _fits(known: Tensor, mask: Tensor, observed: Tensor, folds: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Levels [K, folds, L] and slopes [K, folds, L, terms], of each fold by all others' losses, masks and weights.

    Products of terms take most memory: they are made twice, so that only those of a few folds are held at once.
    """

    def looks(fold: Tensor) -> tuple[Tensor, Tensor]:
        return terms(mask[:, fold]).flatten(1, 2), observed[:, fold].flatten(1, 2)

    by_fold = [moments(known[:, fold].flatten(1, 2), *looks(fold)) for fold in folds]
    others = Moments(
        *(p.sum(1, keepdim=True) - p for p in (torch.stack(part, 1) for part in zip(*by_fold, strict=True)))
    )
    whole = products(*looks(folds[0]))
    for fold in folds[1:]:
        whole += products(*looks(fold))
    numbers = torch.tensor([mask.shape[1] - len(fold) for fold in folds], device=mask.device)
    found = []
    for some in torch.arange(len(folds), device=mask.device).split(_TOGETHER):
        sums = Moments(*(part[:, some] for part in others))
        found.append(fit(sums, torch.stack([whole - products(*looks(folds[i])) for i in some], 1), numbers[some]))
    level, slope = zip(*found, strict=True)
    return torch.cat(level, 1), torch.cat(slope, 1)
