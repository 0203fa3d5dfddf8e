import itertools
import math

import pytest
import torch
from oracles import Oracle, dna_toy, markov_chain, mixture


@pytest.mark.parametrize("oracle", [mixture(4, 3, mask_index=1), markov_chain(3)], ids=["mixture", "markov"])
def test_oracle_conditionals_are_those_of_its_distribution(oracle: Oracle) -> None:
    tokens = [v for v in range(4) if v != oracle.mask_index]
    strings = torch.tensor(list(itertools.product(tokens, repeat=4)))
    p = torch.exp(-oracle.nll(strings))
    assert p.sum().item() == pytest.approx(1, rel=1e-12)
    for masked in itertools.product([False, True], repeat=4):
        xt = strings[17].masked_fill(torch.tensor(masked), oracle.mask_index)
        agrees = ((strings == xt) | (xt == oracle.mask_index)).all(1)
        assert oracle.log_prob(xt[None]).exp().item() == pytest.approx(p[agrees].sum().item(), rel=1e-12)
        probs = oracle(xt[None])[0].index_fill(1, torch.tensor(oracle.mask_index), -math.inf).softmax(1)
        for i in xt.eq(oracle.mask_index).nonzero().flatten().tolist():
            expected = [p[agrees & (strings[:, i] == v)].sum() / p[agrees].sum() for v in range(4)]
            torch.testing.assert_close(probs[i], torch.stack(expected), rtol=1e-12, atol=0)


def test_dna_toy_is_a_distribution_over_its_strings() -> None:
    oracle, strings = dna_toy()
    assert len(strings.unique(dim=0)) == 128
    assert torch.exp(-oracle.nll(strings)).sum().item() == pytest.approx(1, rel=1e-12)
    assert oracle(strings.masked_fill(strings == 0, 4)).isfinite().all()
