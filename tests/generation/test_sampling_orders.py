"""In which order samplers reveal tokens, and by which steps."""

import math

import pytest
import torch
from networks import RandomNetwork, random_tokens
from samplers import RANKED, steps_of
from torch import nn

from fastdiff.generation.reverse import reverse_step
from fastdiff.generation.sampling import sample
from fastdiff.schedules import Cosine, LogLinear


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
