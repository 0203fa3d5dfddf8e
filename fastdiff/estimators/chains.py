"""The default estimator: chains of nested masks, with a control variate fitted on the other chains.

A chain reveals the L target tokens one by one, in a random order. It is looked at with all of them masked, and at
other counts m of masked tokens, each with probability rho(m). A look scores the tokens that are revealed before the
next look: a uniform draw among the masked ones, so their mean loss, times 1 / rho(m), makes the chain's sum an
unbiased estimate of sum_m g(m). A chain looked at after every token gives -log p(x0) along one order, which all
orders agree on where the conditionals are consistent.

Most of what is left comes from the tokens themselves: some are harder, and hardest before their neighbours are seen.
Chains other than its own predict a token's loss, by ridge regression on which neighbours are visible. The mean of such
a prediction over random orders is known, since a neighbour comes first in half of them and both do in a third, so
subtracting the prediction and adding its mean changes no expectation.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdiff.estimators.estimate import mean_of_independent
from fastdiff.estimators.scoring import draw_masks
from fastdiff.philox import Purpose, uniform

_LOOKS = 3  # beside the one at the full mask: longer chains leave too few of them to fit the control on
_FOLDS = 16  # groups of chains that share one fit, made on the others
_GROUPS = 4  # of folds, that share how much of the control is subtracted; more gain nothing (docs/estimators.md)
_RIDGE = 2.0  # observations of a token that count as much as what is common to all
_SHARED = 5  # measured: docs/estimators.md


class Replicates(NamedTuple):
    """R independent estimates of each of K sequences' NLL, and controls whose expectation is 0.

    Chains fall into folds, and folds into groups. `values` and `controls` [K, G, R] hold, at (g, r), what replicate r
    gives when fitted on all folds but its own; where r is not of group g, on those outside group g alone. Before they
    are `summed`, what each token gives: [K, G, R, L].
    """

    values: Tensor
    controls: Tensor

    def summed(self) -> "Replicates":
        return Replicates(self.values.sum(3), self.controls.sum(3))

    def of_tokens(self) -> Tensor:
        """Of replicates that are not summed: what each token gives to `mean`, [K, L]."""
        return self._controlled(self.summed()._share()).mean(1)

    def mean(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard error and degrees of freedom, [K] each; controls are subtracted by a fitted share.

        It is unbiased. Replicate r of group g is v - s c, where v = raw - sum_i (times_i - E times_i) a_i and c = sum_i
        b_i (seen_i - E seen_i). The a_i and b_i come from folds other than r's; the share s from replicates outside
        g, whose own a_i and b_i come from outside g as well. So no coefficient depends on a chain of r's fold. Given
        all other folds they are numbers, times_i and seen_i have the expectations that are taken off, and what is left
        is E raw, the NLL. (With a share fitted on replicates whose fits contain r, E s c is not 0.)

        Replicates share a little through their fits, which take from each what they give to all others. Their spread
        misses that; the standard error allows for it as if for `_SHARED` parameters.
        """
        mean, stderr, freedom = mean_of_independent(self._controlled(self._share()))
        return mean, stderr * math.sqrt(allowance(self.values.shape[2])), freedom

    def _controlled(self, share: Tensor) -> Tensor:
        """Replicates [K, R, ...] as fitted on all folds but their own, less a share [K, R] of their controls."""
        own, chain = self._group(), torch.arange(self.values.shape[2], device=self.values.device)
        share = share.view(*share.shape, *[1] * (self.values.dim() - 3))
        return self.values[:, own, chain] - share * self.controls[:, own, chain]

    def _share(self) -> Tensor:
        """The share of a replicate's controls that is subtracted, fitted outside its group: [K, R], without graph."""
        own = self._group()
        outside = own != torch.arange(self.values.shape[1], device=own.device).unsqueeze(1)
        slope = _slope(self.values.detach(), self.controls.detach(), outside).clamp(0, 1).nan_to_num(0.0)
        return slope[:, own, 0]

    def _group(self) -> Tensor:
        """The group of each replicate: [R]."""
        chain = torch.arange(self.values.shape[2], device=self.values.device)
        return chain % _FOLDS % min(_GROUPS, self.values.shape[1])


class Passes(NamedTuple):
    """Passes of K sequences, yet to be run: masks [K, P, L], and what makes replicates of their losses [K, P, L]."""

    mask: Tensor
    replicates: Callable[[Tensor], Replicates]


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

    def replicates(loss: Tensor) -> Replicates:
        # The graph of the fits is larger than a pass of a small network: backward makes it anew.
        inputs = _by_chain(loss, chains), _by_chain(mask, chains), weight, target
        return checkpoint(_replicates, *inputs, use_reentrant=False, preserve_rng_state=False)

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


