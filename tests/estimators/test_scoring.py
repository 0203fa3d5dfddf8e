"""What all estimators of masked models share: how models are called, what bad input raises."""

import math
from types import SimpleNamespace

import pytest
import torch
from networks import RandomNetwork, random_tokens
from torch import Tensor, nn

from fastdiff.estimators import exact_nll, time_free_nll

GOOD = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])


def zeros(xt: Tensor) -> Tensor:
    return torch.zeros(*xt.shape, 5)


class Dropping(nn.Module):
    """Logits from an embedding, through dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop, self.frozen = nn.Embedding(5, 5), nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.had_grad: list[bool] = []

    def forward(self, xt: Tensor) -> Tensor:
        logits = self.frozen(self.drop(self.embed(xt)))
        self.had_grad.append(logits.requires_grad)
        return logits


def test_modules_are_evaluated_without_gradients_and_get_their_modes_back() -> None:
    model, x0 = Dropping(), random_tokens(2, 4)
    first, second = (time_free_nll(model, x0, mask_index=4) for _ in range(2))
    assert torch.equal(first.nll, second.nll)
    assert model.training
    assert model.drop.training
    assert not model.frozen.training
    assert not any(model.had_grad)
    with pytest.raises(IndexError):
        exact_nll(model, x0 + 90, mask_index=4)
    assert model.drop.training


def test_a_model_may_return_an_object_with_logits() -> None:
    network, x0 = RandomNetwork(4), random_tokens(2, 4)
    wrapped = exact_nll(lambda xt: SimpleNamespace(logits=network(xt)), x0, mask_index=4)
    assert torch.equal(wrapped.nll, exact_nll(network, x0, mask_index=4).nll)


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_may_be_a_body_and_a_last_layer(bias: bool) -> None:
    """The same numbers, with no logits where nothing is masked: those hidden states are NaN."""
    network, head, x0 = RandomNetwork(6), nn.Linear(5, 5, bias=bias).double().requires_grad_(False), random_tokens(3, 6)

    def body(xt: Tensor) -> Tensor:
        return network(xt).masked_fill((xt != 4).unsqueeze(-1), torch.nan)

    options = dict(mask_index=4, num_samples=9, target=torch.ones(3, 6, dtype=torch.bool))
    expected = time_free_nll(lambda xt: head(network(xt)), x0, **options)
    for last in (head, head.weight) if not bias else (head,):
        estimate = time_free_nll((body, last), x0, **options)
        torch.testing.assert_close(estimate.nll, expected.nll)
        torch.testing.assert_close(estimate.stderr, expected.stderr)
    torch.testing.assert_close(
        exact_nll((lambda xt: SimpleNamespace(last_hidden_state=body(xt)), head), x0, mask_index=4).nll,
        exact_nll(lambda xt: head(network(xt)), x0, mask_index=4).nll,
    )


@pytest.mark.parametrize("model", [(zeros,), (zeros, 3), (zeros, nn.Identity())], ids=["one", "number", "no weight"])
def test_a_pair_without_a_last_layer_is_an_error(model: tuple) -> None:
    with pytest.raises(TypeError, match=r"model: expected a callable, or a pair"):
        time_free_nll(model, GOOD, mask_index=4)


def test_the_module_of_a_method_is_evaluated_too() -> None:
    model, x0 = Dropping(), random_tokens(2, 4)
    pair = (model.forward, nn.Linear(5, 5, bias=False).requires_grad_(False))
    first, second = (time_free_nll(pair, x0, mask_index=4) for _ in range(2))
    assert torch.equal(first.nll, second.nll)
    assert model.training
    assert not any(model.had_grad)


def test_a_head_may_lack_a_row_for_the_mask() -> None:
    """An unknown token, masked and no target, is none of the head's either."""
    network, x0, head = RandomNetwork(6), random_tokens(2, 6), nn.Linear(5, 4).double().requires_grad_(False)
    x0[0, 5] = 4
    expected = exact_nll(lambda xt: nn.functional.pad(head(network(xt)), (0, 1)), x0, mask_index=4, target=x0 < 4)
    for model in (lambda xt: head(network(xt)), (network, head)):
        estimate = exact_nll(model, x0, mask_index=4, target=x0 < 4, exclude_mask=False)
        torch.testing.assert_close(estimate.nll, expected.nll)
        with pytest.raises(ValueError, match=r"\[0, V=4\), got 4; .*without a logit of the mask .*exclude_mask=False"):
            exact_nll(model, x0, mask_index=4, target=x0 < 4)
    with pytest.raises(ValueError, match=r"\[0, V=4\), got 4$"):
        exact_nll((network, head), random_tokens(2, 6) % 2 + 3, mask_index=0, exclude_mask=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_lower_precision_give_float64_estimates(dtype: torch.dtype) -> None:
    network, x0 = RandomNetwork(6), random_tokens(2, 6)
    low = exact_nll(lambda xt: network(xt).to(dtype), x0, mask_index=4)
    assert low.nll.dtype == torch.float64
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(low.nll, exact_nll(network, x0, mask_index=4).nll, rtol=tolerance, atol=0)


def test_an_empty_batch_gives_an_empty_estimate() -> None:
    assert time_free_nll(RandomNetwork(4), torch.empty(0, 4, dtype=torch.int64), mask_index=4).nll.shape == (0,)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("estimate", [exact_nll, time_free_nll])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": [[0, 1]]}, TypeError, r"^x0: .*list"),
        ({"x0": GOOD.int()}, TypeError, r"^x0: .*int64.*int32"),
        ({"x0": GOOD[0]}, ValueError, r"^x0: .*\[B, L\].*\(4,\)"),
        ({"x0": GOOD[:, :0]}, ValueError, r"^x0: .*L >= 1.*\(2, 0\)"),
        ({"x0": GOOD - 1}, ValueError, r"^x0: .*>= 0, got -1"),
        ({"x0": GOOD + 1}, ValueError, r"^x0: .*no mask \(mask_index=4\)"),
        ({"model": zeros, "x0": GOOD + 2, "mask_index": 0}, ValueError, r"^x0, .*\[0, V=5\), got 5"),
        ({"model": zeros, "mask_index": 5}, ValueError, r"mask_index: .*\[0, V=5\), got 5"),
        ({"mask_index": -1}, ValueError, r"^mask_index: .*>= 0.*got -1"),
        ({"batch_size": 0}, ValueError, r"^batch_size: .*at least 1, got 0"),
        ({"target": GOOD}, TypeError, r"^target: .*bool.*int64"),
        ({"target": GOOD[:1] > 1}, ValueError, r"^target: .*\(2, 4\), got \(1, 4\)"),
        ({"target": torch.tensor([[True] * 4, [False] * 4])}, ValueError, r"^target: .*none in x0\[1\]"),
        ({"lengths": torch.tensor([4, 5])}, ValueError, r"^lengths: .*\[1, 4\], got 5"),
        ({"lengths": torch.tensor([0, 4])}, ValueError, r"^lengths: .*\[1, 4\], got 0"),
        ({"lengths": torch.tensor([4])}, ValueError, r"^lengths: .*\(2,\), got \(1,\)"),
        ({"lengths": torch.tensor([4, 2]), "target": GOOD > -1}, ValueError, r"^target: .*inside the lengths"),
        ({"model": lambda xt: "no"}, TypeError, r"^model's logits: .*str"),
        ({"model": lambda xt: torch.zeros(xt.shape)}, ValueError, r"^model's logits: .*V\], got \[1, 4\]"),
        (
            {"model": lambda xt: torch.zeros(4, 1, 5)},
            ValueError,
            r"^model's logits: .*\[1, 4, V\], got \[4, 1, 5\]",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(estimate, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": RandomNetwork(4), "x0": GOOD, "mask_index": 4, **change}
    with pytest.raises(error, match=message):
        estimate(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"proposal": "best"},
            ValueError,
            r"^proposal: .*'stratified', 'systematic', 'complementary', 'uniform', 'harmonic', got 'best'",
        ),
        ({"num_samples": 2}, ValueError, r"^num_samples: .*at least 3.*got 2"),
        ({"num_samples": 1, "proposal": "uniform"}, ValueError, r"^num_samples: .*at least 2.*got 1"),
        ({"num_samples": 3, "proposal": "complementary"}, ValueError, r"^num_samples: .*at least 4.*got 3"),
        ({"num_samples": 1, "proposal": "harmonic"}, ValueError, r"^num_samples: .*at least 2.*got 1"),
        ({"num_samples": 0, "x0": GOOD[:, :1]}, ValueError, r"^num_samples: .*got 0"),
        ({"sample_ids": torch.arange(3)}, ValueError, r"^sample_ids: .*\(2,\), got \(3,\)"),
        ({"sample_ids": torch.zeros(2)}, TypeError, r"^sample_ids: .*float32"),
        ({"tolerance": 0.0}, ValueError, r"^tolerance: .*positive.*got 0.0"),
        ({"tolerance": math.nan}, ValueError, r"^tolerance: .*positive.*got nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_of_the_estimator_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": RandomNetwork(4), "x0": GOOD, "mask_index": 4, **change}
    with pytest.raises(error, match=message):
        time_free_nll(**arguments)


def test_too_many_subsets_to_enumerate_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^target: .*at most 20.*got 21; estimate with time_free_nll"):
        exact_nll(RandomNetwork(21), random_tokens(1, 21), mask_index=4)
