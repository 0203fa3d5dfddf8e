import dataclasses
import json
import math

import pytest
import torch

from fastdiff.estimators import NLLEstimate
from fastdiff.estimators.estimate import student_t


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
