"""SPG's bound against its value over all subsets: where it bounds the likelihood, and what few passes make of it."""

import math

import pytest
import torch
from networks import RandomNetwork, random_tokens
from oracles import Oracle, dna_toy, markov_chain, mixture
from torch import Tensor

from fastdiff import exact_nll, time_free_nll, upper_bound_nll

ORACLES = {"mixture": mixture(8, 3, mask_index=1), "markov": markov_chain(4), "dna": dna_toy()[0]}


def over_all_subsets(model, x0: Tensor, beta: float, mask_index: int) -> float:
    """Minus the bound itself, for one sequence [1, L]."""
    n = x0.shape[1]
    mask = (torch.arange(1, 2**n).unsqueeze(1) >> torch.arange(n)) % 2 == 1
    logits = model(x0.masked_fill(mask, mask_index)).index_fill(2, torch.tensor(mask_index), -math.inf)
    log_c = logits.log_softmax(2).gather(2, x0.expand(len(mask), n).unsqueeze(2)).squeeze(2)
    m = mask.sum(1)
    weight = torch.tensor([1 / (k * math.comb(n, k)) for k in m.tolist()], dtype=torch.float64)
    mean = (weight.unsqueeze(1) * mask * (beta * log_c).exp()).sum(0)
    return -(mean.log() / beta).sum().item()


@pytest.mark.parametrize("name", ORACLES)
def test_it_bounds_the_likelihood_of_consistent_conditionals_at_every_beta(name: str) -> None:
    oracle: Oracle = ORACLES[name]
    for x0 in oracle.sample(3, 8, seed=2).split(1):
        nll = oracle.nll(x0).item()
        bounds = [over_all_subsets(oracle, x0, beta, oracle.mask_index) for beta in (1e-6, 0.5, 1, 2, 8)]
        assert bounds[0] == pytest.approx(nll, rel=1e-4)
        assert all(low <= high + 1e-12 for low, high in zip(bounds[1:], bounds, strict=False))


def test_of_other_networks_it_needs_a_beta_as_large_as_there_are_tokens() -> None:
    """Both tokens are easy where the first is revealed first, and both hard where the second is."""

    def model(xt: Tensor) -> Tensor:
        hidden = xt == 2
        hard = torch.stack([~hidden[:, 1], hidden[:, 0]], 1)
        return torch.where(hard.unsqueeze(2), torch.tensor([-9.0, 0.0, 0.0]), torch.tensor([0.0, -9.0, 0.0])).double()

    x0 = torch.zeros(1, 2, dtype=torch.int64)
    easy, hard = -math.log1p(math.exp(-9)), -9 - math.log1p(math.exp(-9))
    log_p = math.log((math.exp(2 * easy) + math.exp(2 * hard)) / 2)  # along either order, half of the time
    assert -over_all_subsets(model, x0, 1, 2) < log_p - 0.5
    assert -over_all_subsets(model, x0, 2, 2) >= log_p - 1e-12
    assert exact_nll(model, x0, mask_index=2).nll.item() > -log_p


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_few_passes_are_too_low_a_bound_and_the_jackknife_sees_most_of_it(beta: float) -> None:
    oracle, repeats = markov_chain(4), 2000
    x0 = oracle.sample(1, 8, seed=3)
    truth = over_all_subsets(oracle, x0, beta, oracle.mask_index)
    estimate = upper_bound_nll(oracle, x0.expand(repeats, -1), mask_index=oracle.mask_index, beta=beta, num_samples=32)
    off, left = estimate.nll.mean() - truth, (estimate.nll - estimate.bias).mean() - truth
    assert off > 10 * estimate.nll.std() / math.sqrt(repeats)
    assert abs(left) < 0.25 * off
    assert 0.8 < (estimate.stderr.square().mean().sqrt() / estimate.nll.std()).item() < 1.3


def test_jackknife_by_hand() -> None:
    network, x0 = RandomNetwork(6), random_tokens(2, 6)
    estimate = upper_bound_nll(network, x0, mask_index=4, beta=1.5, num_samples=8)
    xt = torch.cat(network.asked).view(2, 8, 6)
    mask = xt == 4
    logits = network(xt.flatten(0, 1))[..., :4].log_softmax(2).view(2, 8, 6, 4)
    log_c = logits.gather(3, x0[:, None, :, None].expand(2, 8, 6, 1)).squeeze(3)
    parts = mask * 6 / mask.sum(2, keepdim=True) * (1.5 * log_c).exp()

    def nll(parts: Tensor) -> Tensor:
        mean = parts.mean(1)
        return -torch.where(mean > 0, mean, 1).log() / 1.5

    torch.testing.assert_close(estimate.token_nll, nll(parts))
    torch.testing.assert_close(estimate.nll, nll(parts).sum(1))
    without = torch.stack([nll(torch.cat([parts[:, :r], parts[:, r + 1 :]], 1)).sum(1) for r in range(8)], 1)
    torch.testing.assert_close(estimate.bias, 7 * (without.mean(1) - estimate.nll))
    torch.testing.assert_close(estimate.stderr, without.std(1, correction=0) * math.sqrt(7))


def test_it_meets_the_masks_of_uniform_counts() -> None:
    bound, nll, x0 = RandomNetwork(6), RandomNetwork(6), random_tokens(2, 6)
    upper_bound_nll(bound, x0, mask_index=4, num_samples=8, seed=3)
    time_free_nll(nll, x0, mask_index=4, num_samples=8, seed=3, proposal="uniform")
    assert torch.equal(torch.cat(bound.asked), torch.cat(nll.asked))


def test_a_token_never_masked_counts_nothing_and_has_no_gradient() -> None:
    network, x0 = RandomNetwork(12), random_tokens(4, 12)
    network.head.requires_grad_()
    estimate = upper_bound_nll(network, x0, mask_index=4, num_samples=2, differentiable=True)
    assert (estimate.token_nll == 0).any()
    estimate.nll.sum().backward()
    assert network.head.grad.isfinite().all()


def test_an_impossible_token_makes_it_infinite() -> None:
    def model(xt: Tensor) -> Tensor:
        return torch.zeros(*xt.shape, 3).index_fill(2, torch.tensor([1]), -math.inf)

    x0 = torch.tensor([[0, 1, 0], [0, 0, 0]])
    assert upper_bound_nll(model, x0, mask_index=2).nll.isinf().tolist() == [True, False]


@pytest.mark.parametrize(
    ("change", "message"), [({"beta": 0}, r"^beta: .*positive.*got 0"), ({"num_samples": 1}, r"^num_samples: .*2")]
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upper_bound_nll(RandomNetwork(4), random_tokens(1, 4), mask_index=4, **change)
