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
from torch.nn.functional import embedding, one_hot, pad

from fastdiff.ops.fit_controls import fit_controls

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
    """By their left ends, and then by pairs."""
    found = []
    for pair, (distance, closed) in enumerate(_PAIRS):
        for left in range(-distance, 1):
            ends, between = {left, left + distance}, set(range(left + 1, left + distance)) if closed else set()
            if 0 in ends | between:
                found.append(_Term(pair, left, tuple(ends - {0}), tuple(between - {0}), 1 if 0 in ends else -1))
    return sorted(found, key=lambda term: (term.left, term.pair))


class _Run(NamedTuple):
    """Terms of one left end and of successive pairs: the first of each, and how many."""

    left: int
    pair: int
    column: int
    number: int


def _runs() -> list[_Run]:
    runs: list[_Run] = []
    for column, term in enumerate(_TERMS):
        last = runs[-1] if runs else None
        if last and (last.left, last.pair + last.number) == (term.left, term.pair):
            runs[-1] = last._replace(number=last.number + 1)
        else:
            runs.append(_Run(term.left, term.pair, column, 1))
    return runs


_PAIRS = [(distance, True) for distance in _CLOSED] + [(distance, False) for distance in _OPEN]
_REACH = max(_CLOSED)
_AROUND = [offset for offset in range(-_REACH, _REACH + 1) if offset]
_TERMS = _terms()
_RUNS = _runs()
_NEAR = [column for column, term in enumerate(_TERMS) if _PAIRS[term.pair][0] <= 2]  # a token's own


class Moments(NamedTuple):
    """Sums over looks at a token [..., L]: observations, weight, loss, its square, terms, and these with the loss."""

    number: Tensor
    weight: Tensor
    loss: Tensor
    square: Tensor
    terms: Tensor
    with_loss: Tensor


def terms(mask: Tensor) -> Tensor:
    """What each pair does to the loss of each token, under a mask [..., L]: [..., L, terms] float64 in {-1, 0, 1}."""
    return embedding(_codes(mask), _table(mask.device))


def _codes(mask: Tensor) -> Tensor:
    """Which tokens of `_AROUND` each are visible under a mask [..., L], as bits of a number: [..., L] int64."""
    visible, length = pad(~mask, (_REACH, _REACH)), mask.shape[-1]
    code = torch.zeros_like(mask, dtype=torch.int64)
    for bit, offset in enumerate(_AROUND):
        code += visible[..., _REACH + offset :][..., :length].long() << bit
    return code


@lru_cache(maxsize=16)
def _table(device: torch.device) -> Tensor:
    """The terms of a token, by its code: [codes, terms]."""
    number = torch.arange(2 ** len(_AROUND), device="cpu")
    visible = {offset: (number >> bit & 1).double() for bit, offset in enumerate(_AROUND)}
    columns = []
    for term in _TERMS:
        column = torch.full_like(visible[1], term.sign)
        for offset in term.visible:
            column = column * visible[offset]
        for offset in term.hidden:
            column = column * (1 - visible[offset])
        columns.append(column)
    return torch.stack(columns, 1).to(device)


def places(target: Tensor) -> Tensor:
    """Which terms of each target token [K, L] can be other than 0, by how many targets must be visible for it, none,
    one or two: [K, L, terms, 3] float64 in {-1, 0, 1}. What is no target is always visible."""
    inside, columns = torch.ones_like(target), []
    for term in _TERMS:
        possible, visible = target, torch.zeros_like(target, dtype=torch.int64)
        for offset in term.visible:
            possible, visible = possible & _at(inside, offset), visible + _at(target, offset)
        for offset in term.hidden:
            possible = possible & _at(target, offset)
        columns.append(term.sign * possible.unsqueeze(2) * one_hot(visible, 3))
    return torch.stack(columns, 2).double()


