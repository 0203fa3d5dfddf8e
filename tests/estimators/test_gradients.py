"""What tokens contribute to an estimate, and gradients."""

import itertools
import math

import pytest
import torch
from networks import RandomNetwork, random_tokens, token_nll_by_chain_rule
from torch import Tensor

from fastdiff.estimators import exact_nll, time_free_nll
from fastdiff.estimators.time_free import PROPOSALS

each_proposal = pytest.mark.parametrize("proposal", PROPOSALS)


def gradient(estimate, network: RandomNetwork) -> Tensor:
    """That of the nll with respect to the head; its last column is the mask's."""
    return torch.autograd.grad(estimate.nll.sum(), network.head, retain_graph=True)[0][:, :-1]


def test_the_gradient_of_the_exact_nll() -> None:
    network, x0 = RandomNetwork(6), random_tokens(1, 6)
    network.head.requires_grad_()
    step = torch.zeros_like(network.head)
    step[3, 1] = 1e-5
    slope = gradient(exact_nll(network, x0, mask_index=4, differentiable=True), network)[3, 1].item()
    ends = []
    for sign in (1, -1):
        network.head.data += sign * step
        ends.append(exact_nll(network, x0, mask_index=4).nll.item())
        network.head.data -= sign * step
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@each_proposal
def test_gradients_are_unbiased(proposal: str) -> None:
    network, x0 = RandomNetwork(6), random_tokens(1, 6)
    network.head.requires_grad_()
    truth = gradient(exact_nll(network, x0, mask_index=4, differentiable=True), network)
    options = dict(mask_index=4, num_samples=14, proposal=proposal, differentiable=True)
    parts = [time_free_nll(network, x0.expand(40, -1), seed=seed, **options) for seed in range(30)]
    assert not parts[0].stderr.requires_grad
    grads = torch.stack([gradient(part, network) / 40 for part in parts])
    z = (grads.mean(0) - truth) / (grads.std(0) / math.sqrt(30))
    assert z.abs().max() < 4.5


@each_proposal
@pytest.mark.parametrize("num_samples", [16, 64])  # estimated, and the first sequence enumerated
def test_what_tokens_contribute(proposal: str, num_samples: int) -> None:
    network, x0, lengths = RandomNetwork(8), random_tokens(2, 8), torch.tensor([5, 8])
    network.head.requires_grad_()
    target = torch.tensor([[False, True, True, True, True, False, False, False], [True] * 6 + [False, True]])

    def model(xt: Tensor) -> Tensor:
        return network(torch.nn.functional.pad(xt, (0, 8 - xt.shape[1])))[:, : xt.shape[1]]

    options = dict(mask_index=4, target=target, lengths=lengths, differentiable=True)
    estimate = time_free_nll(model, x0, num_samples=num_samples, proposal=proposal, **options)
    assert estimate.token_nll.shape == (2, 8)
    assert not estimate.token_nll[~target].any()
    assert (estimate.token_nll[target] != 0).all()
    torch.testing.assert_close(estimate.token_nll.sum(1), estimate.nll, rtol=1e-14, atol=0)
    by_token = torch.autograd.grad(estimate.token_nll[0].sum(), network.head, retain_graph=True)
    torch.testing.assert_close(by_token, torch.autograd.grad(estimate.nll[0], network.head))


@each_proposal
def test_what_a_token_contributes_is_unbiased(proposal: str) -> None:
    network, x0 = RandomNetwork(5), random_tokens(1, 5)
    truth = exact_nll(network, x0, mask_index=4).token_nll[0]
    by_order = [token_nll_by_chain_rule(network, x0, order) for order in itertools.permutations(range(5))]
    torch.testing.assert_close(truth, torch.stack(by_order).mean(0))
    parts = time_free_nll(network, x0.expand(1000, -1), mask_index=4, num_samples=14, proposal=proposal).token_nll
    z = (parts.mean(0) - truth) / (parts.std(0) / math.sqrt(1000))
    assert z.abs().max() < 4
