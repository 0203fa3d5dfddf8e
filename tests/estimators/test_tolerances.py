"""Estimates to a tolerance: what pilots spend, and what comes out."""

import pytest
import torch
from networks import RandomNetwork, random_tokens, z_score
from oracles import markov_chain, skewed_chain
from torch import Tensor

from fastdiff.estimators import exact_nll, time_free_nll
from fastdiff.estimators.time_free import PROPOSALS

pytestmark = pytest.mark.slow

each_proposal = pytest.mark.parametrize("proposal", PROPOSALS)


def test_a_tolerance_is_met_without_bias() -> None:
    network, x0 = RandomNetwork(11), random_tokens(1, 11)
    truth = exact_nll(network, x0, mask_index=4).nll
    options = dict(mask_index=4, num_samples=33, tolerance=2.0)
    estimate = time_free_nll(network, x0.expand(400, -1), **options)
    low, high = estimate.interval()
    assert 1.0 < (high - low).median().item() < 2 * 2.0
    assert abs(z_score(estimate, truth)) < 3.5
    assert ((low <= truth) & (truth <= high)).double().mean().item() > 0.92
    assert (estimate.num_forwards > 60).all()
    assert len(estimate.num_forwards.unique()) > 1
    one = time_free_nll(network, x0, sample_ids=torch.tensor([5]), **options)
    torch.testing.assert_close(one.nll, estimate.nll[5:6])


@pytest.mark.parametrize(
    ("model", "x0"),
    [
        (RandomNetwork(24), random_tokens(1, 24)),
        (markov_chain(8), markov_chain(8).sample(1, 32, seed=32)),
        (skewed_chain(), torch.zeros(1, 24, dtype=torch.int64)),
    ],
    ids=["network", "markov", "skewed"],
)
def test_a_tolerance_is_reached_in_most_sequences(model, x0: Tensor) -> None:
    for num_samples, passes in ((16, 32), (16, 96), (64, 96)):
        options = dict(mask_index=model.mask_index, num_samples=num_samples)
        low, high = time_free_nll(model, x0.expand(60, -1), mask_index=model.mask_index, num_samples=passes).interval()
        tolerance = ((high - low) / 2).median().item()
        estimate = time_free_nll(model, x0.expand(100, -1), tolerance=tolerance, seed=1, **options)
        low, high = estimate.interval()
        assert ((high - low) / 2 <= tolerance).double().mean().item() > 0.93
        assert estimate.num_forwards.double().mean().item() < 8 * passes


def test_a_pilot_may_look_at_more_counts_than_the_estimate_has_passes() -> None:
    network, x0 = RandomNetwork(25), random_tokens(2, 25)
    estimate = time_free_nll(network, x0, mask_index=4, num_samples=256, tolerance=1e9)
    assert estimate.num_forwards.tolist() == [256 - 15 + 16] * 2  # ten chains of 24 looks, then single masks
    assert (estimate.stderr > 0).all()


def test_what_is_easily_within_tolerance_costs_little_more_than_its_pilot() -> None:
    network, x0, target = RandomNetwork(12), random_tokens(2, 12), torch.ones(2, 12, dtype=torch.bool)
    target[1, 5:] = False
    options = dict(mask_index=4, num_samples=64, target=target)
    estimate = time_free_nll(network, x0, tolerance=100.0, **options)
    assert estimate.num_forwards.tolist() == [64 + 16, 31]  # an error bar of fifteen masks; enumerated once
    assert estimate.stderr[1].item() == 0
    torch.testing.assert_close(estimate.nll[1], time_free_nll(network, x0, **options).nll[1])


def test_what_more_pilots_could_enumerate_is_enumerated() -> None:
    network, x0 = RandomNetwork(7), random_tokens(1, 7)
    estimate = time_free_nll(network, x0.expand(20, -1), mask_index=4, num_samples=17, tolerance=0.5)
    assert estimate.stderr.tolist() == [0] * 20
    torch.testing.assert_close(estimate.nll, exact_nll(network, x0, mask_index=4).nll.expand(20))
    assert (estimate.num_forwards <= 17 + 68 + 127).all()


@each_proposal
def test_a_tolerance_stops_at_max_samples(proposal: str) -> None:
    network, x0 = RandomNetwork(12), random_tokens(2, 12)
    options = dict(mask_index=4, num_samples=16, proposal=proposal, max_samples=40)
    estimate = time_free_nll(network, x0, tolerance=1e-9, **options)
    assert ((estimate.num_forwards > 52) & (estimate.num_forwards <= 56)).all()
    assert (estimate.stderr > 0).all()
    assert time_free_nll(network, x0, tolerance=1e9, **options).num_forwards.tolist() == [32, 32]


def test_pilots_keep_no_graph() -> None:
    network, x0, had_grad = RandomNetwork(8), random_tokens(2, 8), []
    network.head.requires_grad_()

    def model(xt: Tensor) -> Tensor:
        had_grad.append(torch.is_grad_enabled())
        return network(xt)

    options = dict(mask_index=4, num_samples=16, batch_size=32, tolerance=1e9, differentiable=True)
    assert time_free_nll(model, x0, **options).nll.requires_grad
    assert had_grad == [False, True]