def mean_terms(places: Tensor, weight: Tensor) -> Tensor:
    """The mean of `terms` of a token with such `places` [K, L, terms, 3] where it is scored, over random masks of
    m = 1..n of n target tokens with weights [R, n]: [K, R, L, terms].

    Of its n - 1 others m - 1 are masked: v of them are visible and h hidden in a share (n - m)_v (m - 1)_h /
    (n - 1)_(v + h) of the masks, with falling factorials.
    """
    n = weight.shape[1]
    m = torch.arange(1, n + 1, dtype=torch.float64, device=weight.device)
    share = [
        torch.stack([_falling(n - m, v) * _falling(m - 1, h) / max(math.perm(n - 1, v + h), 1) for v in range(3)], 1)
        for h in range(_REACH)
    ]
    of_terms = torch.stack([share[len(term.hidden)] for term in _TERMS], 1)  # [n, terms, 3]
    return torch.einsum("rn,ntv,kltv->krlt", weight, of_terms, places)


def _falling(n: Tensor, k: int) -> Tensor:
    """n (n - 1) ... (n - k + 1), 0 where k > n."""
    product = torch.ones_like(n, dtype=torch.float64)
    for i in range(k):
        product = product * (n - i).clamp(min=0)
    return product


def moments(loss: Tensor, seen: Tensor, weight: Tensor) -> Moments:
    """Of n looks: losses and their weights [K, n, L], 0 where there is none, and terms [K, n, L, terms]."""
    weighted = weight * loss
    return Moments(
        (weight > 0).sum(1).double(),
        weight.sum(1),
        weighted.sum(1),
        (weighted * loss).detach().sum(1),
        (weight.unsqueeze(-1) * seen).sum(1),
        (seen * weighted.unsqueeze(-1)).sum(1),
    )


def products(seen: Tensor, weight: Tensor) -> Tensor:
    """Sums of the products of terms over looks, as `moments`: [K, L, terms, terms]."""
    return (weight.unsqueeze(-1) * seen).permute(0, 2, 3, 1) @ seen.transpose(1, 2)


def fused_fits(loss: Tensor, mask: Tensor, weight: Tensor, folds: int) -> tuple[Tensor, Tensor]:
    """`fit` for each of the folds, on the looks of all other chains, by a kernel: levels [K, folds, L] and slopes
    [K, folds, L, terms] from losses, masks and weights [K, chains, looks, L], where chain r is of fold r % folds."""
    pair, left = torch.tensor([(term.pair, term.left) for term in _TERMS], device=loss.device).T.contiguous()
    near = torch.tensor(_NEAR, device=loss.device)
    ridge = torch.tensor([_RIDGE[closed] for _, closed in _PAIRS], dtype=torch.float64, device=loss.device)
    looks = (x.contiguous() for x in (loss, _codes(mask), weight))
    constants = _OWN_RIDGE, _NOISE, _DOUBT, _ITERATIONS
    return fit_controls(*looks, folds, _table(loss.device), pair, left, near, ridge, *constants)


