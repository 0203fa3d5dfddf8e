"""The laws that samplers draw from, against enumerated ones."""

import itertools
import math

import numpy
import pytest
import torch
from laws import agrees, strings
from networks import RandomNetwork
from oracles import mixture
from samplers import RANKED, SAMPLERS, TIMED, P, UniformProduct, independent, product, product_scores, steps_of
from torch import nn

from fastdiff import reference
from fastdiff.generation.reverse import reverse_law
from fastdiff.generation.sampling import sample
from fastdiff.noise.graphs import Absorbing, Uniform
from fastdiff.schedules import Geometric, LogLinear


def chain_law(rows_at, first, steps):
    """Where a chain over all strings ends that starts at `first` [S]; rows_at(xt, step) [S, L, V] are tokens' laws."""
    length = round(math.log(len(first)) / math.log(rows_at.num_states))
    states = strings(rows_at.num_states, length)
    for step in range(steps):
        rows = rows_at(states, step).double()
        jump = rows.gather(2, states.T.expand(len(states), -1, -1)).prod(1)  # [S, S]
        first = first @ jump
    return first


@pytest.mark.parametrize("sampler", ["tweedie", "euler"])
@pytest.mark.parametrize("parametrization", ["logits", "log_score", "scale_by_sigma"])
@pytest.mark.parametrize("graph", [Absorbing(3, 1), Uniform(3)])
def test_chain_of_reverse_steps(graph, parametrization, sampler):
    """The law of 4000 samples is that of the chain over all strings whose jumps are the rows of the reverse steps."""
    table = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def network(xt, sigma=None):
        z = table[xt @ torch.tensor([3, 1])]
        return z.scatter(-1, xt.unsqueeze(-1), 0) if parametrization == "log_score" else z

    def rows_at(xt, step):
        sigma, after = moves[step]
        names = dict(sigma_next=None, step_size=None) | after
        law = reverse_law(graph.name, parametrization, xt, 3, sigma, **names)
        rows = reference.reverse_weights(network(xt), xt, law)
        if graph.name == "absorb":
            rows = rows.where((xt == 1).unsqueeze(-1), nn.functional.one_hot(xt, 3).double())
        return rows / rows.sum(-1, keepdim=True)

    rows_at.num_states = 3
    moves = list(steps_of(LogLinear(), 3, sampler))
    first = torch.full((9,), 1 / 9, dtype=torch.float64)
    if graph.name == "absorb":
        first = nn.functional.one_hot(torch.tensor(4), 9).double()
    options = dict(graph=graph, parametrization=parametrization, sampler=sampler)
    x = sample(network, num_samples=4000, length=2, steps=3, **options)
    assert agrees(x, chain_law(rows_at, first, 3), 3)


def test_total_variation_of_tweedie_falls_as_one_over_steps():
    """Its law is that of the exact chain, which differs from the truth as tokens are revealed together."""
    oracle = mixture(4, 3, seed=5)
    truth = torch.exp(oracle.log_prob(strings(4, 4))) * (strings(4, 4) < 3).all(1)
    distance = []
    for steps in (1, 2, 4, 8):
        moves = list(steps_of(LogLinear(), steps, "tweedie"))

        def rows_at(xt, step, moves=moves):
            sigma, after = moves[step]
            t, s = torch.tensor([sigma, after["sigma_next"]], dtype=torch.float64)
            return reference.absorb_reverse_step(oracle(xt), xt, t, s, 3)

        rows_at.num_states = 4
        law = chain_law(rows_at, (strings(4, 4) == 3).all(1).double(), steps)
        distance.append(((law - truth).abs().sum() / 2).item())
        assert agrees(sample(oracle, num_samples=4000, length=4, steps=steps, mask_index=3), law, 4)
    assert distance[0] > 0.1
    assert 1.8 < distance[2] / distance[3] < 2.2
    assert distance == sorted(distance, reverse=True)


@pytest.mark.parametrize("sampler", ["first_hitting", "random"])
def test_one_position_a_step_is_exact(sampler):
    oracle = mixture(4, 3, seed=5)
    truth = torch.exp(oracle.log_prob(strings(3, 4)))
    assert agrees(sample(oracle, num_samples=4000, length=4, mask_index=3, sampler=sampler), truth, 3)
    assert not agrees(sample(oracle, num_samples=4000, length=4, mask_index=3, steps=1), truth, 3)


def test_random_order_in_fewer_steps_has_its_law():
    oracle, states = mixture(4, 3, seed=5), strings(3, 4)

    def revealed(xt, which):
        """The probability of the tokens of all strings at the positions `which`, given xt."""
        c = torch.softmax(oracle(xt)[..., :3], -1).gather(2, states.unsqueeze(2)).squeeze(2)
        return c[:, which].prod(1)

    law = torch.zeros(81, dtype=torch.float64)
    for first in itertools.combinations(range(4), 2):
        second = [i for i in range(4) if i not in first]
        between = states.index_fill(1, torch.tensor(second), 3)
        law += revealed(torch.full_like(states, 3), list(first)) * revealed(between, second) / 6
    assert agrees(sample(oracle, num_samples=4000, length=4, steps=2, mask_index=3, sampler="random"), law, 3)


