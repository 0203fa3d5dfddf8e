"""MegaDLMs and Megatron-Bridge before and after, on one rank and on two that share the vocabulary."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchrun
from rows import largest_rows
from standins import megatron as standin
from torch import nn

from fastdiff.integrations.megatron import apply_to_megadlms, apply_to_megatron_bridge, output_layer_loss

B, S, D, V = 3, 8, 4, 34
METHODS = standin.GPTModel.forward, standin.DGPTStep.__call__


class Decoder(nn.Module):
    """[b, s] tokens -> [s, b, D], of which each rank has its part in sequence parallelism."""

    def __init__(self, sequence_parallel):
        super().__init__()
        self.embedding, self.sequence_parallel = nn.Embedding(V + 1, D), sequence_parallel

    def forward(self, input_ids):
        hidden = torch.tanh(self.embedding(input_ids % (V + 1))).transpose(0, 1)
        return hidden.chunk(dist.get_world_size())[dist.get_rank()] if self.sequence_parallel else hidden


def made(sequence_parallel=False, bias=False, tied=False, **config):
    """A model whose last layer is this rank's part of one that is the same on any number of ranks."""
    torch.manual_seed(0)
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    decoder = Decoder(sequence_parallel)
    weight, offset = (nn.Parameter(torch.randn(*size).chunk(ranks)[rank].clone()) for size in ((V, D), (V,)))
    config = SimpleNamespace(**vars(standin.CONFIG) | dict(sequence_parallel=sequence_parallel) | config)
    layer = standin.ColumnParallelLinear(config, None if tied else weight, offset if bias else None)
    model = standin.GPTModel(decoder, layer, tied=weight if tied else None).double()
    if tied:
        model.weight = model.tied = nn.Parameter(weight.detach().double())
    return model


def tokens():
    return torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))


def megadlms(model):
    """Losses of a batch; the first is one that nobody asks for."""
    x0 = tokens()
    losses, mask = model(F.pad(x0, (1, 0)), None, None, labels=F.pad(x0, (0, 1)))
    assert (losses[~mask] == 0).all()
    return (losses * torch.linspace(1, 2, S, dtype=torch.float64)).sum(), int(mask.sum())


def bridge(model):
    x0 = tokens()
    batch = (x0, x0.roll(-1, 1), (torch.arange(S) > 1).long().expand(B, S))
    output, loss_of = standin.DGPTStep()(None, iter([batch]), model)
    loss, num_tokens = loss_of(output)
    return loss, int(num_tokens)


CODEBASES = {megadlms: apply_to_megadlms, bridge: apply_to_megatron_bridge}


def run(step, model):
    torch.manual_seed(2)
    model.zero_grad()
    loss, count = step(model)
    loss.backward()
    return loss.detach(), count, [p.grad for p in model.parameters()]


def agree(applied, step, **options):
    model, part = made(**options), V // (dist.get_world_size() if dist.is_initialized() else 1)
    (loss, count, grads), most = largest_rows(lambda: run(step, model), part)
    undo = applied(standin, CODEBASES[step])
    (got, got_count, got_grads), got_most = largest_rows(lambda: run(step, model), part)
    undo()
    assert (standin.GPTModel.forward, standin.DGPTStep.__call__) == METHODS
    assert len(grads) >= 2
    assert got_count == count
    assert most >= B * S * (2 if step is bridge else 1)
    assert got_most <= (B * S if step is bridge else count)
    torch.testing.assert_close(got, loss, rtol=1e-10, atol=0)
    for ours, theirs in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert not {"forward", "compute_language_model_loss"} & (vars(model).keys() | vars(model.output_layer).keys())
    return loss, grads


@pytest.mark.parametrize("step", CODEBASES)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"tied": True}])
def test_a_step_before_and_after(applied, step, options):
    agree(applied, step, **options)


def whole_step():
    """`megadlms` without ranks or layers: its loss, and gradients of the embedding and of all ids."""
    model = made_whole()
    torch.manual_seed(2)
    xt, mask, t = standin.GPTModel.difflm_forward_process(None, x0 := tokens())
    logits = torch.tanh(model.embedding(xt % (V + 1))) @ model.weight.T
    losses = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none") * mask / t
    (loss := (losses * torch.linspace(1, 2, S, dtype=torch.float64)).sum()).backward()
    return loss.detach(), model.embedding.weight.grad, model.weight.grad


