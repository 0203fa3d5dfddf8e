import math
from typing import Any
from unittest import mock

import pytest
import torch
from networks import RandomNetwork, random_tokens
from oracles import markov_chain, mixture
from torch import Tensor

from fastdiff.estimators import chains, exact_nll, potential, time_free_nll
from fastdiff.estimators.scoring import Scorer


@pytest.mark.parametrize(
    ("num_samples", "length", "found"),
    [
        (3, 5, (3, 1, False)),
        (6, 40, (6, 1, False)),
        (7, 40, (6, 1, True)),
        (47, 40, (46, 1, True)),
        (64, 40, (21, 3, True)),
        (64, 8, (9, 7, True)),
        (64, 9, (21, 3, True)),
    ],
)
def test_passes_buy_chains(num_samples: int, length: int, found: tuple[int, int, bool]) -> None:
    assert chains.plan(num_samples, length) == found


@pytest.mark.parametrize("largest", [3, 4, 7, 32, 1023])
@pytest.mark.parametrize("looks", [1, 2, 3])
@pytest.mark.parametrize("number", [2, 5, 21])
def test_every_count_is_looked_at_with_its_probability(largest: int, looks: int, number: int) -> None:
    rho = chains.look_probabilities(largest, looks, number)
    assert rho.shape == (largest,)
    assert rho.sum().item() == pytest.approx(looks, rel=1e-12)
    assert ((rho > 0) & (rho <= 1)).all()
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    counts = chains._draw_looks(u, rho)
    assert counts.shape == (200_000, looks)
    assert (counts.diff(dim=1) < 0).all()
    assert (counts.diff(dim=0) <= 0).all()
    shares = torch.bincount(counts.flatten(), minlength=largest + 1)[1:] / 200_000
    torch.testing.assert_close(shares.double(), rho, rtol=0, atol=2e-5)


@pytest.mark.parametrize("jitter", [1e-9, 0.3, 0.999])
@pytest.mark.parametrize("number", [7, 15, 21])
def test_single_looks_that_are_enough_for_every_count_are_shared_out_evenly(jitter: float, number: int) -> None:
    rho = chains.look_probabilities(7, 1, number)
    counts = chains._draw_looks((torch.arange(number).double() + jitter) / number, rho)
    torch.testing.assert_close(torch.bincount(counts.flatten(), minlength=8)[1:].double(), number * rho)


@pytest.mark.parametrize(("largest", "looks", "number"), [(7, 1, 3), (7, 1, 15), (32, 3, 21), (5, 5, 2)])
def test_the_mean_of_weights_over_a_stratum(largest: int, looks: int, number: int) -> None:
    rho = chains.look_probabilities(largest, looks, number)
    u = (torch.arange(number).unsqueeze(1) + (torch.arange(20_000).double() + 0.5) / 20_000) / number
    counts = chains._draw_looks(u, rho).flatten(1)
    often = torch.stack([torch.bincount(of_chain, minlength=largest + 1)[1:] for of_chain in counts]) / 20_000
    strata = chains._strata(rho, number)
    torch.testing.assert_close(strata, often / rho, rtol=0, atol=2e-3)
    torch.testing.assert_close(strata.mean(0), torch.ones_like(rho), rtol=0, atol=1e-12)


def test_masks_of_a_chain_are_nested() -> None:
    network, x0 = RandomNetwork(20), random_tokens(3, 20)
    score = Scorer(network, x0, 4)
    counts, steps = torch.tensor([[20, 15, 9, 2, 15, 9, 2]]).expand(3, -1), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    with score.evaluating(21):
        _, mask = score.draw(torch.arange(3), counts, steps, torch.tensor(0), torch.arange(3))
    for larger, smaller in [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6)]:
        assert not (mask[:, smaller] & ~mask[:, larger]).any()
    assert (mask[:, 1] != mask[:, 4]).any()


@pytest.mark.parametrize("oracle", [mixture(8, 3, mask_index=1), markov_chain(4)], ids=["mixture", "markov"])
def test_chains_over_every_count_are_exact_where_conditionals_are_consistent(oracle) -> None:
    x0 = oracle.sample(3, 8)
    estimate = time_free_nll(oracle, x0, mask_index=oracle.mask_index, num_samples=64)
    torch.testing.assert_close(estimate.nll, oracle.nll(x0))
    assert (estimate.stderr < 1e-9).all()


def no_guess(loss: Tensor, mask: Tensor, weight: Tensor, folds: list[Tensor]) -> tuple[Tensor, Tensor]:
    level = loss.new_zeros(len(loss), len(folds), loss.shape[3])
    return level, level.new_zeros(*level.shape, len(potential._TERMS))


