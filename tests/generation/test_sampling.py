import itertools
import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from laws import agrees, strings
from networks import RandomNetwork, random_tokens
from oracles import mixture
from torch import nn

from fastdiff import Generated, reference
from fastdiff.generation.reverse import reverse_law, reverse_step
from fastdiff.generation.sampling import sample
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.graphs import Absorbing, Uniform
from fastdiff.schedules import Cosine, Geometric, LogLinear

TIMED = ["tweedie", "euler", "ancestral"]
RANKED = ["confidence", "margin", "entropy"]
SAMPLERS = [*TIMED, "first_hitting", *RANKED, "random"]
P = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.05, 0.45]])  # [L, 4] laws


def product(xt):
    """Conditionals of independent tokens with laws P. The mask is 4, whose own logit never matters."""
    return torch.cat((P.log(), torch.full((len(P), 1), 7.0)), 1).expand(len(xt), -1, -1)


def product_scores(xt, sigma):
    """The same as SEDD's output: its tail, - log e1 - log(V - 1), leaves log c - log e1."""
    return product(xt) + math.log(4)


class UniformProduct:
    """True scores p_t(y) / p_t(x_t) of independent tokens with laws P, noised uniformly."""

    config = SimpleNamespace(num_states=4)

    def __call__(self, xt, sigma):
        alpha = torch.exp(-sigma.double()).view(-1, 1, 1)
        pt = alpha * P.double() + (1 - alpha) / 4
        score = pt / pt.gather(-1, xt.unsqueeze(-1))
        return score.log() + torch.log(torch.expm1(sigma.double())).view(-1, 1, 1) + math.log(3)


def independent(laws):
    """The law over strings of independent tokens with laws [L, V]."""
    index = strings(laws.shape[1], len(laws)).T.unsqueeze(2)
    return laws.double().unsqueeze(1).expand(-1, index.shape[1], -1).gather(2, index).prod(0).squeeze(1)


def chain_law(rows_at, first, steps):
    """Where a chain over all strings ends that starts at `first` [S]; rows_at(xt, step) [S, L, V] are tokens' laws."""
    length = round(math.log(len(first)) / math.log(rows_at.num_states))
    states = strings(rows_at.num_states, length)
    for step in range(steps):
        rows = rows_at(states, step).double()
        jump = rows.gather(2, states.T.expand(len(states), -1, -1)).prod(1)  # [S, S]
        first = first @ jump
    return first


def steps_of(schedule, steps, sampler):
    """(sigma, what reverse_step is told of where it goes) of each step."""
    for i in range(steps):
        t, s = (torch.tensor(1 - j / steps, dtype=torch.float64) for j in (i, i + 1))
        sigma, dsigma = schedule(t)
        if i == steps - 1:
            yield sigma.item(), dict(sigma_next=0.0)
        elif sampler == "euler":
            yield sigma.item(), dict(step_size=dsigma.item() / steps)
        else:
            yield sigma.item(), dict(sigma_next=schedule.total_noise(s).item())


# ----------------------------------------------------------------------------------------------- laws


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


# ------------------------------------------------------------------------------------- orders and steps


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()])
@pytest.mark.parametrize("sampler", ["tweedie", "euler"])
def test_conditionals_take_the_steps_of_reverse_step(sampler, schedule):
    network, options = RandomNetwork(7), dict(mask_index=4, parametrization="logits", backend="reference")
    named = dict(num_samples=20, length=7, steps=5, sampler=sampler, schedule=schedule, seed=2, return_trajectory=True)
    result = sample(network, **named, **options)
    xt = torch.full((20, 7), 4)
    for step, (sigma, after) in enumerate(steps_of(schedule, 5, sampler)):
        if step + 1 == len(result.trajectory):
            assert (xt < 4).all()
            break
        logits = network(xt).index_fill(2, torch.tensor(4), -math.inf)
        xt = reverse_step(logits, xt, sigma, **after, seed=2, step=step, **options)
        assert torch.equal(xt, result.trajectory[step + 1])


