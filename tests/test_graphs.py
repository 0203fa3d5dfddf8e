"""The graphs' methods: their arguments, and that they are the reference's formulas."""

import pytest
import torch

from fastdiff import Absorbing, Uniform, corrupt, dse_loss, reference

GRAPHS = [Absorbing(5), Absorbing(5, mask_index=2), Uniform(5)]


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_transitions(graph):
    i, sigma = torch.tensor([[0, 1, 2], [3, 4, 2]]), torch.tensor([0.3, 1.2])
    columns, rows = graph.transition(i, sigma), graph.transp_transition(i, sigma)
    assert columns.shape == rows.shape == (2, 3, 5)
    torch.testing.assert_close(columns.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    everything = graph.transition(torch.arange(5), 1.2)  # [x0, xt]
    torch.testing.assert_close(rows[1], everything.T[i[1]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_rates_and_scores(graph):
    score, i = torch.rand(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 2]])
    rates = graph.reverse_rate(i, score)
    torch.testing.assert_close(rates.sum(-1), torch.zeros(2, 3, dtype=torch.float64))
    assert (rates.scatter(-1, i[..., None], 0) >= 0).all()
    back = graph.staggered_score(graph.staggered_score(score, torch.tensor([0.5, 0.2])), torch.tensor([-0.5, -0.2]))
    torch.testing.assert_close(back, score.double())


def test_score_entropy_and_sample_transition_are_the_operators():
    log_score, sigma = torch.randn(2, 3, 5), torch.tensor([0.3, 1.2])
    x0 = torch.tensor([[0, 1, 1], [3, 4, 0]])
    absorbing, uniform = GRAPHS[1:]
    xt = absorbing.sample_transition(x0, sigma, seed=1)
    assert torch.equal(xt, corrupt(x0, sigma, absorbing, seed=1))
    expected = dse_loss(log_score, sigma, xt, x0, mask_index=2)
    assert torch.equal(absorbing.score_entropy(log_score, sigma, xt, x0), expected)
    xt = uniform.sample_transition(x0, sigma, seed=1)
    expected = dse_loss(log_score, sigma, xt, x0, graph="uniform")
    assert torch.equal(uniform.score_entropy(log_score, sigma, xt, x0), expected)


def test_limits():
    assert (Absorbing(5, 2).sample_limit(3, 4) == 2).all()
    limit = Uniform(5).sample_limit(2000, 10, seed=3)
    assert limit.shape == (2000, 10)
    assert torch.bincount(limit.flatten(), minlength=5).sub(4000).abs().max() < 300
    assert torch.equal(limit[:4], Uniform(5).sample_limit(4, 10, seed=3))


def test_long_noise_ends_at_the_limit():
    i = torch.arange(5)
    torch.testing.assert_close(Uniform(5).transition(i, 50.0), torch.full((5, 5), 0.2, dtype=torch.float64))
    assert torch.equal(Absorbing(5).transition(i, 50.0).argmax(-1), torch.full((5,), 4))
    assert reference.transition("uniform", i, torch.tensor(50.0), 5, None).min() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Absorbing(1), ValueError, "num_states: expected at least 2, got 1"),
        (lambda: Absorbing(5, 5), ValueError, r"mask_index: expected an id in \[-5, 5\), got 5"),
        (lambda: Uniform(5).transition(torch.rand(3), 1.0), TypeError, "i: expected int64"),
        (lambda: Uniform(5).transition(torch.tensor([5]), 1.0), ValueError, r"i: expected ids in \[0, 5\)"),
        (lambda: Uniform(5).transition(torch.tensor([1]), -1.0), ValueError, "sigma: expected finite numbers >= 0"),
        (lambda: Uniform(5).reverse_rate(torch.tensor([1]), torch.rand(1, 6)), ValueError, "score: expected 5 states"),
        (lambda: Uniform(5).staggered_score(torch.rand(2, 5), torch.rand(3)), ValueError, "dsigma: expected a number"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
