"""Reverse steps and samples of noise that is part mask and part uniform."""

import pytest
import torch
from laws import agrees
from mixtures import STRINGS, Oracle, V, each_mask, ids, law_of_pairs, logits_of, matrix, processes

from fastdiff import (
    Mixture,
    mixture_reverse_step,
    reference,
    sample,
)

P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)  # [L, N] laws of independent tokens
MOVES = [  # sigma, share, sigma_next, share_next
    (1.0, 0.3, 0.4, 0.3),
    (1.0, 0.3, 0.4, 0.1),
    (0.9, 0.2, 0.3, 0.5),
    (1.0, 0.3, 0.0, 0.7),
    (40.0, 0.5, 1.0, 0.5),
    (1.0, 0.0, 0.4, 0.0),
    (1.0, 1.0, 0.4, 1.0),
]


@each_mask
@pytest.mark.parametrize("move", MOVES, ids=str)
def test_reverse_step_is_bayes(mask, move):
    """Of one token: its posterior by matrices, against the formula, and against draws from every backend."""
    sigma, share, after, share_after = move
    prior = torch.zeros(V, dtype=torch.float64).index_copy(0, ids(mask), P[0])
    first, whole = matrix(after, share_after, mask), matrix(sigma, share, mask)
    step = whole @ torch.linalg.inv(first)  # Markov: what the two times differ by
    assert (step > -1e-12).all()
    joint = step.clamp_min(0) * (first @ prior)  # [x_t, x_s]
    posterior = joint / joint.sum(1, keepdim=True)
    possible = [y for y in range(V) if (whole @ prior)[y] > 0]

    xt = torch.tensor(possible)
    levels = [torch.full((len(xt),), level, dtype=torch.float64) for level in move]
    logits = logits_of(P[0].expand(len(xt), -1), mask)
    rows = reference.mixture_reverse_step(logits, xt, *levels, mask)
    torch.testing.assert_close(rows, posterior[xt])
    n = 8000
    for backend in (None, "reference"):
        drawn = mixture_reverse_step(
            logits.expand(n, -1, -1), xt.expand(n, -1), sigma, share, sigma_next=after, share_next=share_after,
            mask_index=mask, seed=2, backend=backend,
        )  # fmt: skip
        for k in range(len(xt)):
            certain = rows[k].max() > 1 - 1e-12
            same = drawn[:, k].eq(rows[k].argmax()).all() if certain else agrees(drawn[:, k : k + 1], rows[k], V)
            assert same, (backend, possible[k])


def test_backends_draw_the_same():
    torch.manual_seed(0)
    logits, xt = torch.randn(64, 20, 50), torch.randint(50, (64, 20))
    for temperature in (1.0, 0.3, 0.0):
        options = dict(sigma_next=0.5, mask_index=7, temperature=temperature, seed=1, step=3)
        drawn = [mixture_reverse_step(logits, xt, 0.9, 0.4, **options, backend=b) for b in (None, "reference")]
        assert (drawn[0] == drawn[1]).double().mean() > 0.999
        part = mixture_reverse_step(logits[5:9], xt[5:9], 0.9, 0.4, sample_ids=torch.arange(5, 9), **options)
        assert torch.equal(part, drawn[0][5:9])


def test_temperature_leaves_whether_a_token_changes():
    logits, xt = (
        torch.randn(4000, 2, V, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[0, 3]]).expand(4000, -1),
    )
    warm, cold = (mixture_reverse_step(logits, xt, 2.0, 0.5, sigma_next=0.5, seed=1, temperature=t) for t in (1.0, 0.0))
    assert torch.equal(warm == xt, cold == xt)
    assert torch.equal(warm == 3, cold == 3)
    best = torch.where(xt == 3, logits[..., :3].argmax(-1), logits[..., 1:3].argmax(-1) + 1)
    changed = (cold != xt) & (cold != 3)
    assert torch.equal(cold[changed], best[changed])


def chain(oracle, graph, schedule, share, steps):
    """The law of two tokens after the steps of `sample`, by enumeration: [V V]."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigma, shares, states = schedule.total_noise(times), share(times), STRINGS
    sigma[-1] = 0
    limit = reference.mixture_limit(shares[0], V, graph.mask_index)
    law = (limit.unsqueeze(1) * limit).flatten()
    for k in range(steps):
        now, after = sigma[k].expand(len(states)), sigma[k + 1].expand(len(states))
        levels = (
            level.unsqueeze(1).expand(-1, 2)
            for level in (now, shares[k].expand(len(states)), after, shares[k + 1].expand(len(states)))
        )
        rows = reference.mixture_reverse_step(oracle(states, now), states, *levels, graph.mask_index).nan_to_num()
        law = law @ (rows[:, 0].unsqueeze(2) * rows[:, 1].unsqueeze(1)).flatten(1)
    return law


@pytest.mark.parametrize("mask", [3, 1])
def test_sampling_from_the_truth_gives_the_truth(mask):
    """As steps grow, for tokens change by themselves in each; and draws are from the law of their number of steps."""
    for oracle, graph, schedule, share in processes(mask):
        far, near = (chain(oracle, graph, schedule, share, steps) - law_of_pairs(mask) for steps in (10, 120))
        assert near.abs().sum() < 0.3 * far.abs().sum() < 0.1
        drawn = sample(oracle, graph=graph, schedule=schedule, num_samples=6000, length=2, steps=6, seed=11)
        assert agrees(drawn, chain(oracle, graph, schedule, share, 6), V)


def test_sampling_edits_tokens_and_keeps_the_prompt():
    oracle = Oracle(3, lambda s: torch.full_like(s, 0.5))
    options = dict(num_samples=200, length=2, steps=30, graph=Mixture(V, 3, 0.5), return_trajectory=True)
    frames = sample(oracle, **options).trajectory
    before, after = frames[:-1], frames[1:]
    assert ((before != 3) & (after != 3) & (before != after)).any()
    assert ((before != 3) & (after == 3)).any()
    assert (frames[-1] != 3).all()
    frames = sample(oracle, prompt=torch.tensor([2]), **options).trajectory
    assert (frames[..., 0] == 2).all()
    assert (frames[0, :, 1] != frames[-1, :, 1]).any()