def fit(sums: Moments, products: Tensor, chains: Tensor) -> tuple[Tensor, Tensor]:
    """What a token's loss is with no term [..., L], and the slopes of its terms [..., L, terms], by least squares.

    First what all pairs of a kind have in common is fitted, then what each pair adds to it, then what each token does
    on its own with what is near, both shrunk to 0 and by what noise would explain; by what few `chains` [folds] are
    trusted with; and all, with what tells a token's mean from the others', by what noise would explain. That is all
    spread within tokens, or, where there are more observations than terms, the full mask's aside, which chains share,
    what pairs leave of it. Gradients pass but through the first, the last and the means, and there unshrunk by noise.
    """
    per_weight, number = 1 / sums.weight.clamp(min=1e-30), sums.number.sum(-1)
    common = (sums.loss.sum(-1) / sums.weight.sum(-1).clamp(min=1e-30)).unsqueeze(-1)
    mean_loss = torch.where(sums.weight > 0, sums.loss * per_weight - common, 0)
    mean_seen = sums.terms * per_weight.unsqueeze(-1)
    squares = sums.square - sums.loss.detach() * (mean_loss.detach() + common.detach())
    centred = _Centred(
        squares.sum(-1),
        torch.addcmul(products, sums.terms.unsqueeze(-1), mean_seen.unsqueeze(-2), value=-1),
        sums.with_loss - sums.terms * (mean_loss + common).unsqueeze(-1),
        number,
        (sums.weight.sum(-1) / number).nan_to_num(1.0),  # without any nothing is subtracted
    )
    slope, left = _slopes(centred)
    chains = chains.to(slope.dtype)
    slope = slope * (chains / (chains + _DOUBT)).view(-1, 1, 1)
    level = mean_loss - (slope * mean_seen).sum(-1)
    explained = (sums.weight * mean_loss.detach() ** 2).sum(-1)
    tokens = (sums.number > 0).sum(-1)
    noise = torch.where(number < (chains + len(_TERMS)) * tokens, centred.squares, left)
    share = _share(explained, noise, tokens, number)
    more = share.unsqueeze(-1) - 1
    return common + level + more * level.detach(), slope + more.unsqueeze(-1) * slope.detach()


class _Centred(NamedTuple):
    """Sums about the means, of the losses' squares [...], of products and with the loss, observations [...], and the
    mean weight of one [...]."""

    squares: Tensor
    products: Tensor
    with_loss: Tensor
    number: Tensor
    observation: Tensor


def _slopes(sums: _Centred) -> tuple[Tensor, Tensor]:
    """The slopes of tokens' terms [..., L, terms], and the squares that pairs leave [...]."""
    alike, pairs, squares = _of_pairs(sums)
    near, own_near = sums.products[..., _NEAR, :], sums.products[..., _NEAR, :][..., _NEAR]
    left = sums.with_loss[..., _NEAR] - _times(near, pairs) - _times(near @ _kinds(near), alike.unsqueeze(-2))
    ridge = _OWN_RIDGE * sums.observation[..., None, None]
    inverse = torch.linalg.inv(own_near + ridge.unsqueeze(-1) * _eye(near, len(_NEAR)))
    own = _times(inverse, left)
    used = (1 - ridge * inverse.diagonal(dim1=-2, dim2=-1)).sum((-2, -1))
    with torch.no_grad():
        least = squares - (own * (2 * left - _times(own_near, own))).sum((-2, -1))
        share = _share((own * left).sum((-2, -1)), least, used, sums.number)[..., None, None]
    own = own + (share - 1) * own.detach()  # a gradient is subtracted in full
    slope = pairs + (alike @ _kinds(alike).T).unsqueeze(-2)
    return slope.index_add(-1, torch.tensor(_NEAR, device=own.device), own), squares


def _of_pairs(sums: _Centred) -> tuple[Tensor, Tensor, Tensor]:
    """The parameters that pairs of a kind share [..., pairs]; the slopes that each pair adds [..., L, terms], without
    gradients, which are no differences of one function; and the squares that are left [...]."""
    band, told = _band(sums.products), _to_pairs(sums.with_loss)
    same = band.sum((-4, -2)) + sums.observation[..., None, None] * _eye(band, len(_PAIRS))
    alike = torch.linalg.solve(same, told.sum(-2))
    with torch.no_grad():
        first = alike.unsqueeze(-2).expand_as(told)
        ridge = sums.observation[..., None, None] * band.new_tensor([_RIDGE[closed] for _, closed in _PAIRS])
        left = told - _ahead(band, first)
        more = _solve(left, band, ridge)
        gain, explained = _ahead(band, more), (more * left).sum((-2, -1))
        squares = sums.squares - (first * (told + left)).sum((-2, -1))
        seen = band[..., _REACH, :].diagonal(dim1=-2, dim2=-1)
        used = (seen / (seen + ridge)).sum((-2, -1))
        least = squares - 2 * explained + (more * gain).sum((-2, -1))
        share = _share(explained, least, used, sums.number)
        squares = squares - 2 * share * explained + share**2 * (more * gain).sum((-2, -1))
        return alike, _to_tokens(share[..., None, None] * more), squares