def unguessed():
    return mock.patch.multiple(chains, _fits=no_guess, _fused=lambda *_: False)


def test_controls_have_no_mean_and_take_out_what_neighbours_tell() -> None:
    oracle = markov_chain(8)
    x0 = oracle.sample(1, 32, seed=1).expand(300, -1)
    found = time_free_nll(oracle, x0, mask_index=8).nll
    with unguessed():
        raw = time_free_nll(oracle, x0, mask_index=8).nll
    control = raw - found
    assert abs(control.mean() / (control.std() / math.sqrt(300))) < 3.5
    assert found.var() < 0.03 * raw.var()


def test_a_kernel_fits_as_the_formulas_do() -> None:
    oracle = markov_chain(8)
    x0, scale = oracle.sample(2, 24, seed=1), torch.ones(24, 1, dtype=torch.float64, requires_grad=True)
    values, slopes = [], []
    for backend in ("cpu", "reference"):
        options = dict(mask_index=8, num_samples=20, differentiable=True, backend=backend)
        values.append(time_free_nll(lambda xt: oracle(xt) * scale, x0, **options).nll)
        slopes.append(torch.autograd.grad(values[-1].sum(), scale)[0])
    torch.testing.assert_close(*values, rtol=1e-9, atol=0)
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-9)


def test_controls_take_out_the_gradients_variance_too() -> None:
    """Against the raw sums of losses, whose gradient is the same on average. A prompt's token tells repeats apart."""
    oracle, repeats = markov_chain(8), 100
    names = torch.arange(repeats).unsqueeze(1)
    x0 = torch.cat([names, oracle.sample(1, 24, seed=1).expand(repeats, -1)], 1)
    target = torch.ones_like(x0, dtype=torch.bool).index_fill(1, torch.tensor(0), False)
    bias = torch.zeros(repeats, 9, dtype=torch.float64, requires_grad=True)

    def model(xt: Tensor) -> Tensor:
        logits = oracle(xt[:, 1:]) + bias[xt[:, 0]].unsqueeze(1)
        return torch.cat([logits[:, :1], logits], 1)

    def gradients() -> Tensor:
        nll = time_free_nll(model, x0, mask_index=8, num_samples=32, target=target, differentiable=True).nll
        return torch.autograd.grad(nll.sum(), bias)[0]

    found = gradients()
    with unguessed():
        raw = gradients()
    assert 2 * found.var(0).sum() < raw.var(0).sum()
    z = (found - raw).mean(0)[:8] / ((found - raw).std(0)[:8] / math.sqrt(repeats))
    assert z.abs().max() < 4


def test_what_is_subtracted_from_a_chain_depends_on_no_chain_of_its_fold() -> None:
    network, x0 = RandomNetwork(20), random_tokens(3, 20)
    score, plan = Scorer(network, x0, 4), chains.plan(64, 20)
    passes = chains.plan_chains(score.target, plan, torch.tensor(0), torch.arange(3), 0, None)
    with score.evaluating(64):
        loss = score.run(torch.arange(3), passes.mask).clone()

    of_chains = chains._controls

    def subtracted() -> Tensor:
        found = []

        def controls(*given: Any) -> tuple[Tensor, Tensor]:
            found.append(of_chains(*given))
            return found[-1]

        with mock.patch.object(chains, "_controls", controls):
            passes.replicates(loss)
        return torch.cat([guessed for guessed, _ in found])

    before = subtracted()
    first = 1 + 3 * plan.looks  # of chain 3
    loss[:, first] += torch.rand_like(loss[:, first]) * passes.mask[:, first]
    change = (subtracted() - before).abs().amax((0, 2))
    assert change[3 :: chains._FOLDS].max() < 1e-10
    assert change[4] > 0.01


def test_an_infinite_loss_leaves_the_other_sequences_alone() -> None:
    network, x0 = RandomNetwork(12), random_tokens(2, 12)
    x0[0] = x0[0].clamp(min=1)
    x0[1, 3] = 0

    def never_0(xt: Tensor) -> Tensor:
        return network(xt).index_fill(2, torch.tensor([0]), -math.inf)

    network.head.requires_grad_()
    estimate = time_free_nll(never_0, x0, mask_index=4, differentiable=True)
    assert estimate.nll[1].item() == math.inf
    by_token = torch.autograd.grad(estimate.token_nll[1, 4], network.head, retain_graph=True)[0]
    assert by_token.isfinite().all()
    estimate.nll[0].backward()
    assert network.head.grad.isfinite().all()
    one = time_free_nll(never_0, x0[:1], mask_index=4)
    torch.testing.assert_close(estimate.nll[:1].detach(), one.nll.detach())
    assert exact_nll(never_0, x0, mask_index=4).nll[1].item() == math.inf