def _replicates(loss: Tensor, mask: Tensor, weight: Tensor, target: Tensor) -> Replicates:
    """From losses and masks [K, R, Q, L], weights [K, R, Q] and the target [K, L].

    All of it is linear in the losses: gradients of losses meet the same fits and controls as losses do.
    """
    revealed = mask & ~torch.cat([mask[:, :, 1:], torch.zeros_like(mask[:, :, :1])], 2)
    scored = weight.unsqueeze(3) * revealed / revealed.sum(3, keepdim=True).clamp(min=1)
    raw = torch.where(scored > 0, scored * loss, 0.0).sum(2)

    # An infinite loss makes the estimate infinite, not NaN. Any fit leaves it unbiased, so float32 will do.
    known = loss.nan_to_num(0.0, 0.0, 0.0).float()
    seen = _neighbours_seen(mask)
    observed = (weight / mask.sum(3)).float().unsqueeze(3) * mask
    fold = torch.arange(loss.shape[1], device=loss.device) % _FOLDS
    moments = [_by_fold(sums, fold) for sums in _moments(known, seen, observed)]
    times_scored = scored.sum(2)  # [K, R, L], on average 1 for a target token
    excess = times_scored - target.unsqueeze(1).double()
    was_seen, on_average = (scored.float().unsqueeze(4) * seen).sum(2), _mean_neighbours_seen(target).unsqueeze(1)

    def fitted_on(folds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chains [r] of some folds, their values and controls [K, r, L], each fitted on the others of these folds."""
        chains = torch.isin(fold, folds).nonzero().squeeze(1)
        own = torch.searchsorted(folds, fold[chains])
        mean_loss, mean_seen, slope = _fit(*(sums[:, folds] for sums in moments))
        values = raw[:, chains] - excess[:, chains] * mean_loss[:, own]
        # slope_i (was_seen_i - times_i mean_seen_i - its expectation)
        along, expected = (slope * mean_seen).sum(3), target.unsqueeze(1) * (slope * on_average).sum(3)
        control = (slope[:, own] * was_seen[:, chains]).sum(3) - expected[:, own]
        return chains, values, control.double() - excess[:, chains] * along[:, own]

    folds = torch.arange(len(moments[0][0]), device=loss.device)
    _, values, controls = fitted_on(folds)
    layers = []
    for group in range(min(_GROUPS, len(folds))):
        with torch.no_grad():  # only the share is fitted on these
            others, v, c = fitted_on(folds[folds % _GROUPS != group])
        layers.append((values.index_copy(1, others, v), controls.index_copy(1, others, c)))
    return Replicates(*(torch.stack(x, 1) for x in zip(*layers, strict=True)))


def _at(x: Tensor, offset: int) -> Tensor:
    """x[..., i + offset] at i, 0 beyond the ends."""
    return torch.nn.functional.pad(x, (-min(offset, 0), max(offset, 0)))[..., max(offset, 0) :][..., : x.shape[-1]]


def _neighbours_seen(mask: Tensor) -> Tensor:
    """Which of the two tokens on either side are visible, and whether both next ones are: [..., L, 5]."""
    visible = (~mask).float()
    left, right, left2, right2 = (_at(visible, offset) for offset in (-1, 1, -2, 2))
    return torch.stack([left, right, left2, right2, left * right], -1)


def _mean_neighbours_seen(target: Tensor) -> Tensor:
    """The mean of `_neighbours_seen` at the time a token is revealed, over random orders of the target tokens."""
    visible = 1 - target.float() / 2
    left, right, left2, right2 = (_at(visible, offset) for offset in (-1, 1, -2, 2))
    both = _at(target, -1) & _at(target, 1)
    return torch.stack([left, right, left2, right2, torch.where(both, 1 / 3, left * right)], -1)


def _moments(loss: Tensor, seen: Tensor, observed: Tensor) -> tuple[Tensor, ...]:
    """Sums over the looks of a chain, per token: observations, weight, loss, features and their products."""
    weighted = observed.unsqueeze(-1) * seen
    return (
        (observed > 0).sum(2).float(),
        observed.sum(2),
        (observed * loss).sum(2),
        weighted.sum(2),
        (weighted.unsqueeze(-1) * seen.unsqueeze(-2)).sum(2),
        (weighted * loss.unsqueeze(-1)).sum(2),
    )


def _by_fold(sums: Tensor, fold: Tensor) -> Tensor:
    """[K, R, ...] -> [K, G, ...], the chains of each fold together."""
    return sums.new_zeros(len(sums), int(fold.max()) + 1, *sums.shape[2:]).index_add(1, fold, sums)


def _fit(*moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss [K, G, L], mean features and slopes [K, G, L, 5] of each token, on all folds but one.

    Slopes are those common to all tokens, and what a token adds to them after shrinkage by `_RIDGE` observations.
    """
    number, weight, loss, seen, products, with_loss = (m.sum(1, keepdim=True) - m for m in moments)
    per_weight = 1 / weight.clamp(min=1e-30)
    mean_loss, mean_seen = loss * per_weight, seen * per_weight.unsqueeze(-1)
    products = products - seen.unsqueeze(-1) * mean_seen.unsqueeze(-2)
    with_loss = with_loss - seen * mean_loss.unsqueeze(-1)
    observation = (weight.sum(2) / number.sum(2)).nan_to_num(1.0)  # with no other fold nothing is subtracted
    ridge = _RIDGE * observation[..., None, None] * torch.eye(seen.shape[-1], dtype=seen.dtype, device=seen.device)
    common = torch.linalg.solve(products.sum(2) + ridge, with_loss.sum(2)).unsqueeze(2)
    own = with_loss - (products * common.unsqueeze(-2)).sum(-1)
    return mean_loss, mean_seen, common + torch.linalg.solve(products + ridge.unsqueeze(2), own)


def _slope(y: Tensor, x: Tensor, which: Tensor) -> Tensor:
    """Least-squares slope of y on x [..., R] over the replicates `which` [..., R]: [..., 1]."""
    x, y = (v - torch.where(which, v, 0).sum(-1, keepdim=True) / which.sum(-1, keepdim=True) for v in (x, y))
    return (which * x * y).sum(-1, keepdim=True) / (which * x * x).sum(-1, keepdim=True)
