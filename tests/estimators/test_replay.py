"""Gradients of likelihoods, in the memory of one pass."""

import weakref
from unittest import mock

import pytest
import torch
from networks import RandomNetwork, random_tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff import (
    Absorbing,
    LogLinear,
    Uniform,
    conditional_nll,
    dse_nll,
    exact_nll,
    log_likelihood_ratio,
    time_free_nll,
    time_integral_nll,
)
from fastdiff.estimators import chains, scoring
from fastdiff.estimators.time_free import PROPOSALS
from fastdiff.model import DiffusionTransformer, ModelConfig

V, L, MASK = 9, 12, 8
X0 = random_tokens(3, L, MASK)
OPTIONS = dict(batch_size=5, differentiable=True)
MASKED = OPTIONS | dict(mask_index=MASK)


def made(cond_dim: int = 0, num_states: int = V, dim: int = 16) -> DiffusionTransformer:
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(num_states, L, dim, 2, 2, cond_dim)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value.sum(), model.parameters()))


def with_graphs(call):
    """As if every pass kept its graph."""
    with (
        mock.patch.object(scoring, "replayed", lambda losses: losses()),
        mock.patch.object(chains, "checkpoint", lambda function, *args, **options: function(*args)),
    ):
        return call()


FREE = {
    "exact": lambda m: exact_nll(m, X0[:, :4], **MASKED).nll,
    "conditional": lambda m: conditional_nll(m, X0[:, :3], X0[:, 3:], num_samples=8, **MASKED).nll,
    "integral": lambda m: time_integral_nll(m, X0, num_samples=8, **MASKED).nll,
    "ratio": lambda m: log_likelihood_ratio(m, X0, X0.flip(0), num_samples=16, **MASKED).log_ratio,
    "tolerance": lambda m: time_free_nll(m, X0, num_samples=16, tolerance=5.0, **MASKED).nll,
    "pair": lambda m: time_free_nll((m.body, m.lm_head), X0, num_samples=16, **MASKED).nll,
}
FREE |= {p: lambda m, p=p: time_free_nll(m, X0, num_samples=16, proposal=p, **MASKED).nll for p in PROPOSALS}


@pytest.mark.parametrize("name", FREE)
def test_gradients_are_those_of_the_graph_kept_whole(name):
    model = made()
    value, expected = FREE[name](model), with_graphs(lambda: FREE[name](model))
    assert torch.equal(value, expected)
    for found, kept in zip(gradients(value, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(found, kept, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("graph", [Absorbing(V), Uniform(V)])
def test_score_entropies(graph):
    model, options = made(cond_dim=8), OPTIONS | dict(graph=graph, schedule=LogLinear(), num_samples=8)

    def value():
        estimate = dse_nll(model, X0, **options)
        assert not estimate.stderr.requires_grad
        assert not estimate.bias.requires_grad
        return estimate.nll

    for found, kept in zip(gradients(value(), model), gradients(with_graphs(value), model), strict=True):
        torch.testing.assert_close(found, kept, rtol=1e-12, atol=1e-12)
    without = dse_nll(model, X0, **(options | dict(differentiable=False)))
    assert not without.nll.requires_grad
    assert torch.equal(without.nll, value())


def test_dropout_is_what_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 16), nn.Dropout(0.5), nn.Linear(16, V)).double()

    def value():
        torch.manual_seed(1)
        return time_free_nll(model, X0, num_samples=16, **MASKED).nll

    found, expected = value(), with_graphs(value)
    assert torch.equal(found, expected)
    torch.manual_seed(2)
    assert all(map(torch.equal, gradients(found, model), gradients(expected, model)))


def test_under_autocast():
    model = made().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = time_free_nll(model, X0, num_samples=16, **MASKED).nll
        expected = with_graphs(lambda: time_free_nll(model, X0, num_samples=16, **MASKED).nll)
    assert all(map(torch.equal, gradients(found, model), gradients(expected, model)))


def test_what_cannot_be_repeated_is_an_error():
    calls = iter(range(10**6))
    network = RandomNetwork(L, MASK)
    network.head.requires_grad_()
    nll = time_free_nll(lambda xt: network(xt) * (1 + next(calls) % 7), X0, num_samples=16, **MASKED).nll.sum()
    with pytest.raises(RuntimeError, match="a pass gave other losses when backward ran it again"):
        nll.backward()


def test_changed_weights_are_an_error():
    model = made()
    nll = time_free_nll(lambda xt: model(xt), X0, num_samples=16, **MASKED).nll.sum()
    with torch.no_grad():
        model.lm_head.weight *= 1 + 1e-9
    with pytest.raises(RuntimeError, match="weights have changed between the passes and their backward"):
        nll.backward()


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.now, self.most = weakref.WeakKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                size = storage.nbytes()
                self.seen[storage] = size
                weakref.finalize(storage, self.freed, size)
                self.now += size
                self.most = max(self.most, self.now)
        return output

    def freed(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("proposal", ["stratified", "systematic"])
def test_memory_is_that_of_one_pass(proposal):
    model = made(dim=64)

    def most(passes: int) -> int:
        model.zero_grad()
        with Memory() as memory:
            options = MASKED | dict(num_samples=passes, batch_size=1)
            time_free_nll(model, X0[:1], proposal=proposal, **options).nll.sum().backward()
        return memory.most

    few, many, kept = most(4), most(64), with_graphs(lambda: most(64))
    assert many < 1.1 * few
    assert kept > 3 * few


def test_fits_leave_no_graph_behind():
    """Until backward, what an estimate holds is its passes' losses and masks, and hardly more."""
    model = made()
    with Memory() as memory:
        estimate = time_free_nll(model, X0, num_samples=64, **MASKED)

    assert estimate.nll.requires_grad
    assert memory.now < 80 * 3 * 64 * L  # bytes
