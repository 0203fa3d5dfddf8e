"""A cheap guess of each token's loss from which tokens around it are visible, fitted to losses seen.

If conditionals agree with one distribution, losses are differences of one function of the set S of visible tokens,
loss_i = log p(S) - log p(S with i). So the guess is made of differences too, of

    f(S) = sum_i a_i [i visible] + sum_ij e_ij [i and j visible, and, where the pair is closed, nothing between them].

A parameter e_ij serves the losses of i and j, which gain from each other alike, and of what lies between, whose sight
parts a closed pair: three tokens' losses to be fitted on, not one's. Of a Markov chain f is log p, but for the reach of
its pairs. A network's conditionals agree but nearly, so each token may depart from f a little.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_CLOSED, _OPEN = (1, 2, 3, 4), (2, 3)  # distances of pairs; those at distance 1 have nothing between them
_RIDGE = {True: 0.5, False: 5.0}  # observations of a token that count as much as what pairs of a kind have in common
_OWN_RIDGE = 2.0  # observations of a token that count as much as f
_NOISE = 2.0  # times what independent observations would have: a chain's looks, and a look's tokens, err alike
_DOUBT = 0.7  # chains that are fitted on, as many as which halve the slopes
_ITERATIONS = 16


class _Term(NamedTuple):
    """What a pair's parameter does to the loss of a token i: +-1 where some tokens are visible and others are not.

    `pair` counts the kinds of pairs; offsets are from i, `left` that of the pair's left end.
    """

    pair: int
    left: int
    visible: tuple[int, ...]
    hidden: tuple[int, ...]
    sign: int


def _terms() -> list[_Term]:
    found = []
    for pair, (distance, closed) in enumerate(_PAIRS):
        for left in range(-distance, 1):
            ends, between = {left, left + distance}, set(range(left + 1, left + distance)) if closed else set()
            if 0 in ends | between:
                found.append(_Term(pair, left, tuple(ends - {0}), tuple(between - {0}), 1 if 0 in ends else -1))
    return found


_PAIRS = [(distance, True) for distance in _CLOSED] + [(distance, False) for distance in _OPEN]
_TERMS = _terms()
_NEAR = [column for column, term in enumerate(_TERMS) if _PAIRS[term.pair][0] <= 2]  # a token's own


class Moments(NamedTuple):
    """Sums over looks at a token [..., L]: observations, weight, loss, its square, terms, their products, and with the
    loss."""

    number: Tensor
    weight: Tensor
    loss: Tensor
    square: Tensor
    terms: Tensor
    products: Tensor
    with_loss: Tensor


def terms(mask: Tensor) -> Tensor:
    """What each pair does to the loss of each token, under a mask [..., L]: [..., L, terms] in {-1, 0, 1}."""
    visible, hidden = (~mask).float(), mask.float()
    columns = []
    for term in _TERMS:
        column = torch.full_like(visible, term.sign)
        for offset in term.visible:
            column = column * _at(visible, offset)
        for offset in term.hidden:
            column = column * _at(hidden, offset)
        columns.append(column)
    return torch.stack(columns, -1)


def mean_terms(target: Tensor) -> Tensor:
    """The mean of `terms` when a token is revealed, over random orders of the target tokens [..., L].

    Of a target tokens that must come before i and b after, all do in a! b! / (a + b + 1)! of the orders. The others
    are always visible.
    """
    inside = torch.ones_like(target)
    columns = []
    for term in _TERMS:
        possible, before = inside, torch.zeros_like(target, dtype=torch.int64)
        for offset in term.visible:
            possible, before = possible & _at(inside, offset), before + _at(target, offset)
        for offset in term.hidden:
            possible = possible & _at(target, offset)
        after = len(term.hidden)
        share = [math.factorial(a) * math.factorial(after) / math.factorial(a + after + 1) for a in range(3)]
        columns.append(possible * term.sign * torch.tensor(share, dtype=torch.float32, device=target.device)[before])
    return torch.stack(columns, -1)


def moments(loss: Tensor, seen: Tensor, weight: Tensor) -> Moments:
    """Of n looks: losses and their weights [K, n, L], 0 where there is none, and terms [K, n, L, terms]."""
    weighted = weight.unsqueeze(-1) * seen
    return Moments(
        (weight > 0).sum(1).float(),
        weight.sum(1),
        (weight * loss).sum(1),
        (weight * loss.detach() ** 2).sum(1),
        weighted.sum(1),
        weighted.permute(0, 2, 3, 1) @ seen.transpose(1, 2),
        (weighted * loss.unsqueeze(-1)).sum(1),
    )


def fit(sums: Moments, chains: Tensor) -> tuple[Tensor, Tensor]:
    """What a token's loss is with no term [..., L], and the slopes of its terms [..., L, terms], by least squares.

    First what all pairs of a kind have in common is fitted, then what each pair adds to it, then what each token does
    on its own with what is near, both shrunk to 0 and by what noise would explain; and all by what few `chains` [folds]
    are trusted with. Gradients pass but through the first and the last, and there unshrunk by noise.
    """
    per_weight = 1 / sums.weight.clamp(min=1e-30)
    mean_loss, mean_seen = sums.loss * per_weight, sums.terms * per_weight.unsqueeze(-1)
    number = sums.number.sum(-1)
    centred = _Centred(
        (sums.square - sums.loss.detach() * mean_loss.detach()).sum(-1),
        sums.products - sums.terms.unsqueeze(-1) * mean_seen.unsqueeze(-2),
        sums.with_loss - sums.terms * mean_loss.unsqueeze(-1),
        number,
        (sums.weight.sum(-1) / number).nan_to_num(1.0)[..., None, None],  # without any nothing is subtracted
    )
    slope = _alike(centred)
    with torch.no_grad():  # for the losses' gradients are no differences of one function
        pairs, used = _of_pairs(centred, slope)
        pairs = pairs * _share(centred, slope, pairs, used)
    slope = slope + pairs
    own, used = _of_tokens(centred, slope)
    slope = slope + own + (_share(centred, slope, own, used) - 1) * own.detach()  # a gradient is subtracted in full
    chains = chains.to(slope.dtype)
    slope = slope * (chains / (chains + _DOUBT)).view(-1, 1, 1)
    return mean_loss - (slope * mean_seen).sum(-1), slope


class _Centred(NamedTuple):
    """Sums about the means, of the losses' squares [...], of products and with the loss, observations [...], and the
    mean weight of one [..., 1, 1]."""

    squares: Tensor
    products: Tensor
    with_loss: Tensor
    number: Tensor
    observation: Tensor

    def left(self, slope: Tensor) -> Tensor:
        """`with_loss` of what slopes leave of the losses."""
        return self.with_loss - _times(self.products, slope)


def _alike(sums: _Centred) -> Tensor:
    """Slopes of a sequence whose pairs of a kind have one parameter."""
    kind = torch.tensor([term.pair for term in _TERMS], device=sums.products.device)
    kind = torch.nn.functional.one_hot(kind).float()
    alike = kind.T @ sums.products.sum(-3) @ kind + sums.observation * torch.eye(
        len(_PAIRS), dtype=kind.dtype, device=kind.device
    )
    slope = torch.linalg.solve(alike, sums.with_loss.sum(-2) @ kind) @ kind.T
    return slope.unsqueeze(-2).expand_as(sums.with_loss)


def _of_pairs(sums: _Centred, slope: Tensor) -> tuple[Tensor, Tensor]:
    """What each pair adds to slopes, and how many parameters that takes [...]."""
    ridge = sums.observation * slope.new_tensor([_RIDGE[closed] for _, closed in _PAIRS]).unsqueeze(1)
    seen = _to_pairs(sums.products.diagonal(dim1=-2, dim2=-1))
    return _to_tokens(_solve(_to_pairs(sums.left(slope)), sums.products, ridge)), (seen / (seen + ridge)).sum((-2, -1))


def _of_tokens(sums: _Centred, slope: Tensor) -> tuple[Tensor, Tensor]:
    """What each token's own near terms add, likewise."""
    near = sums.products[..., _NEAR, :][..., _NEAR]
    shrunk = near + _OWN_RIDGE * sums.observation.unsqueeze(-1) * torch.eye(
        len(_NEAR), dtype=near.dtype, device=near.device
    )
    own = torch.linalg.solve(shrunk, sums.left(slope)[..., _NEAR])
    used = torch.linalg.solve(shrunk, near).diagonal(dim1=-2, dim2=-1).sum((-2, -1))
    return torch.zeros_like(slope).index_add(-1, torch.tensor(_NEAR, device=slope.device), own), used