def plain_llada(model, x, mask_index, prompt_length, steps, block_length, statistic, cfg=0.0):
    """LLaDA's `generate` at temperature 0 with low-confidence remasking (margin and entropy as Dream), written plainly
    for x [B, L], prompt and masks: all distinct states on the way."""
    frames, prompt_index = [x], x != mask_index
    num_blocks = (x.shape[1] - prompt_length) // block_length
    for block in range(num_blocks):
        end = prompt_length + (block + 1) * block_length
        masks = (x[:, end - block_length : end] == mask_index).sum(1)
        per_block = steps // num_blocks
        counts = [[n // per_block + (i < n % per_block) for i in range(per_block)] for n in masks.tolist()]
        for i in range(per_block):
            masked, logits = x == mask_index, model(x)
            if cfg:
                un = model(x.masked_fill(prompt_index, mask_index))
                logits = un + (cfg + 1) * (logits - un)
            x0, p = logits.argmax(-1), torch.softmax(logits.double(), -1)
            if statistic == "confidence":
                sure = p.gather(-1, x0.unsqueeze(-1)).squeeze(-1)
            elif statistic == "margin":
                sure = p.topk(2, -1).values.diff(dim=-1).squeeze(-1).neg()
            else:
                sure = (p * p.log()).sum(-1)
            sure[:, end:] = -math.inf
            sure = sure.masked_fill(~masked, -math.inf)
            x = x.clone()
            for b in range(len(x)):
                chosen = sure[b].topk(counts[b][i]).indices
                x[b, chosen] = x0[b, chosen]
            frames.append(x)
    return torch.stack(frames).unique_consecutive(dim=0)


@pytest.mark.parametrize(("steps", "block_length"), [(12, 4), (6, 4), (4, 6), (5, 12), (24, 6), (1, 12)])
@pytest.mark.parametrize("sampler", RANKED)
def test_equals_llada(sampler, steps, block_length):
    """Token for token and step for step, also where the network's choice is the mask itself."""
    network, prompt = RandomNetwork(15, num_tokens=6), random_tokens(8, 3, num_tokens=6)
    options = dict(steps=steps, block_length=block_length, exclude_mask=False, temperature=0)
    options |= dict(mask_index=6, sampler=sampler, return_trajectory=True)
    result = sample(network, num_samples=8, length=15, prompt=prompt, **options)
    start = torch.cat((prompt, torch.full((8, 12), 6)), 1)
    expected = plain_llada(network, start, 6, 3, steps, block_length, sampler)
    assert torch.equal(result.trajectory.unique_consecutive(dim=0), expected)
    assert (expected[-1] == 6).any()

    guided = sample(network, num_samples=8, length=15, prompt=prompt, guidance=1.5, **options)
    expected = plain_llada(network, start, 6, 3, steps, block_length, sampler, cfg=1.5)
    assert torch.equal(guided.trajectory.unique_consecutive(dim=0), expected)
    assert not torch.equal(guided.tokens, result.tokens)


def test_equals_llada_on_an_infill():
    """Sequences with different numbers of masks."""
    network, infill = RandomNetwork(12), random_tokens(8, 12)
    infill[torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) < 0.6] = 4
    options = dict(steps=6, block_length=4, temperature=0, exclude_mask=False, sampler="confidence", mask_index=4)
    result = sample(network, num_samples=8, infill=infill, return_trajectory=True, **options)
    expected = plain_llada(network, infill, 4, 0, 6, 4, "confidence")
    assert torch.equal(result.trajectory.unique_consecutive(dim=0), expected)


@pytest.mark.parametrize("sampler", [*RANKED, "random"])
def test_blocks_and_counts(sampler):
    infill = torch.full((2, 10), -1)
    infill[1, :3] = 0
    options = dict(steps=6, block_length=5, mask_index=4, sampler=sampler, return_trajectory=True)
    result = sample(RandomNetwork(10), num_samples=2, infill=infill, **options)
    left = (result.trajectory == 4).unflatten(2, (2, 5)).sum(-1)  # [steps + 1, B, blocks]
    assert left[:, 0].tolist() == [[5, 5], [3, 5], [1, 5], [0, 5], [0, 3], [0, 1], [0, 0]]
    assert left[:, 1].tolist() == [[2, 5], [1, 5], [0, 5], [0, 5], [0, 3], [0, 1], [0, 0]]
    one = sample(RandomNetwork(10), infill=infill[:1], mask_index=4, sampler=sampler, return_trajectory=True)
    assert (one.trajectory == 4).sum(2).squeeze(1).tolist() == list(range(10, -1, -1))


@pytest.mark.parametrize("sampler", ["tweedie", "first_hitting", "confidence"])
def test_guidance_is_the_formula(sampler):
    """A network guided inside gives the same; so does guidance of hidden states in front of a last layer."""
    network, infill = RandomNetwork(6), torch.tensor([1, -1, -1, 2, -1, -1])
    head = nn.Linear(5, 5).double().requires_grad_(False)

    def inside(xt):
        un = network(torch.where(infill >= 0, 4, xt))
        return head(un) + 2.5 * (head(network(xt)) - head(un))

    options = dict(num_samples=30, infill=infill, mask_index=4, sampler=sampler, return_trajectory=True)
    expected = sample(inside, **options)
    for model in (lambda xt: head(network(xt)), (network, head)):
        result = sample(model, guidance=1.5, **options)
        assert torch.equal(result.trajectory, expected.trajectory)
        assert result.num_forwards == 2 * expected.num_forwards
    options["infill"] = infill.masked_fill(infill < 0, 4)
    assert torch.equal(sample(model, guidance=1.5, **options).trajectory, expected.trajectory)
    assert not torch.equal(sample((network, head), **options).tokens, expected.tokens)


def test_guidance_by_nothing_costs_nothing():
    options = dict(num_samples=4, length=6, mask_index=4, return_trajectory=True)
    plain, guided = (sample(RandomNetwork(6), guidance=w, **options) for w in (0.0, 2.0))
    assert torch.equal(plain.tokens, guided.tokens)
    assert plain.num_forwards == guided.num_forwards


# ------------------------------------------------------------------------------ what all samplers keep to


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_sees_only_what_changes(sampler):
    network = RandomNetwork(6)
    infill = random_tokens(10, 6).masked_fill(torch.arange(60).view(10, 6) % 7 < 4, -1)
    steps = None if sampler == "first_hitting" else 40
    options = dict(num_samples=10, infill=infill, steps=steps, mask_index=4, sampler=sampler)
    result = sample(network, return_trajectory=True, **options)
    assert isinstance(result, Generated)
    changed = (result.trajectory[1:] != result.trajectory[:-1]).any(2)
    assert result.num_forwards == sum(map(len, network.asked)) == changed.sum()
    assert min(map(len, network.asked)) > 0
    seen = torch.cat([frame[rows] for frame, rows in zip(result.trajectory, changed, strict=False)])
    assert torch.equal(torch.cat(network.asked), seen)
    if sampler == "first_hitting":
        assert len(result.trajectory) == 1 + (infill < 0).sum(1).max()
        assert result.num_forwards == (infill < 0).sum()


def test_scores_are_asked_of_sequences_with_masks():
    seen = []

    def network(xt, sigma):
        seen.append((xt, sigma))
        return product_scores(xt, sigma)

    options = dict(length=3, steps=6, mask_index=4, parametrization="scale_by_sigma", return_trajectory=True)
    result = sample(network, num_samples=20, **options)
    masked = (result.trajectory[:-1] == 4).any(2)
    assert result.num_forwards == masked.sum()
    assert [len(xt) for xt, _ in seen] == masked.sum(1).tolist()
    assert all(sigma.shape == (len(xt),) and sigma.dtype == torch.float32 for xt, sigma in seen)
    expected = LogLinear().total_noise(torch.linspace(1, 0, 7, dtype=torch.float64))[:-1]
    torch.testing.assert_close(torch.stack([sigma[0] for _, sigma in seen]), expected[: len(seen)].float())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trajectory(sampler):
    prompt = torch.tensor([2, 0])
    options = dict(num_samples=6, length=7, mask_index=4, sampler=sampler, prompt=prompt)
    result = sample(RandomNetwork(7), return_trajectory=True, **options)
    frames = result.trajectory
    assert torch.equal(frames[0], torch.tensor([2, 0, 4, 4, 4, 4, 4]).expand(6, 7))
    assert torch.equal(frames[-1], result.tokens)
    assert (frames[-1] < 4).all()
    assert ((frames[1:] == frames[:-1]) | (frames[:-1] == 4)).all()
    assert (frames[:-1] == 4).flatten(1).any(1).all()  # it stops when nothing is masked
    assert torch.equal(sample(RandomNetwork(7), **options), result.tokens)


@pytest.mark.parametrize("sampler", RANKED)
def test_of_equally_sure_tokens_the_first_is_revealed(sampler):
    options = dict(length=70, steps=10, mask_index=4, sampler=sampler, return_trajectory=True)
    result = sample(lambda xt: torch.zeros(*xt.shape, 5), **options)
    position = torch.arange(70)
    assert all(((frame[0] < 4) == (position < 7 * i)).all() for i, frame in enumerate(result.trajectory))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sequence_does_not_depend_on_those_beside_it(sampler):
    network = RandomNetwork(6)
    infill = random_tokens(12, 6).masked_fill(torch.arange(72).view(12, 6) % 7 < 4, 4)
    options = dict(mask_index=4, sampler=sampler, block_length=3 if sampler in [*RANKED, "random"] else None)
    x = sample(network, num_samples=12, infill=infill, seed=1, **options)
    for n in (1, 5):
        assert torch.equal(x[:n], sample(network, num_samples=n, infill=infill[:n], seed=1, **options))
    assert not torch.equal(x, sample(network, num_samples=12, infill=infill, seed=2, **options))
    x = sample(network, num_samples=40, length=6, mask_index=4, sampler=sampler)
    assert len(x.unique(dim=0)) > 5


@pytest.mark.parametrize("options", [dict(mask_index=4), dict(graph=Uniform(4))])
def test_scores_are_asked_without_those_that_are_done(options):
    network = product_scores if "mask_index" in options else UniformProduct()
    options |= dict(num_samples=6, steps=3, parametrization="scale_by_sigma")
    infill = torch.full((6, 3), -1)
    x = sample(network, infill=infill, **options)
    infill[:2] = 1
    assert torch.equal(sample(network, infill=infill, **options)[2:], x[2:])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prompt", [torch.tensor([3, 3]), torch.arange(6).view(3, 2) % 4])
def test_prompt_is_kept(prompt, sampler):
    network = RandomNetwork(3)
    x = sample(network, num_samples=3, length=3, mask_index=4, prompt=prompt, sampler=sampler)
    assert torch.equal(x[:, :2], prompt.expand(3, 2))
    assert all((xt[:, :2] < 4).all() for xt in network.asked)
    infill = nn.functional.pad(prompt, (0, 1), value=-1)
    assert torch.equal(x, sample(network, num_samples=3, infill=infill, mask_index=4, sampler=sampler))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_to_draw(sampler):
    full = torch.tensor([[0, 1, 2], [2, 1, 0]])
    for given in (dict(prompt=full, length=3), dict(infill=full)):
        result = sample(None, num_samples=2, mask_index=4, sampler=sampler, return_trajectory=True, **given)
        assert torch.equal(result.tokens, full)
        assert torch.equal(result.trajectory, full.unsqueeze(0))
        assert result.num_forwards == 0


@pytest.mark.parametrize("sampler", TIMED)
def test_the_uniform_graph_keeps_what_is_given(sampler):
    infill = torch.tensor([[0, -1, -1], [-1, 3, 2], [0, 3, 1]])
    options = dict(num_samples=3, steps=4, sampler=sampler, parametrization="scale_by_sigma", return_trajectory=True)
    result = sample(UniformProduct(), infill=infill, graph="uniform", **options)
    assert ((result.trajectory == infill) | (infill < 0)).all()
    assert result.tokens.max() < 4
    assert result.num_forwards == 2 * 4  # the third has nothing to draw
    named = sample(UniformProduct().__call__, infill=infill, graph=Uniform(4), **options)
    assert torch.equal(named.trajectory, result.trajectory)
    prompt = sample(UniformProduct(), prompt=torch.tensor([1]), length=3, graph="uniform", **options)
    assert (prompt.trajectory[:, :, 0] == 1).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sampler", ["tweedie", "first_hitting", "confidence"])
def test_a_body_and_a_last_layer(sampler, bias):
    """The same tokens, with no logits where nothing is drawn: those hidden states are NaN."""
    network, head = RandomNetwork(6), nn.Linear(5, 5, bias=bias).double().requires_grad_(False)

    def body(xt):
        return SimpleNamespace(last_hidden_state=network(xt).masked_fill((xt != 4).unsqueeze(-1), torch.nan))

    options = dict(num_samples=20, length=6, mask_index=4, sampler=sampler)
    expected = sample(lambda xt: SimpleNamespace(logits=head(network(xt))), **options)
    for last in (head, head.weight) if not bias else (head,):
        assert torch.equal(sample((body, last), **options), expected)


class Dropping(nn.Module):
    """Logits through dropout, and whether gradients were on."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.frozen = nn.Embedding(5, 5), nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.had_grad = []

    def forward(self, xt, sigma=None):
        logits = self.frozen(self.drop(self.embed(xt)))
        self.had_grad.append(logits.requires_grad)
        return logits


@pytest.mark.parametrize("parametrization", ["logits", "log_score"])
def test_modules_are_evaluated_without_gradients_and_get_their_modes_back(parametrization):
    model, options = Dropping(), dict(length=9, steps=3, mask_index=4, parametrization=parametrization)
    assert torch.equal(sample(model, num_samples=9, **options), sample(model, num_samples=9, **options))
    assert (model.training, model.drop.training, model.frozen.training) == (True, True, False)
    assert model.had_grad
    assert not any(model.had_grad)
    assert torch.is_grad_enabled()


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    sample(product, length=3, mask_index=4)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes anything for a terminal
    sample(product, length=3, mask_index=4)
    shown = capsys.readouterr()
    assert "steps" in shown.err
    assert "100%" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("loss", ["time-free", "absorb", "uniform"])
def test_transformer(loss):
    graph = "uniform" if loss == "uniform" else "absorb"
    conditioned = loss != "time-free"
    model = DiffusionTransformer(ModelConfig(5, 6, 16, 1, 2, 8 * conditioned))
    options = dict(num_samples=9, length=6, steps=3, graph=graph, prompt=torch.tensor([1]))
    x = sample(model, parametrization="scale_by_sigma" if conditioned else "logits", **options)
    assert x.shape == (9, 6)
    assert x.max() == (4 if graph == "uniform" else 3)  # id 4 is a token there, and the mask here
    if loss == "time-free":
        assert torch.equal(x, sample((model.body, model.lm_head), mask_index=4, **options))


@pytest.mark.parametrize("sampler", TIMED)
def test_conditionals_in_the_uniform_graph(sampler):
    """Independent tokens are drawn from them where noise has left nothing."""

    def network(xt, sigma):
        return P.log().expand(len(xt), -1, -1)

    x = sample(network, num_samples=3000, length=3, steps=1, graph=Uniform(4), sampler=sampler, schedule=Geometric())
    assert agrees(x, independent(P), 4)


# ---------------------------------------------------------------------------------------------- errors


SCORES = {"parametrization": "scale_by_sigma"}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"sampler": "dpm"}, ValueError, "sampler: expected one of 'tweedie', 'euler'.*'random', got 'dpm'"),
        ({"graph": "cosine"}, ValueError, "graph: expected one of 'absorb', 'uniform'"),
        ({"graph": "uniform"}, ValueError, "graph: expected a model with config"),
        ({"graph": Absorbing(5), "mask_index": 3}, ValueError, r"mask_index: expected that of Absorbing\(.*got 3"),
        ({"parametrization": "score"}, ValueError, "parametrization: expected one of"),
        ({"mask_index": None}, ValueError, "mask_index: expected a model with config.num_states"),
        ({"mask_index": -1}, ValueError, "mask_index: expected an id >= 0, got -1"),
        ({"mask_index": 5}, ValueError, r"mask_index: expected an id in \[-5, 5\), got 5"),
        ({"num_samples": 0}, ValueError, "num_samples: expected at least 1, got 0"),
        ({"num_samples": True}, TypeError, "num_samples: expected an int, got True"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got 0.5"),
        ({"steps": 2.0}, TypeError, "steps: expected an int, got 2.0"),
        ({"exclude": range(5)}, ValueError, "exclude: expected to leave one of 5 ids, got all"),
        ({"exclude": [7]}, ValueError, r"exclude: expected an id in \[-5, 5\), got 7"),
        ({"exclude": [0.0]}, TypeError, "exclude: expected an int, got 0.0"),
        (
            {"graph": Uniform(5), "mask_index": None, "exclude": [1]},
            ValueError,
            r"exclude: needs the absorbing graph, got \(1,\)",
        ),
        ({"length": 0}, ValueError, "length: expected at least 1, got 0"),
        ({"length": None}, ValueError, "length: expected at least 1, got None"),
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"sampler": "first_hitting"}, ValueError, "steps: the sampler 'first_hitting' takes none, got 2"),
        ({"block_length": 3}, ValueError, "block_length: the sampler 'tweedie' takes none, got 3"),
        ({"sampler": "random", "schedule": LogLinear()}, ValueError, "schedule: the sampler 'random' takes none"),
        ({"sampler": "margin", "block_length": 2}, ValueError, "block_length: expected a divisor of the 3 pos.*got 2"),
        ({"sampler": "margin", "block_length": 0}, ValueError, "block_length: expected a divisor of the 3 pos.*got 0"),
        ({"sampler": "margin", "block_length": 1}, ValueError, "steps: expected a multiple of the 3 blocks, got 2"),
        ({"temperature": -0.5}, ValueError, "temperature: expected a finite number >= 0, got -0.5"),
        ({"temperature": math.inf}, ValueError, "temperature: expected a finite number >= 0, got inf"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1 or None, got 0"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected a number in \(0, 1\] or None, got 1.5"),
        ({"backend": "tpu"}, ValueError, "backend"),
        ({"guidance": math.nan}, ValueError, "guidance: expected a finite number, got nan"),
        (SCORES | {"guidance": 1.0}, ValueError, "guidance: needs conditionals of the absorbing graph, got 1.0"),
        (SCORES | {"top_k": 3}, ValueError, "top_k: needs conditionals of the absorbing graph, got 3"),
        (SCORES | {"top_p": 0.5}, ValueError, "top_p: needs conditionals of the absorbing graph, got 0.5"),
        (SCORES | {"exclude_mask": False}, ValueError, "exclude_mask: needs conditionals of the absorbing graph"),
        (SCORES | {"sampler": "random"}, ValueError, "sampler: 'random' needs conditionals of the absorbing graph"),
        (SCORES | {"model": (product, P)}, TypeError, r"model: expected a callable of xt and sigma, got \("),
        ({"model": (product, 3)}, TypeError, r"model: expected a callable, or a pair \(body, lm_head\)"),
        ({"prompt": [1]}, TypeError, "prompt: expected a torch.Tensor"),
        ({"prompt": torch.ones(2)}, TypeError, "prompt: expected int64"),
        ({"prompt": torch.zeros(4).long()}, ValueError, r"prompt: expected shape \[P\].*P <= 3, got \(4,\)"),
        ({"prompt": torch.zeros(2, 2).long()}, ValueError, r"prompt: expected shape \[P\] or \[1, P\]"),
        ({"prompt": torch.tensor([4])}, ValueError, "prompt: expected ids >= 0 other than the mask's"),
        ({"prompt": torch.tensor([-1])}, ValueError, "prompt: expected ids >= 0 other than the mask's"),
        ({"infill": [1]}, TypeError, "infill: expected a torch.Tensor"),
        ({"infill": torch.ones(3)}, TypeError, "infill: expected int64"),
        ({"infill": torch.zeros(2, 3).long()}, ValueError, r"infill: expected shape \[L\] or \[1, L\].*got \(2, 3\)"),
        ({"infill": torch.zeros(0).long()}, ValueError, r"infill: expected shape \[L\].*L >= 1, got \(0,\)"),
        ({"infill": torch.zeros(4).long()}, ValueError, "length: expected that of the infill, 4, or None, got 3"),
        ({"infill": torch.tensor([0, -2, 1])}, ValueError, "infill: expected ids >= 0, or -1 .*got -2"),
        (
            {"infill": torch.zeros(3).long(), "prompt": torch.zeros(1).long()},
            ValueError,
            "prompt, infill: expected one",
        ),
    ],
)
def test_bad_arguments(changes, error, text):
    arguments = {"model": product, "length": 3, "steps": 2, "mask_index": 4} | changes
    with pytest.raises(error, match=text):
        sample(arguments.pop("model"), **arguments)


@pytest.mark.parametrize("output", [torch.zeros(1, 2, 5), torch.zeros(3, 5), None])
def test_bad_model(output):
    with pytest.raises(ValueError, match=r"model: expected \[1, 3, V\] numbers, got"):
        sample(lambda xt: output, length=3, steps=2, mask_index=4)
