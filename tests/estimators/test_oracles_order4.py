import itertools
import math

import pytest
import torch
from dna import markov_nll, markov_strings
from oracles import MarkovChain, OrderMarkov, markov_chain, order_markov


@pytest.mark.parametrize(("order", "num_tokens", "length"), [(1, 3, 4), (2, 3, 5), (4, 2, 7), (4, 2, 3)])
def test_conditionals_are_those_of_the_distribution(order: int, num_tokens: int, length: int) -> None:
    oracle = order_markov(order, num_tokens)
    oracle.initial = torch.arange(1.0, num_tokens**order + 1, dtype=torch.float64).softmax(0)
    strings = torch.tensor(list(itertools.product(range(num_tokens), repeat=length)))
    before = torch.tensor(list(itertools.product(range(num_tokens), repeat=order)))  # the letters never seen
    p = sum(
        q * torch.exp(-markov_nll(oracle.transition, torch.cat([b.expand(len(strings), -1), strings], 1), order))
        for q, b in zip(oracle.initial, before, strict=True)
    )
    assert p.sum().item() == pytest.approx(1, rel=1e-12)
    masks = torch.tensor(list(itertools.product([False, True], repeat=length)))
    xt = strings[17 % len(strings)].masked_fill(masks, oracle.mask_index)
    agrees = ((strings == xt.unsqueeze(1)) | masks.unsqueeze(1)).all(2).double()  # [2^L, strings]
    torch.testing.assert_close(oracle.log_prob(xt), (agrees @ p).log(), rtol=1e-12, atol=1e-14)
    is_letter = torch.nn.functional.one_hot(strings, num_tokens).double()  # [strings, L, A]
    expected = torch.einsum("ms,s,sla->mla", agrees, p, is_letter) / (agrees @ p).view(-1, 1, 1)
    probs = oracle(xt)[..., :num_tokens].softmax(2)
    torch.testing.assert_close(probs[masks], expected[masks], rtol=1e-12, atol=0)


def test_order_one_is_the_markov_chain() -> None:
    chain = markov_chain(4)
    x = chain.sample(5, 12)
    xt = x.masked_fill(torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) < 0.5, 4)
    # a letter before the string that is always 0, and from which the chain starts as its initial distribution says
    first = MarkovChain(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), chain.transition)
    same = OrderMarkov(first.initial, first.transition)
    padded = torch.nn.functional.pad(xt, (1, 0))
    torch.testing.assert_close(same.log_prob(xt), first.log_prob(padded), rtol=1e-12, atol=0)
    probs, expected = same(xt)[..., :4].softmax(2), first(padded)[:, 1:, :4].softmax(2)
    torch.testing.assert_close(probs[xt == 4], expected[xt == 4], rtol=1e-12, atol=0)


def test_a_response_given_a_prompt_is_the_chain_rule() -> None:
    oracle = order_markov(4)
    x = markov_strings(oracle.transition, 50, 32, seed=1)
    target = (torch.arange(32) >= 16).expand(50, -1)
    torch.testing.assert_close(oracle.nll(x, target), markov_nll(oracle.transition, x, 16), rtol=1e-12, atol=0)


def test_strings_follow_the_chain() -> None:
    oracle = order_markov(2, 3)
    x = markov_strings(oracle.transition, 20000, 4, seed=2)
    counts = torch.bincount(x @ 3 ** torch.arange(4), minlength=81)
    strings = torch.arange(81).unsqueeze(1) // 3 ** torch.arange(4) % 3
    expected = len(x) * torch.exp(-oracle.nll(strings))
    assert ((counts - expected) ** 2 / expected).sum().item() < 80 + 4 * math.sqrt(160)