@pytest.mark.parametrize("sampler", ["first_hitting", "random"])
def test_infill_has_the_conditional_law(sampler):
    oracle = mixture(5, 3, seed=2)
    infill = torch.tensor([-1, 2, -1, 0, -1])
    x = sample(oracle, num_samples=4000, infill=infill, mask_index=3, sampler=sampler)
    assert (x[:, [1, 3]] == torch.tensor([2, 0])).all()
    joint = torch.exp(oracle.log_prob(strings(3, 5))).view(3, 3, 3, 3, 3)[:, 2, :, 0, :]
    assert agrees(x[:, [0, 2, 4]], (joint / joint.sum()).flatten(), 3)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("model", ["logits", "scale_by_sigma", "uniform"])
def test_independent_tokens(model, steps):
    network = {"logits": product, "scale_by_sigma": product_scores, "uniform": UniformProduct()}[model]
    options = dict(graph="uniform") if model == "uniform" else dict(mask_index=4)
    options |= dict(parametrization="logits" if model == "logits" else "scale_by_sigma")
    x = sample(network, num_samples=3000, length=3, steps=steps, seed=5, **options)
    assert x.shape == (3000, 3)
    assert x.dtype == torch.int64
    assert agrees(x, independent(P), 4)


@pytest.mark.parametrize("sampler", TIMED)
def test_another_schedule_leaves_no_mask(sampler):
    options = dict(length=3, steps=3, mask_index=4, schedule=Geometric(0.5, 20.0), sampler=sampler)
    assert agrees(sample(product, num_samples=2000, **options), independent(P), 4)
    scores = sample(product_scores, num_samples=100, parametrization="scale_by_sigma", **options)
    assert scores.max() < 4


def test_infinite_noise_at_the_start():
    """Conditionals reveal a share 1 - alpha_s of the masks; Euler's rates there are 0 * inf."""
    options = dict(num_samples=2000, length=3, steps=2, mask_index=4, schedule=LogLinear(0.0), return_trajectory=True)
    result = sample(product, **options)
    assert agrees(result.tokens, independent(P), 4)
    assert 0.46 < (result.trajectory[1] == 4).double().mean() < 0.54
    for changes in ({"sampler": "euler"}, {"parametrization": "log_score"}):
        with pytest.raises(ValueError, match=r"schedule: expected finite noise at time 1 .*LogLinear\(eps=0.0\)"):
            sample(product, **options | changes)


def test_scores_that_do_not_add_up_leave_no_mask():
    def weak(xt, sigma):
        return product_scores(xt, sigma) - 3.0

    options = dict(num_samples=200, length=3, steps=3, mask_index=4, parametrization="scale_by_sigma")
    for sampler in TIMED:
        assert sample(weak, sampler=sampler, **options).max() < 4


@pytest.mark.parametrize("sampler", ["tweedie", "first_hitting", "random"])
def test_temperature(sampler):
    options = dict(num_samples=3000, length=3, mask_index=4, sampler=sampler)
    sharp = independent(P**2 / (P**2).sum(1, keepdim=True))
    assert agrees(sample(product, temperature=0.5, **options), sharp, 4)
    assert not agrees(sample(product, **options), sharp, 4)
    if sampler == "tweedie":
        options |= dict(temperature=0.5, steps=3, parametrization="scale_by_sigma")
        assert agrees(sample(product_scores, **options), sharp, 4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_likeliest_tokens(sampler):
    options = dict(num_samples=5, length=6, mask_index=4, sampler=sampler, seed=3)
    network = RandomNetwork(6)
    greedy = sample(network, temperature=0, **options)
    if sampler in RANKED:
        assert len(greedy.unique(dim=0)) == 1
    assert torch.equal(sample(network, top_k=1, **options), greedy)
    assert torch.equal(sample(network, top_p=1e-6, **options), greedy)
    assert not torch.equal(sample(network, **options), greedy)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_excluded_ids_are_never_drawn(sampler):
    """The law is that of the others; from an iterator too, which every step needs anew."""
    options = dict(num_samples=2000, length=3, mask_index=4, sampler=sampler)
    rest = P.index_fill(1, torch.tensor([0, 3]), 0)
    x = sample(product, exclude=iter([0, -2]), **options)
    assert set(x.unique().tolist()) == {1, 2}
    if sampler in TIMED:
        scores = dict(options, parametrization="scale_by_sigma")
        assert set(sample(product_scores, exclude=[0, 3], **scores).unique().tolist()) == {1, 2}
    if sampler not in RANKED:  # whose orders prefer some tokens
        assert agrees(x, independent(rest / rest.sum(1, keepdim=True)), 4)


def test_a_head_without_a_row_for_the_mask():
    options = dict(num_samples=2000, length=3, mask_index=4, exclude_mask=False)
    for sampler in ("tweedie", "first_hitting"):
        x = sample(lambda xt: P.log().expand(len(xt), -1, -1), sampler=sampler, **options)
        assert agrees(x, independent(P), 4)
    x = sample((lambda xt: torch.eye(3).expand(len(xt), -1, -1), P.T.log()), **options)
    assert agrees(x, independent(P), 4)


def test_numbers_of_any_integer_type():
    numbers = dict(num_samples=2, length=3, steps=2, mask_index=4, top_k=3, seed=3)
    expected = sample(product, **numbers)
    for kind in (numpy.int64, numpy.uint8, torch.tensor):
        assert torch.equal(sample(product, **{name: kind(number) for name, number in numbers.items()}), expected)
