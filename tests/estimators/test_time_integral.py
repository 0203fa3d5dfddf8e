import itertools
import math

import numpy as np
import pytest
import torch
from networks import RandomNetwork, random_tokens, z_score
from oracles import markov_chain, mixture
from torch import Tensor, nn

from fastdiff.estimators.estimate import NLLEstimate
from fastdiff.estimators.time_integral import time_integral_nll
from fastdiff.schedules import Cosine, Linear, LogLinear, Schedule

TIMES = ("stratified", "iid")
each_times = pytest.mark.parametrize("times", TIMES)


def exact_integral(model, x0: Tensor, eps: float, exclude_mask: bool = True, high: float = 1.0) -> float:
    """int_eps^high (1/lambda) sum_S lambda^m (1-lambda)^(L-m) loss(S) d lambda, S all subsets of x0 [L], m = |S|."""
    length, by_count = len(x0), np.zeros(len(x0) + 1)
    for mask in itertools.product([False, True], repeat=length):
        masked = torch.tensor(mask)
        logits = model(x0.masked_fill(masked, 4)[None])[0]
        logits = logits[:, :4] if exclude_mask else logits
        loss = -logits.log_softmax(1).gather(1, x0[:, None]).squeeze(1)
        by_count[sum(mask)] += loss[masked].sum().item()
    node, weight = np.polynomial.legendre.leggauss(16)  # exact for polynomials
    level = eps + (high - eps) * (node + 1) / 2
    m = np.arange(1, length + 1)
    integrand = (level[:, None] ** (m - 1) * (1 - level[:, None]) ** (length - m)) @ by_count[1:]
    return float((high - eps) / 2 * weight @ integrand)


@each_times
@pytest.mark.parametrize(("eps", "num_samples", "repeats"), [(1e-3, 8, 3000), (0.1, 64, 500), (0.1, 2, 4000)])
def test_estimates_are_unbiased_for_the_integral(times: str, eps: float, num_samples: int, repeats: int) -> None:
    network, x0 = RandomNetwork(6), random_tokens(1, 6)
    estimate = time_integral_nll(
        network, x0.expand(repeats, -1), mask_index=4, num_samples=num_samples, times=times, eps=eps
    )
    assert abs(z_score(estimate, exact_integral(network, x0[0], eps))) < 3.5
    ratio = (estimate.stderr.square().mean().sqrt() / estimate.nll.std()).item()
    assert 0.85 < ratio < (1.15 if times == "iid" or num_samples > 8 else 2)
    assert estimate.nll.dtype == estimate.stderr.dtype == torch.float64
    assert estimate.num_forwards.tolist() == [num_samples] * repeats
    assert sum(len(xt) for xt in network.asked) == num_samples * repeats + 2**6


@each_times
@pytest.mark.parametrize("schedule", [LogLinear(0.05), Cosine(0.05), Linear(0.01, 3)], ids=repr)
def test_a_schedule_gives_the_mean_that_is_published(schedule: Schedule, times: str) -> None:
    network, x0 = RandomNetwork(6), random_tokens(1, 6)
    estimate = time_integral_nll(
        network, x0.expand(2000, -1), mask_index=4, num_samples=16, times=times, eps=0.1, schedule=schedule
    )
    low, high = (1 - schedule.alpha(torch.tensor([0.1, 1], dtype=torch.float64))).tolist()
    assert abs(z_score(estimate, exact_integral(network, x0[0], low, high=high) / 0.9)) < 3.5
    assert estimate.bias.isnan().all()


@each_times
def test_nothing_is_cut_at_eps_0(times: str) -> None:
    network, x0 = RandomNetwork(6), random_tokens(1, 6)
    estimate = time_integral_nll(network, x0.expand(4000, -1), mask_index=4, num_samples=16, times=times, eps=0)
    assert abs(z_score(estimate, exact_integral(network, x0[0], 0))) < 3.5
    assert (estimate.bias == 0).all()


@pytest.mark.parametrize("oracle", [mixture(12, 4), markov_chain(4)], ids=["mixture", "markov"])
@each_times
def test_integral_and_bias_give_the_nll_of_an_oracle(oracle, times: str) -> None:
    x0 = oracle.sample(1, 12, seed=1)
    estimate = time_integral_nll(oracle, x0.expand(1500, -1), mask_index=4, eps=1e-3, num_samples=32, times=times)
    without_cut = NLLEstimate(**{**vars(estimate), "nll": estimate.nll - estimate.bias})
    assert abs(z_score(without_cut, oracle.nll(x0).item())) < 3.5


