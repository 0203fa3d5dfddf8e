"""Tokens drawn from rows that are cut across the ranks of a process group: those that one rank would draw.

Each exchange is a few numbers a row but for the sums of the classes, RACE_CLASSES of them, which race on every rank.
"""

import dataclasses

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.checks import check_values
from fastdiff.ops.parallel import Shard
from fastdiff.ops.row_loss import loss_dtype
from fastdiff.ops.row_sample import RACE_CLASSES, Drawn, SampleRows, row_sample
from fastdiff.philox import Purpose, draw32

IDS_BYTES = 40  # besides its logit, what an id takes at the most
_DIGIT = 8  # bits of a number that a search for a threshold settles at a time


def sharded_sample(rows: SampleRows, shard: Shard, backend: str | None) -> Drawn:
    """As `row_sample`, without a law, of live rows [M] of which rows.z [M, n] is this rank's part, and is changed."""
    z = rows.z
    if rows.exclude is not None:
        own = rows.exclude - shard.first
        z.index_fill_(1, own[(own >= 0) & (own < z.shape[1])], -torch.inf)
    largest, at = z.max(1)
    told = [largest.double(), (at + shard.first).double()]
    if rows.with_stats:
        told += _own_stats(rows, largest.isfinite(), backend)
    tops, ids, *stats = shard.gather(torch.stack(told)).unbind(1)  # [ranks, M] each
    top, winner = tops.max(0)
    possible = top.isfinite()
    check_values("logits", top, ~possible, "finite numbers, or -inf beside some")
    argmax = _of(ids, winner)
    token, z_token = (argmax, top) if rows.temperature == 0 else _drawn(rows, top, shard, backend)
    tokens = torch.where(possible, token.long(), rows.xt)
    if not rows.with_stats:
        return Drawn(tokens, tokens.new_empty(0), top.float().new_empty(0))
    merged = _merged(tops, winner, stats, z_token)
    return Drawn(tokens, torch.where(possible, argmax.long(), rows.xt), torch.where(possible, merged, 0))


def _own_stats(rows: SampleRows, finite: Tensor, backend: str | None) -> list[Tensor]:
    """Of this rank's ids alone the probability of the largest, the gap to the next, and sum p log p; or 0."""
    greedy = dataclasses.replace(rows, live=finite, exclude=None, temperature=0.0, top_k=0, top_p=1.0)
    return list(row_sample(greedy, backend).stats.double())


def _merged(tops: Tensor, winner: Tensor, stats: list[Tensor], z_token: Tensor) -> Tensor:
    """The statistics of whole rows, [3, M], from those of parts, [ranks, M]. A part has a share of all probability."""
    probability, gap, neg_entropy = stats
    d = tops - tops.amax(0)
    sums = torch.where(probability > 0, torch.exp(d) / probability, 0)
    total = sums.sum(0)
    share = sums / total
    of_others = (-torch.expm1(d)).scatter(0, winner.unsqueeze(0), torch.inf).amin(0)
    return torch.stack(
        [
            torch.exp(z_token - tops.amax(0)) / total,
            torch.minimum(of_others / total, _of(share * gap, winner)),
            (share * neg_entropy + torch.xlogy(share, share)).sum(0),
        ]
    ).float()


def _drawn(rows: SampleRows, top: Tensor, shard: Shard, backend: str | None) -> tuple[Tensor, Tensor]:
    """The ids that win their races, and their logits, float64 [M]; see reference.race."""
    z, first = rows.z, shard.first
    classes = min(RACE_CLASSES, shard.all_states)
    lead, exact = first % classes, loss_dtype(z.dtype)
    padded = torch.zeros(len(z), -(-(lead + z.shape[1]) // classes), classes, dtype=exact, device=z.device)
    weights = padded.flatten(1)[:, lead : lead + z.shape[1]]
    torch.sub(z, top.to(exact).unsqueeze(1), out=weights).div_(rows.temperature).exp_()
    least = _least_kept(rows, weights, shard)
    log_sums = shard.sum(padded.sum(1)).log()
    race = dataclasses.replace(rows, z=log_sums, exclude=None, temperature=1.0, top_k=0, top_p=1.0, with_stats=False)
    winner = row_sample(race, backend).tokens.unsqueeze(1)  # up to RACE_CLASSES ids race as classes do

    # Then the ids of the class, of which each rank has some.
    nth = (first - winner + classes - 1).div(classes, rounding_mode="floor").clamp_min(0)
    ids = winner + classes * (nth + torch.arange(z.shape[1] // classes + 1, device=z.device))
    own = ids - first
    x = z.gather(1, own.clamp_max(z.shape[1] - 1)).double()
    runs = (own < z.shape[1]) & (x >= least)
    draws = draw32(
        rows.seed, Purpose.RACE, rows.step, rows.sample_ids.unsqueeze(1), rows.positions.unsqueeze(1), ids + classes
    )
    times = reference.exponential(draws).log() - (x - top.unsqueeze(1)) / rows.temperature
    time, at = torch.where(runs, times, torch.inf).min(1, keepdim=True)
    told = torch.stack([time, ids.gather(1, at).double(), x.gather(1, at)]).squeeze(2)
    times, ids, x = shard.gather(told).unbind(1)
    rank = times.min(0).indices
    return _of(ids, rank), _of(x, rank)


def _least_kept(rows: SampleRows, weights: Tensor, shard: Shard) -> Tensor:
    """From which number on top_k and then top_p keep ids, [M, 1]; the weights of the others become 0."""
    z = rows.z
    least = torch.full((len(z), 1), -torch.inf, dtype=z.dtype, device=z.device)
    if 0 < rows.top_k < shard.all_states:
        ones = torch.ones_like(z, dtype=torch.float64)
        least = _threshold(z, ones, z.new_full((len(z), 1), rows.top_k, dtype=torch.float64), shard)
        weights.mul_(z >= least)
    if rows.top_p < 1:
        mass = weights.double()
        target = rows.top_p * shard.sum(mass.sum(1, keepdim=True))
        least = torch.maximum(least, _threshold(z, mass, target, shard))
        weights.mul_(z >= least)
    return least


def _threshold(z: Tensor, mass: Tensor, target: Tensor, shard: Shard) -> Tensor:
    """The largest number from which on all ranks' masses sum up to the target, [M, 1] each, a digit at a time."""
    bits = z.element_size() * 8
    kind = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    key = z.view(kind)
    key = key ^ ((key >> (bits - 1)) & torch.iinfo(kind).max)  # in the order of the numbers
    found = torch.zeros_like(target, dtype=torch.int64)
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        digit = ((key >> shift) & (2**_DIGIT - 1)).long()
        if shift == bits - _DIGIT:
            digit ^= 2 ** (_DIGIT - 1)  # it holds the sign
        sums = mass.new_zeros(len(z), 2**_DIGIT).scatter_add_(1, digit, mass)
        above = shard.sum(sums).flip(1).cumsum(1).flip(1)
        chosen = ((above >= target).sum(1, keepdim=True) - 1).clamp_min(0)
        target = target - torch.nn.functional.pad(above, (0, 1)).gather(1, chosen + 1)
        mass = mass * (digit == chosen)
        found = (found << _DIGIT) | chosen
    found = (found + torch.iinfo(kind).min).to(kind)
    return (found ^ ((found >> (bits - 1)) & torch.iinfo(kind).max)).view(z.dtype)


def _of(parts: Tensor, rank: Tensor) -> Tensor:
    """[ranks, M] and the rank for each of M -> [M]."""
    return parts.gather(0, rank.unsqueeze(0)).squeeze(0)
