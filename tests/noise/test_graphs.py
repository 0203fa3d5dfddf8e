"""The graphs' methods: their arguments, and that they are the reference's formulas."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import Absorbing, Uniform, corrupt, dse_loss, reference

GRAPHS = [Absorbing(5), Absorbing(5, mask_index=2), Uniform(5)]


SIGMAS = [0.0, 1e-9, 1e-3, 0.3, 1.2, 5.0, 30.0, 90.0]


def assert_near(got, expected, dtype):
    """To 1e-6, or 1e-12 in float64, of the largest number of each row."""
    assert got.dtype == dtype
    assert got.shape == expected.shape
    error = (got - expected).abs().amax(-1)
    assert (error <= (1e-12 if dtype == torch.float64 else 1e-6) * expected.abs().amax(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_agree_with_the_reference(graph, shape, dtype):
    for k, sigma in enumerate(SIGMAS):
        g = torch.Generator().manual_seed(k)
        i = torch.randint(5, shape, generator=g)
        sigma = torch.full(shape, sigma, dtype=dtype)
        score = torch.rand(*shape, 5, generator=g, dtype=dtype) / 4
        given = i.clone(), sigma.clone(), score.clone()
        for name in ("transition", "transp_transition"):
            expected = getattr(reference, name)(graph.name, i, sigma, 5, graph.mask_index)
            assert_near(getattr(graph, name)(i, sigma), expected, dtype)
            assert_near(getattr(graph, name)(i.int(), sigma), expected, dtype)
        assert_near(graph.reverse_rate(i, score), reference.reverse_rate(graph.name, i, score, graph.mask_index), dtype)
        # exp(90) / 4 is a float32 number, but what the mask gathers of a row may be more
        expected = reference.staggered_score(graph.name, score, sigma, graph.mask_index).to(dtype)
        finite = expected.isfinite()
        staggered = graph.staggered_score(score, sigma)
        assert torch.equal(staggered[~finite], expected[~finite])
        assert_near(staggered.where(finite, 0), expected.where(finite, 0), dtype)
        assert all(torch.equal(x, y) for x, y in zip(given, (i, sigma, score), strict=True))


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_types(graph):
    i, score = torch.tensor([[0, 1, 2], [3, 4, 2]]), torch.rand(2, 3, 5)
    for sigma, dtype in ((0.3, torch.float32), (torch.tensor(0.3, dtype=torch.float64), torch.float64)):
        assert graph.transition(i, sigma).dtype == graph.transp_transition(i, sigma).dtype == dtype
        assert graph.staggered_score(score, sigma).dtype == torch.float32
    for half in (score.bfloat16(), score.half()):
        torch.testing.assert_close(graph.reverse_rate(i, half), graph.reverse_rate(i, half.float()))
        torch.testing.assert_close(graph.staggered_score(half, 0.3), graph.staggered_score(half.float(), 0.3))


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_rows_sum_to_what_they_should(graph):
    i, score = torch.tensor([[0, 1, 2], [3, 4, 2]]), torch.rand(2, 3, 5)
    torch.testing.assert_close(graph.transition(i, torch.tensor([0.3, 1.2])).sum(-1), torch.ones(2, 3))
    rates = graph.reverse_rate(i, score)
    torch.testing.assert_close(rates.sum(-1), torch.zeros(2, 3))
    assert (rates.scatter(-1, i[..., None], 0) >= 0).all()
    back = graph.staggered_score(graph.staggered_score(score, torch.tensor([0.5, 0.2])), torch.tensor([-0.5, -0.2]))
    torch.testing.assert_close(back, score)


class Allocations(TorchDispatchMode):
    """The storages, of at least so many bytes, of what operators return."""

    def __init__(self, least):
        super().__init__()
        self.least, self.found = least, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storage = result.untyped_storage() if torch.is_tensor(result) else None
        if storage is not None and storage.nbytes() >= self.least:
            self.found[storage.data_ptr()] = result  # kept, so that no address is used again
        return result


@pytest.mark.parametrize("graph", [Absorbing(1000), Uniform(1000)], ids=str)
def test_nothing_as_large_as_the_result_is_made_beside_it(graph):
    i, score = torch.randint(1000, (2, 3)), torch.rand(2, 3, 1000)
    for call in (
        lambda: graph.transition(i, 0.3),
        lambda: graph.transp_transition(i, 0.3),
        lambda: graph.reverse_rate(i, score),
        lambda: graph.staggered_score(score, 0.3),
    ):
        with Allocations(least=i.numel() * 1000) as made:  # a byte for each number: bool too
            result = call()
        made.found.pop(score.untyped_storage().data_ptr(), None)
        assert list(made.found) == [result.untyped_storage().data_ptr()]


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_scores_have_a_gradient(graph):
    i, score = torch.tensor([0, 2, 4]), torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: graph.reverse_rate(i, s), score)
    assert torch.autograd.gradcheck(lambda s: graph.staggered_score(s, 0.7), score)


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
    torch.testing.assert_close(Uniform(5).transition(i, 50.0), torch.full((5, 5), 0.2))
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