@each_times
@pytest.mark.parametrize(("num_samples", "error"), [(16, 0.25), (64, 0.15)])
def test_bias_is_what_the_cut_leaves_out(times: str, num_samples: int, error: float) -> None:
    network, x0, eps = RandomNetwork(8), random_tokens(1, 8), 0.01
    estimate = time_integral_nll(
        network, x0.expand(400, -1), mask_index=4, eps=eps, num_samples=num_samples, times=times
    )
    left_out = exact_integral(network, x0[0], eps) - exact_integral(network, x0[0], 0)
    assert left_out < -0.05
    assert estimate.bias.mean().item() == pytest.approx(left_out, rel=error)


def harder_with_less_seen(xt: Tensor) -> Tensor:
    """Losses that rise steeply with the share that is masked, by 1."""
    logits = torch.zeros(*xt.shape, 3)
    logits[..., 0] = -5 * (xt == 1).float().mean(1, keepdim=True)
    return logits


def test_stratified_times_beat_independent_ones_and_their_stderr_says_so() -> None:
    """The integrand rises along time, so that a difference of the first and the last stratum would dwarf the rest."""
    x0 = torch.zeros(200, 128, dtype=torch.int64)
    stratified, iid = (
        time_integral_nll(harder_with_less_seen, x0, mask_index=1, num_samples=32, eps=0.05, times=times)
        for times in TIMES
    )
    assert stratified.nll.var() < 0.1 * iid.nll.var()
    assert 0.9 < (stratified.stderr.square().mean().sqrt() / stratified.nll.std()).item() < 1.3


def test_only_target_tokens_are_masked_and_counted() -> None:
    network, x0 = RandomNetwork(6), random_tokens(1, 6).expand(2000, -1)
    target = torch.tensor([[1, 0, 1, 1, 0, 0]]).bool().expand(2000, -1)
    estimate = time_integral_nll(network, x0, mask_index=4, num_samples=8, eps=0.1, target=target)
    asked = torch.cat(network.asked)
    assert torch.equal(asked[:, [1, 4, 5]], x0[:1, [1, 4, 5]].expand(len(asked), -1))
    assert estimate.num_tokens.tolist() == [3] * 2000

    def given(xt: Tensor) -> Tensor:
        return network(torch.stack([xt[:, 0], x0[: len(xt), 1], xt[:, 1], xt[:, 2], *x0[: len(xt), 4:].T], 1))[
            :, [0, 2, 3]
        ]

    assert abs(z_score(estimate, exact_integral(given, x0[0, [0, 2, 3]], 0.1))) < 3.5


def test_the_softmax_may_hold_the_mask() -> None:
    network, x0 = RandomNetwork(4), random_tokens(1, 4)
    estimate = time_integral_nll(network, x0.expand(1000, -1), mask_index=4, eps=0.2, exclude_mask=False)
    assert abs(z_score(estimate, exact_integral(network, x0[0], 0.2, exclude_mask=False))) < 3.5


@each_times
def test_a_sequence_does_not_see_its_batch_or_its_padding(times: str) -> None:
    x0, names = random_tokens(4, 10), torch.tensor([40, 11, 2**35 + 1, 7])
    lengths, target = torch.tensor([10, 6, 10, 6]), torch.ones(4, 10, dtype=torch.bool)
    target[2, 3:] = False
    target[[1, 3], 6:] = False
    x0[1, 6:], x0[3, 6:] = 4, -7  # padding of any value
    options = dict(mask_index=4, num_samples=16, times=times, seed=5)
    asked: list[Tensor] = []

    def network(xt: Tensor) -> Tensor:
        asked.append(xt)
        return RandomNetwork(10)(nn.functional.pad(xt, (0, 10 - xt.shape[1])))[:, : xt.shape[1]]

    batch = time_integral_nll(network, x0, target=target, lengths=lengths, sample_ids=names, batch_size=7, **options)
    assert {xt.shape[1] for xt in asked} == {6, 10}
    assert batch.num_tokens.tolist() == [10, 6, 3, 6]
    for b, length in enumerate(lengths.tolist()):
        one = time_integral_nll(
            network,
            x0[b : b + 1, :length],
            target=target[b : b + 1, :length],
            sample_ids=names[b : b + 1],
            **options,
        )
        for name in ("nll", "stderr", "bias", "degrees_of_freedom"):
            torch.testing.assert_close(getattr(one, name), getattr(batch, name)[b : b + 1], rtol=1e-9, atol=0)


