"""DARE's actors: their log-probabilities, of masked tokens alone."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from rows import largest_rows
from standins import Network, problem
from standins import verl as standin

from fastdiff.integrations import verl

B, L, V = 3, 12, 33


@pytest.fixture
def p():
    return problem(B, L, V)


@pytest.fixture
def network():
    torch.manual_seed(1)
    return Network(problem(1, B * L, V), 4, bias=True, dtype=torch.float64)  # sequences one after the other


def gradients(found, network, mask):
    """Numbers of masked tokens, and gradients under random weights."""
    log_prob, per_sample = found[-2:]
    log_prob = log_prob * mask
    g = torch.Generator().manual_seed(0)
    numbers = [torch.randn(t.shape, generator=g) for t in (log_prob, per_sample)]
    total = (log_prob * numbers[0]).sum() + (per_sample * numbers[1]).sum()
    return log_prob.detach(), per_sample.detach(), torch.autograd.grad(total, [*network.parameters()])


def mask_of(name, batch):
    """What counts of an actor's log-probabilities."""
    size, seen = batch["responses"].shape[1], batch["attention_mask"]
    return dict(d1=batch["mask_indices"][..., -size:], coupled_grpo=seen).get(name, torch.ones(1))


@pytest.mark.parametrize("config", [None, standin.DREAM], ids=["LLaDA", "Dream"])
@pytest.mark.parametrize("name", verl.ACTORS)
@pytest.mark.parametrize("padding", [False, True])
def test_log_probabilities_are_the_published_ones(name, padding, config, p, network):
    batch, actor = standin.micro_batch(p, padding=padding), standin.actor(network, config)
    mask = mask_of(name, batch)
    theirs = gradients(standin.STANDINS[name](actor, batch), network, mask)
    ours = gradients(standin.ours(name, actor, batch), network, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("config", [None, standin.DREAM], ids=["LLaDA", "Dream"])
@pytest.mark.parametrize("name", verl.ACTORS)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_stand_ins_are_the_actors(name, config, p, network):
    """Where there is a checkout of them; they take float32, and -p log p is their entropy."""
    if (function := standin.real(name)) is None:
        pytest.skip("no checkout of DARE in FASTDIFF_CHECKOUTS")
    batch, actor = standin.micro_batch(p), standin.actor(network.float(), config)
    ours, published = ([*inspect.signature(f).parameters] for f in (verl.ACTORS[name]._forward_micro_batch, function))
    assert ours == published
    mask, arguments = mask_of(name, batch), (1, 3) if name == "vrpo" else (1.0, 1, 3)
    theirs = function(actor, batch, *arguments, calculate_entropy=True)
    ours = standin.ours(name, actor, batch, calculate_entropy=True)
    same = dict(rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(ours[0] * mask, theirs[0] * mask, **same)
    torch.testing.assert_close(gradients(ours, network, mask), gradients(theirs, network, mask), **same)


def test_only_masked_rows_are_multiplied():
    p = problem(B, L, 1031)
    network, batch = Network(problem(1, B * L, 1031), 4, dtype=torch.float64), standin.micro_batch(p)
    actor = standin.actor(network)
    rows = largest_rows(lambda: standin.ours("d1", actor, batch)[0].sum().backward(), 1031)[1]
    assert rows <= batch["mask_indices"].sum((0, 2)).max() + 1


def test_one_call_swaps_all_actors(monkeypatch, applied):
    modules = {}
    for name, actor in verl.ACTORS.items():
        signature = inspect.signature(actor._forward_micro_batch)
        published = type("DLLMDataParallelPPOActor", (), dict(_forward_micro_batch=lambda *_: None))
        published._forward_micro_batch.__signature__ = signature
        modules[f"verl.workers.actor.llada_dp_actor_{name}"] = SimpleNamespace(DLLMDataParallelPPOActor=published)
    undo = applied(SimpleNamespace(PUBLISHED=modules), verl.apply_to_verl)
    for module, actor in zip(modules.values(), verl.ACTORS.values(), strict=True):
        assert module.DLLMDataParallelPPOActor._forward_micro_batch is actor._forward_micro_batch
    undo()
    assert module.DLLMDataParallelPPOActor._forward_micro_batch is not actor._forward_micro_batch


def test_errors_name_the_argument(p, network):
    batch, actor = standin.micro_batch(p), standin.actor(network)
    nothing = batch["mask_indices"] & (torch.arange(B) > 0)[:, None, None]
    with pytest.raises(ValueError, match="mask_indices: expected a masked token in each sequence"):
        standin.ours("d1", actor, batch | dict(mask_indices=nothing))
    actor.use_ulysses_sp = True
    with pytest.raises(ValueError, match="ulysses_sequence_parallel_size: expected 1"):
        standin.ours("d1", actor, batch)
    actor.use_ulysses_sp = False
    with torch.no_grad():
        network.lm_head.bias[p.x0[0, -1]] = -torch.inf
    with pytest.raises(ValueError, match="finite log-probabilities, got -inf"):
        standin.ours("d1", actor, batch)
