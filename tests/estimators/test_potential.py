import itertools
import math
from unittest import mock

import pytest
import torch
from oracles import markov_chain
from torch import Tensor

from fastdiff.estimators import potential


def when_revealed(target: Tensor) -> Tensor:
    """The mean of the terms of a token when it is revealed, over all orders of the target tokens."""
    positions = target.nonzero().squeeze(1).tolist()
    orders = list(itertools.permutations(positions))
    masks = target.repeat(len(orders), 1)
    total = 0
    for step in range(len(positions)):
        at = torch.tensor([order[step] for order in orders])
        revealed = torch.nn.functional.one_hot(at, len(target)).bool()
        total = total + (revealed.unsqueeze(2) * potential.terms(masks)).sum(0)
        masks = masks & ~revealed
    return total / math.factorial(len(positions))


@pytest.mark.parametrize("target", ["1111111", "1", "0110", "101101", "0111010", "1001", "110011", "1111"])
def test_the_mean_over_orders_of_what_is_seen(target: str) -> None:
    where = torch.tensor([c == "1" for c in target])
    n = int(where.sum())
    share = torch.full((1, n), 1 / n, dtype=torch.float64)
    mean = potential.mean_terms(potential.places(where[None]), share)[0, 0]
    torch.testing.assert_close(mean, when_revealed(where))


def test_the_mean_at_a_count_of_what_is_seen() -> None:
    """Two looks, of weights 1 and 3, at every mask of 2 and of 4 of the five target tokens."""
    where = torch.tensor([c == "1" for c in "1101101"])
    masks = where & (torch.arange(128).unsqueeze(1) >> torch.arange(7) & 1 == 1)
    looks = [masks[masks.sum(1) == m].unique(dim=0) for m in (4, 2)]
    seen = [(m.unsqueeze(2) * potential.terms(m)).double().mean(0) for m in looks]
    # A token is masked in 4 of 5 and in 2 of 5 of them, and scored once in so many as the look has weight.
    expected = seen[0] / 4 * 5 + 3 * seen[1] / 2 * 5
    found = potential.mean_terms(potential.places(where[None]), torch.tensor([[0.0, 3, 0, 1, 0]]).double())
    torch.testing.assert_close(found[0, 0], expected)


def fitted(loss: Tensor, seen: Tensor, weight: Tensor, chains: float) -> tuple[Tensor, Tensor]:
    """`fit` on n looks [1, n, L] as one fold."""
    sums, products = potential.moments(loss, seen, weight), potential.products(seen, weight)
    with_fold = potential.Moments(*(part.unsqueeze(1) for part in sums))
    level, slope = potential.fit(with_fold, products.unsqueeze(1), torch.tensor([chains]))
    return level.squeeze(1), slope.squeeze(1)


def every_mask_but_none(length: int) -> Tensor:
    return torch.arange(1, 2**length).unsqueeze(1) >> torch.arange(length) & 1 == 1


def test_what_masks_show_of_a_markov_chain_is_fitted_exactly() -> None:
    """Five tokens, so that closed pairs reach from end to end, and hardly any shrinkage."""
    oracle, mask = markov_chain(4), every_mask_but_none(5)
    x0 = oracle.sample(1, 5, seed=3)
    xt = x0.masked_fill(mask, oracle.mask_index)
    log_c = oracle(xt)[..., : oracle.mask_index].log_softmax(2)
    loss = -log_c.gather(2, x0.expand(len(mask), 5).unsqueeze(2)).squeeze(2)
    seen = potential.terms(mask)
    looks = loss[None], seen[None], mask[None].double()
    small = dict.fromkeys((True, False), 1e-4)
    with mock.patch.multiple(potential, _RIDGE=small, _OWN_RIDGE=1e9, _NOISE=0, _ITERATIONS=200):
        level, slope = fitted(*looks, chains=1e9)
    guess = level + (slope * seen).sum(2)
    assert loss[mask].std() > 0.3
    torch.testing.assert_close(guess[mask], loss[mask], rtol=0, atol=0.01)


def test_parameters_of_pairs_solve_their_equations() -> None:
    torch.manual_seed(0)
    seen = potential.terms(torch.rand(40, 7) < 0.5)
    products = torch.einsum("nlf,nlg->lfg", seen, seen)
    band, ridge = potential._band(products), torch.ones(len(potential._PAIRS), dtype=torch.float64)
    unit = torch.eye(len(ridge) * 7, dtype=torch.float64).view(-1, 7, len(ridge))
    matrix = potential._to_pairs(potential._times(products, potential._to_tokens(unit)))
    torch.testing.assert_close(potential._ahead(band, unit), matrix)
    matrix = (matrix + ridge * unit).flatten(1)
    torch.testing.assert_close(matrix, matrix.T)
    b = torch.randn(2, *unit.shape[1:], dtype=torch.float64)
    with mock.patch.object(potential, "_ITERATIONS", 60):
        x = potential._solve(b, band, ridge)
    torch.testing.assert_close(x.flatten(1), torch.linalg.solve(matrix, b.flatten(1).T).T)


@pytest.mark.parametrize("effect", [0.0, 1.0])
def test_pairs_are_found_among_noise_and_noise_is_not_taken_for_pairs(effect: float) -> None:
    torch.manual_seed(1)
    mask = torch.rand(1, 60, 40) < 0.5
    seen, true = potential.terms(mask), effect * potential._to_tokens(torch.randn(40, len(potential._PAIRS)).double())
    loss = torch.randn(1, 60, 40).double() + (seen * true).sum(3)
    level, slope = fitted(loss, seen, mask.double(), chains=20)
    told, missed = (seen * true).sum(3), level + (seen * (slope - true)).sum(3)
    assert missed[mask].square().mean() < 0.1 + 0.25 * told[mask].var()


def test_nothing_seen_gives_nothing() -> None:
    loss = torch.zeros(1, 0, 6, dtype=torch.float64)
    for part in fitted(loss, loss.new_zeros(1, 0, 6, len(potential._TERMS)), loss, chains=0):
        assert (part == 0).all()


def test_opcheck() -> None:
    mask, options = torch.rand(2, 5, 2, 6) < 0.5, dict(dtype=torch.float64)
    loss, weight = torch.rand(2, 5, 2, 6, requires_grad=True, **options), torch.rand(2, 5, 2, 1, **options) * mask
    with mock.patch.object(potential, "fit_controls", wraps=potential.fit_controls) as called:
        potential.fused_fits(loss, mask, weight, 5)
    torch.library.opcheck(torch.ops.fastdiff.fit_controls.cpu, called.call_args.args)