def made_whole():
    torch.manual_seed(0)
    model = Decoder(False)
    model.weight = nn.Parameter(torch.randn(V, D))
    return model.double()


def two_ranks():
    def applied(_, apply):
        sys.modules.update(standin.PUBLISHED)
        return apply()

    for step in CODEBASES:
        for options in ({}, {"tied": True, "bias": True}, {"sequence_parallel": True}):
            loss, grads = agree(applied, step, **options)
            if step is bridge or "tied" in options:
                continue
            expected, of_embedding, of_weight = whole_step()
            if "sequence_parallel" in options:  # as Megatron does with parameters that all ranks have
                dist.all_reduce(grads[0])
            torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
            torch.testing.assert_close(grads[0], of_embedding, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(grads[1], of_weight.chunk(2)[dist.get_rank()], rtol=1e-10, atol=1e-12)


def test_two_ranks_share_the_vocabulary():
    torchrun.launch(__file__, 2, "two_ranks")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("function", "checkout"), [("megadlms", "megadlms"), ("bridge", "megatron_bridge")])
def test_their_own_code(function, checkout, ranks):
    if not Path(os.environ.get("FASTDIFF_CHECKOUTS", "nowhere"), checkout).is_dir():
        pytest.skip("no checkout of it")
    torchrun.launch(Path(__file__).with_name("megatron_checkouts.py"), ranks, function)


def test_without_labels_there_are_logits(applied):
    model = made()
    expected = model(tokens(), None, None)
    applied(standin, apply_to_megadlms)
    applied(standin, apply_to_megatron_bridge)
    assert torch.equal(model(tokens(), None, None), expected)


def test_a_stage_that_is_not_the_last_gives_hidden_states(applied):
    model = made()
    model.post_process = False
    applied(standin, apply_to_megadlms)
    assert model(tokens(), None, None, labels=tokens()).shape == (S - 1, B, D)


def test_hidden_states_that_a_wrapper_made_float32(applied):
    """Megatron's Float16Module does so with what a model gives."""
    model = made().bfloat16()
    call = type("Wrapper", (), {"module": model, "__call__": lambda self, *args: model(*args).float()})()
    torch.manual_seed(2)
    expected, _ = bridge(call)
    applied(standin, apply_to_megatron_bridge)
    torch.manual_seed(2)
    loss, _ = bridge(call)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)  # the published one rounds logits to bfloat16
    assert model.output_layer.weight.grad.isfinite().all()


def test_a_step_that_fails_leaves_nothing_behind(applied):
    model = made()
    applied(standin, apply_to_megadlms)
    with pytest.raises(ValueError, match="x0: expected shape"):
        model(F.pad(tokens(), (1, 0)), None, None, labels=tokens())
    assert "forward" not in vars(model.output_layer)
    assert model(tokens(), None, None).shape == (B, S, V)


def test_the_loss_of_a_layer(applied, monkeypatch):
    for name, module in standin.PUBLISHED.items():
        monkeypatch.setitem(sys.modules, name, module)
    model, x0 = made(bias=True), tokens()
    hidden = model.decoder(x0)
    logits = model.output_layer(hidden)[0].transpose(0, 1)
    expected = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
    mask = x0 % 2 == 0
    torch.testing.assert_close(output_layer_loss(model.output_layer, hidden, x0), expected)
    torch.testing.assert_close(output_layer_loss(model.output_layer, hidden, x0, mask=mask), expected * mask)
    x0[0, 0] = -100
    assert output_layer_loss(model.output_layer, hidden, x0)[0, 0] == 0


class Capped(standin.ColumnParallelLinear):
    pass


class Quantised(nn.Parameter):
    pass


def test_what_it_cannot_follow_is_an_error(applied):
    applied(standin, apply_to_megadlms)

    def loss(model):
        return megadlms(model)[0]

    model = made()
    model.output_layer.__class__ = Capped
    with pytest.raises(TypeError, match="output_layer: expected a ColumnParallelLinear and nothing else, got Capped"):
        loss(model)
    model = made()
    model.output_layer.weight = Quantised(model.output_layer.weight.detach())
    with pytest.raises(TypeError, match="output_layer: expected weights of plain numbers, got a Quantised"):
        loss(model)
    with pytest.raises(ValueError, match="defer_embedding_wgrad_compute: expected False"):
        loss(made(defer_embedding_wgrad_compute=True))


if __name__ == "__main__":
    torchrun.run(globals())