@torch.no_grad()
def _share(sums: _Centred, slope: Tensor, more: Tensor, used: Tensor) -> Tensor:
    """The share of `more` slopes to take: all but what `used` parameters would explain of noise (James and Stein)."""
    explained, both = (more * sums.left(slope)).sum((-2, -1)), slope + more
    squares = sums.squares - (both * (sums.with_loss + sums.left(both))).sum((-2, -1))
    noise = squares.clamp(min=0) / (sums.number - used).clamp(min=1)
    return (1 - _NOISE * used * noise / explained.clamp(min=1e-30)).clamp(0, 1)[..., None, None]


def _solve(b: Tensor, products: Tensor, ridge: Tensor) -> Tensor:
    """x with (products, as they are of pairs, + ridge) x = b, nearly, by conjugate gradients."""
    scale = 1 / (_to_pairs(products.diagonal(dim1=-2, dim2=-1)) + ridge)
    x, residual, direction, before = torch.zeros_like(b), b, torch.zeros_like(b), torch.ones_like(b[..., :1, :1])
    for _ in range(_ITERATIONS):
        scaled = scale * residual
        size = (residual * scaled).sum((-2, -1), keepdim=True)
        direction = scaled + size / before * direction
        ahead = _to_pairs(_times(products, _to_tokens(direction))) + ridge * direction
        step = size / (direction * ahead).sum((-2, -1), keepdim=True).clamp(min=1e-30)
        x, residual, before = x + step * direction, residual - step * ahead, size.clamp(min=1e-30)
    return x


