"""A training step of the small model under what training stacks do to it: its gradients are those of the plain step."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torchrun
from cases import assert_near
from torch.utils.checkpoint import checkpoint

from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import Noised, diffusion_loss, noise

V, L = 33, 12
LOSSES = ("dce-t", "dce-harmonic", "dse-absorb", "dse-uniform")


@pytest.fixture(params=["logits", "no logits"])
def head(request, monkeypatch):
    if request.param == "no logits":
        monkeypatch.setattr("fastdiff.training.objectives.LARGE_VOCABULARY", 2)


def make(loss):
    """A model none of whose outputs is 0, as they are before training."""
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(V, L, 16, 1, 2, 8 * loss.startswith("dse")))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(batch=6):
    return torch.randint(0, V - 1, (batch, L), generator=torch.Generator().manual_seed(1))


def step(model, x0, loss, **options):
    """Noise, forward and loss: what one step of training computes."""
    return diffusion_loss(model, noise(x0, loss, V, seed=2, step=3), loss, **(dict(reduction="mean") | options))


def grads(model, loss):
    return torch.autograd.grad(loss, tuple(model.parameters()))


def near(got, expected, what, slack=8):
    for a, b in zip(got, expected, strict=True):
        assert b.abs().max() > 0
        assert_near(a, b, torch.float32, what, slack)


def test_compiles_whole():
    torch.compiler.reset()
    model, x0 = make("dce-t"), tokens()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    near(*(grads(model, run(model, x0, "dce-t")) for run in (compiled, step)), "dce-t")


@pytest.mark.parametrize(("loss", "head"), [("dce-t", "no logits"), ("dse-absorb", "no logits")], indirect=["head"])
@pytest.mark.usefixtures("head")
def test_compiled_model(loss):
    torch.compiler.reset()
    model, x0 = make(loss), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    near(*(grads(model, step(network, x0, loss)) for network in (compiled, model)), loss)


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(loss):
    model, x0 = make(loss), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        cast = step(model, x0, loss)
    assert cast.dtype == torch.float32
    exact = step(model, x0, loss)
    assert not torch.equal(cast, exact)
    torch.testing.assert_close(cast, exact, rtol=0.03, atol=0)
    for a, b in zip(grads(model, cast), grads(model, exact), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.08 * b.norm()


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_activation_checkpointing(loss, reentrant):
    """Of the whole step with its loss, and of each block."""
    model, x0 = make(loss), tokens()
    expected = grads(model, step(model, x0, loss))
    start = torch.ones((), requires_grad=True)  # the reentrant mode wants an input with a gradient
    checkpoint(lambda one: one * step(model, x0, loss), start, use_reentrant=reentrant).backward()
    near([parameter.grad for parameter in model.parameters()], expected, loss)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
    model.zero_grad()
    step(model, x0, loss).backward()
    near([parameter.grad for parameter in model.parameters()], expected, loss)


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_of_parts_of_any_size(loss):
    """The parts are divided by the tokens of all, so how they are cut changes nothing."""
    model, x0 = make(loss), tokens()
    batch = noise(x0, loss, V, seed=2, step=3)
    for start, stop in ((0, 1), (1, 6)):
        part = Noised(*(tensor[start:stop] for tensor in batch[:4]))
        diffusion_loss(model, part, loss, reduction="mean", num_items=x0.numel()).backward()
    accumulated = [parameter.grad for parameter in model.parameters()]
    near(accumulated, grads(model, step(model, x0, loss, num_items=x0.numel())), loss)


def test_data_parallel():
    torchrun.launch(Path(__file__).with_name("ranks.py"), 2, "ddp", "fsdp2")
