"""The default estimator: masks at stratified counts, with a control variate fitted on the other masks.

A chain reveals the L target tokens one by one, in a random order. One looks at it at a few counts m of masked tokens,
each with probability rho(m), and, but where passes are few, with all of them masked. A look scores the tokens that are
revealed before the next look: a uniform draw among the masked ones, so their mean loss, times 1 / rho(m), makes the
chain's sum an unbiased estimate of sum_m g(m). A chain looked at after every token gives -log p(x0) along one order,
which all orders agree on where the conditionals are consistent.

Each chain draws its counts from a stratum of its own, an equal part of the sum of rho, so that counts leave little
noise. Most of what is left comes from the tokens themselves: some are harder, and hardest before what tells of them is
seen. Chains other than its own guess a token's loss from which tokens around it are visible (`potential`). The mean of
such a guess over a chain's stratum is known: of tokens that must be visible and others that must not, all are in a
known share of the masks of a count. So subtracting the guess and adding its mean changes no expectation.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from fastdiff.backends import resolve
from fastdiff.estimators.estimate import mean_of_strata
from fastdiff.estimators.potential import Moments, fit, fused_fits, mean_terms, moments, places, products, terms
from fastdiff.estimators.scoring import draw_masks
from fastdiff.philox import Purpose, uniform

_FEW = 6  # passes of which none is worth spending on the full mask alone
_MANY = 48  # passes from which on chains of a few looks are enough to fit the control on
_LOOKS = 3  # at each of these chains
_WHOLE = 0.75  # single looks at every count from which on it gets a whole number of them
_FOLDS = 8  # groups of chains that share one fit, made on the others
_SHARED = 5  # measured: docs/estimators.md
_TOGETHER = 2  # folds that are fitted at once
_FITTED = 2**14  # tokens, by fold, of sequences whose fits share a graph: some 100 MB


class Passes(NamedTuple):
    """Passes of K sequences, yet to be run: masks [K, P, L], and what makes R values by token of losses [K, P, L],
    [K, R, L]: their mean is the estimate, their spread tells its error."""

    mask: Tensor
    replicates: Callable[[Tensor], Tensor]


def mean_of_chains(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard error and degrees of freedom, [K] each, of chains' values [K, R].

    Chains share a little through their fits, which take from each what they give to all others. Their spread misses
    that; the standard error allows for it as if for `_SHARED` parameters.
    """
    mean, stderr, freedom = mean_of_strata(values)
    return mean, stderr * math.sqrt(allowance(values.shape[1])), freedom


def allowance(chains: int) -> float:
    """By how much the variance is larger than the spread of chains that share fits tells."""
    return 1 + _SHARED / (chains - 1)


class Plan(NamedTuple):
    """How many chains, looks at each, or as many as there are tokens, and whether the full mask is seen too."""

    chains: int
    looks: int
    full: bool


def plan(num_samples: int, length: int) -> Plan:
    """What num_samples >= 3 network passes buy of a sequence with that many target tokens."""
    every = length - 1
    return chains_of(num_samples, every) if (num_samples - 1) // every >= 8 else few_looks(num_samples)


def few_looks(num_samples: int) -> Plan:
    """Single masks, or chains of a few looks where passes are many."""
    return chains_of(num_samples, _LOOKS if num_samples >= _MANY else 1)