def test_seeds_and_names_change_the_draws() -> None:
    network, x0 = RandomNetwork(10), random_tokens(1, 10).expand(2, -1)

    def estimate(seed: int | None) -> list[float]:
        return time_integral_nll(network, x0, mask_index=4, num_samples=16, seed=seed).nll.tolist()

    assert estimate(1) == estimate(1)
    assert len({*estimate(1), *estimate(2)}) == 4
    assert estimate(None) != estimate(None)


def test_levels_fill_their_strata() -> None:
    """Over a thousand tokens the share that is masked tells lambda."""

    def model(xt: Tensor) -> Tensor:
        shares.append((xt == 1).double().mean(1))
        return torch.zeros(*xt.shape, 2)

    shares: list[Tensor] = []
    x0 = torch.zeros(40, 4000, dtype=torch.int64)
    time_integral_nll(model, x0, mask_index=1, num_samples=5, eps=0.2, batch_size=20)
    share = torch.cat(shares).view(40, 5)
    edges = 0.2 + 0.8 * torch.arange(6) / 5
    assert (share > edges[:-1] - 0.03).all()
    assert (share < edges[1:] + 0.03).all()
    assert (share.std(0) > 0.02).all()  # jittered, and differently for each sequence


def test_a_model_without_doubt_leaves_no_error() -> None:
    def model(xt: Tensor) -> Tensor:
        return torch.zeros(*xt.shape, 2)

    estimate = time_integral_nll(model, torch.zeros(2, 8, dtype=torch.int64), mask_index=1, num_samples=4)
    for column in (estimate.nll, estimate.stderr, estimate.bias, *estimate.interval()):
        assert not column.any()


def test_an_impossible_token_makes_the_nll_infinite() -> None:
    def model(xt: Tensor) -> Tensor:
        logits = torch.zeros(*xt.shape, 3)
        logits[:, 2, 1] = -math.inf
        return logits

    x0 = torch.tensor([[0, 1, 1, 0, 0, 1, 0]])
    estimate = time_integral_nll(model, x0, mask_index=2, num_samples=40)
    assert estimate.nll.item() == math.inf
    assert not estimate.bias.isnan()


def test_a_model_may_be_a_body_and_a_last_layer() -> None:
    network, head, x0 = RandomNetwork(6), nn.Linear(5, 5).double(), random_tokens(3, 6)
    expected = time_integral_nll(lambda xt: head(network(xt)), x0, mask_index=4, num_samples=9)
    torch.testing.assert_close(time_integral_nll((network, head), x0, mask_index=4, num_samples=9).nll, expected.nll)
    assert not expected.nll.requires_grad


def test_an_empty_batch_gives_an_empty_estimate() -> None:
    estimate = time_integral_nll(RandomNetwork(4), torch.empty(0, 4, dtype=torch.int64), mask_index=4)
    assert all(len(column) == 0 for column in estimate.to_dict().values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, r"^eps: .*\[0, 1\), got -0.1"),
        ({"eps": 1.0}, ValueError, r"^eps: .*\[0, 1\), got 1"),
        ({"eps": math.nan}, ValueError, r"^eps: .*nan"),
        ({"times": "antithetic"}, ValueError, r"^times: .*'stratified', 'iid', got 'antithetic'"),
        ({"num_samples": 1}, ValueError, r"^num_samples: .*at least 2.*got 1"),
        ({"sample_ids": torch.arange(3)}, ValueError, r"^sample_ids: .*\(2,\), got \(3,\)"),
        ({"x0": random_tokens(2, 4).int()}, TypeError, r"^x0: .*int32"),
        ({"lengths": torch.tensor([4, 5])}, ValueError, r"^lengths: .*\[1, 4\], got 5"),
        ({"mask_index": -1}, ValueError, r"^mask_index: .*got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": RandomNetwork(4), "x0": random_tokens(2, 4), "mask_index": 4, **change}
    with pytest.raises(error, match=message):
        time_integral_nll(**arguments)
