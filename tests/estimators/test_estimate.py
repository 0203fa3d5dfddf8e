import dataclasses
import json
import math

import pytest
import torch
from oracles import markov_chain, mixture

from fastdiff.estimators import NLLEstimate, time_free_nll
from fastdiff.estimators.estimate import mean_of_independent, student_t


def estimate_of(nll: list[float], stderr: list[float], freedom: list[float]) -> NLLEstimate:
    value, error, degrees = (torch.tensor(column, dtype=torch.float64) for column in (nll, stderr, freedom))
    return NLLEstimate(value, error, torch.tensor([4, 8]), torch.tensor([15, 33]), degrees, 0 * value)


def test_units_of_an_estimate() -> None:
    estimate = estimate_of([4 * math.log(2), 8.0], [0.0, 0.5], [math.inf, 7])
    assert estimate.bits_per_token.tolist() == pytest.approx([1, 1 / math.log(2)])
    assert estimate.bits_per_token_stderr.tolist() == pytest.approx([0, 0.5 / 8 / math.log(2)])
    assert estimate.perplexity.tolist() == pytest.approx([2, math.e])
    low, high = estimate.interval(0.95)
    assert low.tolist() == pytest.approx([4 * math.log(2), 8 - 2.364624 * 0.5], rel=1e-6)
    assert high.tolist() == pytest.approx([4 * math.log(2), 8 + 2.364624 * 0.5], rel=1e-6)


def test_pooled_sequences_add_up() -> None:
    pooled = estimate_of([3.0, 8.0], [0.3, 0.4], [5, 7]).pooled()
    assert pooled.nll.tolist() == [11]
    assert pooled.stderr.tolist() == pytest.approx([0.5])
    assert pooled.num_tokens.tolist() == [12]
    assert pooled.num_forwards.tolist() == [48]
    assert pooled.degrees_of_freedom.tolist() == pytest.approx([0.25**2 / (0.09**2 / 5 + 0.16**2 / 7)])
    assert estimate_of([3.0, 8.0], [0, 0], [math.inf, math.inf]).pooled().interval()[1].tolist() == [11]


def test_tokens_of_pooled_sequences_are_those_of_one_text() -> None:
    tokens = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 1.0]])
    one = dataclasses.replace(estimate_of([3.0, 8.0], [0.3, 0.4], [5, 7]), token_nll=tokens)
    assert one.pooled().token_nll.tolist() == [[1, 2, 0, 3, 4, 1]]
    assert "token_nll" not in one.to_dict()


@pytest.mark.parametrize(("largest", "share", "most"), [(None, 0.0, 0.96), (3.0, 0.64, 0.98)])
def test_errors_are_drawn_to_their_mean_by_what_their_degrees_of_freedom_explain(largest, share, most) -> None:
    """Of equal spreads, and of uniform ones, whose squares v have var v / (var v + E v^2 / 4) = 0.64."""
    torch.manual_seed(0)
    spread = 1.0 if largest is None else largest * torch.rand(3000, 1, dtype=torch.float64)
    nll, stderr, freedom = mean_of_independent(spread * torch.randn(3000, 9, dtype=torch.float64))
    size = torch.full((3000,), 10)
    one = NLLEstimate(nll, stderr, size, size, freedom, 0 * nll).moderated()
    low, high = one.interval()
    assert 0.94 < ((low <= 0) & (high >= 0)).double().mean().item() < most
    squares, own = one.stderr**2, stderr**2
    assert squares.mean().item() == pytest.approx(own.mean().item())
    assert squares.std().item() / own.std().item() == pytest.approx(share, abs=0.1)


def test_errors_of_0_and_single_ones_are_not_drawn() -> None:
    one = estimate_of([3.0, 8.0], [0.0, 0.4], [math.inf, 7])
    assert one.moderated() is one
    three = dataclasses.replace(
        estimate_of([3.0, 8.0, 9.0], [0.0, 0.4, 0.6], [math.inf, 7, 7]), num_tokens=torch.tensor([4, 8, 8])
    ).moderated()
    assert three.stderr[0] == 0
    assert 0.4 < three.stderr[1] < three.stderr[2] < 0.6
    assert three.stderr[1:].square().sum().item() == pytest.approx(0.4**2 + 0.6**2)


def test_rare_masks_that_one_estimate_misses_others_tell_of() -> None:
    """Degrees of freedom, in harmonic mean, are two thirds of the masks where errors are normal, and tell of tails."""
    lengths, tails = {"chain": 32, "mixture": 48}, {}
    for name, oracle in (("chain", markov_chain(8)), ("mixture", mixture(48, 6, components=4))):
        x0 = oracle.sample(32, lengths[name], seed=77)
        found = [time_free_nll(oracle, x0, mask_index=oracle.mask_index, num_samples=16, seed=i) for i in range(6)]
        tails[name] = len(found) * 32 / sum((1 / e.degrees_of_freedom).sum().item() for e in found) / 15
        truth = oracle.nll(x0).repeat(len(found))
        own, moderated = (holding(some, truth) for some in (found, [e.moderated() for e in found]))
        assert own < 0.93 if name == "mixture" else 0.93 < own < 0.99
        assert moderated > 0.95
    assert tails["mixture"] < 0.55 < 0.6 < tails["chain"] < 0.7


def holding(found: list[NLLEstimate], truth: torch.Tensor) -> float:
    low, high = (torch.cat(bounds) for bounds in zip(*(e.interval() for e in found), strict=True))
    return ((low <= truth) & (truth <= high)).double().mean().item()


def test_an_estimate_goes_to_json_and_back() -> None:
    estimate = estimate_of([3.0, 8.0], [0.0, 0.4], [math.inf, 7])
    assert estimate.token_nll is None
    record = json.loads(json.dumps(estimate.to_dict(), allow_nan=False))
    assert record["nll"] == [3, 8]
    assert record["high"] == pytest.approx([3, 8 + 2.364624 * 0.4], rel=1e-6)
    assert record["num_forwards"] == [15, 33]


@pytest.mark.parametrize(
    ("level", "freedom", "t"),
    [
        (0.95, 1, 12.7062047362),
        (0.95, 2, 4.30265272991),
        (0.95, 7, 2.36462425101),
        (0.95, 30, 2.04227245630),
        (0.95, 120, 1.97993040505),
        (0.95, math.inf, 1.95996398454),
        (0.5, 4, 0.740697084),
        (0.9, 9, 1.833112933),
        (0.99, 5, 4.03214298356),
        (0.999, 3, 12.9239786366),
        (0.999, 1000, 3.30028264842),
    ],
)
def test_student_t_is_the_one_in_the_tables(level: float, freedom: float, t: float) -> None:
    assert student_t(level, torch.tensor(freedom)).item() == pytest.approx(t, rel=2e-6)


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_a_level_out_of_range_is_an_error(level: float) -> None:
    with pytest.raises(ValueError, match=r"^level: .*\(0, 1\)"):
        estimate_of([3.0, 8.0], [0.3, 0.4], [5, 7]).interval(level)