def chains_of(num_samples: int, looks: int) -> Plan:
    """As many chains of so many looks as the passes buy."""
    full = looks > 1 or num_samples > _FEW
    return Plan((num_samples - full) // looks, looks, full)


def plan_chains(target: Tensor, plan: Plan, seed: Tensor, sample_ids: Tensor, step: int, backend: str | None) -> Passes:
    """Chains of sequences with targets [K, L] of the same number n >= 2 of tokens; replicates are by token."""
    n, chain = int(target[0].sum()), torch.arange(plan.chains, device=target.device)
    rho = look_probabilities(n - plan.full, min(plan.looks, n - 1), plan.chains).to(target.device)
    jitter = uniform(seed, Purpose.COUNT, step, sample_ids.unsqueeze(1), 0, chain)
    counts = _draw_looks((chain + jitter) / plan.chains, rho)  # [K, R, looks]
    strata = pad(_strata(rho, plan.chains), (0, n - len(rho)), value=1.0)
    weight, flat, steps = 1 / rho[counts - 1], counts.flatten(1), step + chain.repeat_interleave(counts.shape[2])
    if plan.full:
        weight, flat, steps = pad(weight, (1, 0), value=1.0), pad(flat, (1, 0), value=n), pad(steps, (1, 0), value=step)
    mask = draw_masks(target, flat, steps, seed, sample_ids, backend)

    def replicates(loss: Tensor) -> Tensor:
        # The graph of the fits is larger than a pass of a small network: backward makes it anew.
        inputs = _by_chain(loss, plan), _by_chain(mask, plan), weight, target
        few = max(1, _FITTED // (min(_FOLDS, plan.chains) * target.shape[1]))
        parts = zip(*(x.split(few) for x in inputs), strict=True)
        of_chains = partial(_replicates, _fused(loss, backend), strata)
        again = partial(checkpoint, of_chains, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(*x) for x in parts])

    return Passes(mask, replicates)


@lru_cache(maxsize=256)
def look_probabilities(largest: int, looks: int, chains: int) -> Tensor:
    """rho(m) for m = 1..largest, at most 1, `looks` in all: [largest] float64.

    Losses vary most where few tokens are masked, and depend most on which ones where few are seen. So looks are spread
    by m^(-1/2), by (largest + 1 - m)^(-3/4) and evenly, 1 : 3 : 1, and single ones 2 : 2 : 1. Where hardly any count
    gets less than one of all single looks, each gets a whole number of them, and counts leave no noise.
    """
    m = torch.arange(1, largest + 1, dtype=torch.float64, device="cpu")
    shares, parts = (2, 2, 1) if looks == 1 else (1, 3, 1), (m**-0.5, (largest + 1 - m) ** -0.75, torch.ones_like(m))
    density = torch.stack([share * part / part.sum() for share, part in zip(shares, parts, strict=True)]).sum(0)
    number = _within(chains * looks * density / density.sum(), 0, chains)
    if looks == 1 and number.min() >= _WHOLE:
        number = _within(number, 1, chains).cumsum(0).round().diff(prepend=number.new_zeros(1))
    return number / chains


def _within(number: Tensor, least: int, most: int) -> Tensor:
    """Of the same sum: what is beyond the bounds, the others give or take."""
    total = number.sum()
    while ((number < least) | (number > most)).any():
        number = number.clamp(least, most)
        free = (number > least) & (number < most)
        number = torch.where(free, number * (total - number[~free].sum()) / number[free].sum(), number)
    return number


def _draw_looks(u: Tensor, rho: Tensor) -> Tensor:
    """Counts in falling order, m with probability rho(m): those at which the sum of rho from above passes u + j."""
    passed = _sums_from_above(rho)
    at = u.unsqueeze(-1) + torch.arange(round(passed[-1].item()), device=u.device)
    return len(rho) - torch.searchsorted(passed, at, right=True)


def _strata(rho: Tensor, chains: int) -> Tensor:
    """What 1 / rho(m) sums to over a chain's looks at m, on average over its stratum: [chains, counts]."""
    passed = _sums_from_above(rho)
    edges = torch.arange(chains * round(passed[-1].item()) + 1, dtype=rho.dtype, device=rho.device) / chains
    inside = pad(torch.minimum(passed, edges.unsqueeze(1)), (1, 0)).diff(dim=0).diff(dim=1)
    return inside.unflatten(0, (-1, chains)).sum(0).flip(1) * chains / rho


def _sums_from_above(rho: Tensor) -> Tensor:
    """Sums of rho over the largest counts, [counts]; all of it is a whole number, but for rounding."""
    passed = rho.flip(0).cumsum(0)
    passed[-1] = passed[-1].round()
    return passed


def _by_chain(passes: Tensor, plan: Plan) -> Tensor:
    """[K, full + chains * looks, L] -> [K, chains, full + looks, L]: each chain begins with the full mask."""
    full, rest = passes[:, : plan.full], passes[:, plan.full :].unflatten(1, (plan.chains, -1))
    return torch.cat([full.unsqueeze(1).expand(-1, plan.chains, -1, -1), rest], 2)


def _fused(loss: Tensor, backend: str | None) -> bool:
    """Whether a kernel makes the fits."""
    return loss.device.type == "cpu" and resolve(backend, loss.device, "fit_controls", loss.shape[-1]) == "cpu"


def _replicates(fused: bool, strata: Tensor, loss: Tensor, mask: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What chains' tokens give, [K, R, L], from losses and masks [K, R, Q, L], weights [K, R, Q] and the target [K, L]:
    their mean is the estimate, and their spread tells its error. `strata` [R, n] are the mean weights of counts.

    A chain gives raw - sum_i (times_i - E times_i) a_i + (seen_i - E seen_i) . b_i, where times_i and seen_i sum over
    its looks the weight that token i is scored with, and that weight on what the token's pairs do. The a_i and b_i come
    from chains of other folds alone. Given those they are numbers, and what they multiply has as its expectation what
    is added again, averaged over chains: the mean over the chain's stratum and all orders, less that over all counts.
    So chains spread as if all had the same counts. The same holds of a gradient, through which parts of a_i and b_i it
    may pass: those take it from chains of other folds too.
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
    level, slope = fused_fits(known, mask, observed, len(folds)) if fused else _fits(known, mask, observed, folds)
    guessed, of_strata = _controls(level, slope, scored, mask, strata, target, folds)
    return raw - guessed + of_strata.mean(1, keepdim=True)


def _controls(
    level: Tensor, slope: Tensor, scored: Tensor, mask: Tensor, strata: Tensor, target: Tensor, folds: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """What guesses give of chains' tokens, less their mean over orders and counts, and its mean over orders and the
    chain's stratum: [K, R, L] each."""
    at, share, parts = places(target), strata / strata.shape[1], []
    expected = mean_terms(at, torch.full_like(share[:1], 1 / len(share[0])))
    for i, fold in enumerate(folds):
        times = scored[:, fold].sum(2)
        seen = (scored[:, fold].unsqueeze(4) * terms(mask[:, fold])).sum(2)
        sums = torch.stack([times, share[fold].sum(1).view(1, -1, 1).expand_as(times)])
        deviation = torch.stack([seen, mean_terms(at, share[fold])]) - expected
        parts.append(target.unsqueeze(1) * (sums - 1) * level[:, [i]] + (slope[:, [i]] * deviation).sum(4))
    guessed, of_strata = torch.cat(parts, 2)[:, :, torch.cat(folds).argsort()]
    return guessed, of_strata


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