def _kinds(like: Tensor) -> Tensor:
    """1 where a term is of a pair: [terms, pairs]."""
    kind = torch.tensor([term.pair for term in _TERMS], device=like.device)
    return one_hot(kind).to(like.dtype)


def _eye(like: Tensor, n: int) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def _share(explained: Tensor, squares: Tensor, used: Tensor, number: Tensor) -> Tensor:
    """The share of slopes to take: all but what `used` parameters would explain of noise (James and Stein)."""
    noise = squares.clamp(min=0) / (number - used).clamp(min=1)
    return (1 - _NOISE * used * noise / explained.clamp(min=1e-30)).clamp(0, 1)


def _solve(b: Tensor, band: Tensor, ridge: Tensor) -> Tensor:
    """x with (band + ridge) x = b, nearly, by conjugate gradients: x and b [..., L, pairs]."""
    scale = 1 / (band[..., _REACH, :].diagonal(dim1=-2, dim2=-1) + ridge)
    x, residual, direction, before = torch.zeros_like(b), b, torch.zeros_like(b), torch.ones_like(b[..., :1, :1])
    for _ in range(_ITERATIONS):
        scaled = scale * residual
        size = (residual * scaled).sum((-2, -1), keepdim=True)
        direction = scaled + size / before * direction
        ahead = _ahead(band, direction) + ridge * direction
        step = size / (direction * ahead).sum((-2, -1), keepdim=True).clamp(min=1e-30)
        x, residual, before = x + step * direction, residual - step * ahead, size.clamp(min=1e-30)
    return x


def _band(products: Tensor) -> Tensor:
    """The products [..., L, terms, terms] of tokens as those of pairs: [..., L, pairs, 2 reach + 1, pairs], of each
    with those whose left ends are up to the reach away."""
    length = products.shape[-3]
    band = products.new_zeros(*products.shape[:-2], len(_PAIRS), 2 * _REACH + 1, len(_PAIRS))
    for row in _RUNS:
        rows = slice(row.pair, row.pair + row.number)
        for column in _RUNS:
            part = products[..., row.column : row.column + row.number, column.column : column.column + column.number]
            columns = slice(column.pair, column.pair + column.number)
            band[..., : max(length + row.left, 0), rows, _REACH + column.left - row.left, columns] += part[
                ..., -row.left :, :, :
            ]
    return band


def _ahead(band: Tensor, pairs: Tensor) -> Tensor:
    """What a band makes of pairs' parameters [..., L, pairs]."""
    around = pad(pairs, (0, 0, _REACH, _REACH)).unfold(-2, 2 * _REACH + 1, 1).transpose(-2, -1)
    return _times(band.flatten(-2), around.flatten(-2))


def _times(products: Tensor, slope: Tensor) -> Tensor:
    return (products @ slope.unsqueeze(-1)).squeeze(-1)


def _to_tokens(pairs: Tensor) -> Tensor:
    """The slopes of tokens' terms [..., L, terms] from parameters [..., L, pairs] of pairs, each at its left end."""
    return torch.stack([_at(pairs[..., term.pair], term.left) for term in _TERMS], -1)


def _to_pairs(slopes: Tensor) -> Tensor:
    """The transpose of `_to_tokens`."""
    columns = [torch.zeros_like(slopes[..., 0]) for _ in _PAIRS]
    for column, term in enumerate(_TERMS):
        columns[term.pair] = columns[term.pair] + _at(slopes[..., column], -term.left)
    return torch.stack(columns, -1)


def _at(x: Tensor, offset: int) -> Tensor:
    """x[..., i + offset] at i, 0 beyond the ends."""
    return pad(x, (-min(offset, 0), max(offset, 0)))[..., max(offset, 0) :][..., : x.shape[-1]]
