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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CLOSED, _OPEN = (1, 2, 3, 4), (2, 3)  # distances of pairs; those at distance 1 have nothing between them
_RIDGE = {
    True: 0.5,
    False: 5.0,
}  # observations of a token that count as much as what pairs of a distance have in common
_OWN_RIDGE = 5.0  # observations of a token that count as much as f
_DOUBT = 1.5  # chains that are fitted on, as many as which halve the slopes
_ITERATIONS = 12


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
_NEAR = [column for column, term in enumerate(_TERMS) if _PAIRS[term.pair] in ((1, True), (2, True))]  # a token's own


class Moments(NamedTuple):
    """Sums over looks at a token [..., L]: observations, weight, loss, terms, their products, and with the loss."""

    number: Tensor
    weight: Tensor
    loss: Tensor
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
        columns.append(possible * term.sign * torch.tensor(share, device=target.device)[before])
    return torch.stack(columns, -1)


def moments(loss: Tensor, seen: Tensor, weight: Tensor) -> Moments:
    """Of n looks: losses and their weights [K, n, L], 0 where there is none, and terms [K, n, L, terms]."""
    weighted = weight.unsqueeze(-1) * seen
    return Moments(
        (weight > 0).sum(1).float(),
        weight.sum(1),
        (weight * loss).sum(1),
        weighted.sum(1),
        weighted.permute(0, 2, 3, 1) @ seen.transpose(1, 2),
        (weighted * loss.unsqueeze(-1)).sum(1),
    )


def fit(sums: Moments, chains: Tensor) -> tuple[Tensor, Tensor]:
    """What a token's loss is with no term [..., L], and the slopes of its terms [..., L, terms], by least squares.

    First what all pairs of a kind have in common is fitted, then what each pair adds to it, then what each token does
    on its own with what is near, both shrunk to 0; and all by what few `chains` [folds] are trusted with.
    """
    per_weight = 1 / sums.weight.clamp(min=1e-30)
    mean_loss, mean_seen = sums.loss * per_weight, sums.terms * per_weight.unsqueeze(-1)
    products = sums.products - sums.terms.unsqueeze(-1) * mean_seen.unsqueeze(-2)
    with_loss = sums.with_loss - sums.terms * mean_loss.unsqueeze(-1)
    observation = (sums.weight.sum(-1) / sums.number.sum(-1)).nan_to_num(1.0)  # without any nothing is subtracted
    observation = observation[..., None, None]

    kind = torch.nn.functional.one_hot(torch.tensor([term.pair for term in _TERMS], device=products.device)).float()
    unit = torch.eye(len(_PAIRS), device=products.device)
    alike = kind.T @ products.sum(-3) @ kind + observation * unit
    common = torch.linalg.solve(alike, with_loss.sum(-2) @ kind) @ kind.T
    slope = common.unsqueeze(-2).expand_as(with_loss)

    ridge = torch.tensor([_RIDGE[closed] for _, closed in _PAIRS], device=products.device).unsqueeze(1)
    pairs: Tensor = _Solve.apply(_to_pairs(with_loss - _times(products, slope)), products, observation * ridge)
    slope = slope + _to_tokens(pairs)

    ridge = _OWN_RIDGE * observation.unsqueeze(-1) * torch.eye(len(_NEAR), device=products.device)
    left = (with_loss - _times(products, slope))[..., _NEAR]
    own = torch.linalg.solve(products[..., _NEAR, :][..., _NEAR] + ridge, left)
    slope = slope.index_add(-1, torch.tensor(_NEAR, device=slope.device), own)
    slope = slope * (chains / (chains + _DOUBT)).view(-1, 1, 1)
    return mean_loss - (slope * mean_seen).sum(-1), slope


class _Solve(torch.autograd.Function):
    """Parameters of pairs [..., pairs, L] from sums with the loss and products: linear in the first, and symmetric."""

    @staticmethod
    def forward(ctx: Any, with_loss: Tensor, products: Tensor, ridge: Tensor) -> Tensor:
        ctx.save_for_backward(products, ridge)
        return _conjugate_gradients(with_loss, products, ridge)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _conjugate_gradients(gradient, *ctx.saved_tensors), None, None


def _conjugate_gradients(b: Tensor, products: Tensor, ridge: Tensor) -> Tensor:
    """x with (products, as they are of pairs, + ridge) x = b, nearly; diagonally preconditioned."""
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