def _times(products: Tensor, slope: Tensor) -> Tensor:
    return (products @ slope.unsqueeze(-1)).squeeze(-1)


def _to_tokens(pairs: Tensor) -> Tensor:
    """The slopes of tokens' terms [..., L, terms] from parameters [..., pairs, L] of pairs, each at its left end."""
    where, _ = _places(pairs.shape[-1])
    return _gathered(pairs, where.to(pairs.device))


def _to_pairs(slopes: Tensor) -> Tensor:
    """The transpose of `_to_tokens`."""
    _, where = _places(slopes.shape[-2])
    return _gathered(slopes, where.to(slopes.device)).sum(-1)


def _gathered(x: Tensor, where: Tensor) -> Tensor:
    """x [..., n, m] at places in 0..n*m-1, or n*m for 0: [..., *where.shape]."""
    flat = torch.nn.functional.pad(x.flatten(-2), (0, 1))
    return flat.index_select(-1, where.flatten()).unflatten(-1, where.shape)


@lru_cache(maxsize=64)
def _places(length: int) -> tuple[Tensor, Tensor]:
    """Where the pair of a token's term is among pairs and left ends [L, terms], and the terms of a pair among tokens
    and terms [pairs, L, most terms]."""
    token = torch.arange(length, device="cpu")
    nowhere_pair, nowhere_term = len(_PAIRS) * length, len(_TERMS) * length
    to_tokens = torch.full((length, len(_TERMS)), nowhere_pair, device="cpu")
    to_pairs = torch.full((len(_PAIRS), length, max(_CLOSED) + 1), nowhere_term, device="cpu")
    for column, term in enumerate(_TERMS):
        left = token + term.left
        inside = (left >= 0) & (left < length)
        to_tokens[inside, column] = term.pair * length + left[inside]
        to_pairs[term.pair, left[inside], -term.left] = token[inside] * len(_TERMS) + column
    return to_tokens, to_pairs


def _at(x: Tensor, offset: int) -> Tensor:
    """x[..., i + offset] at i, 0 beyond the ends."""
    return torch.nn.functional.pad(x, (-min(offset, 0), max(offset, 0)))[..., max(offset, 0) :][..., : x.shape[-1]]
