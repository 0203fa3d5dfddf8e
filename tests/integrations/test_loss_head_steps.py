"""LossHead under wrappers and what else is done to a step. Many ranks: loss_head_ranks.py."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_heads import (
    B,
    D,
    L,
    Network,
    Scaled,
    V,
    agree,
    batch,
    grads,
    near,
    ours,
    published,
    scaled,
    scaled_and_capped,
    with_layer,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MaskedLMOutput

from fastdiff.integrations.loss_head import LossHead


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("layer", "reduction"), [(lambda linear: linear, "mean"), (Scaled, "none")])
def test_compiled_once_for_all_steps(layer, reduction):
    """Two graphs, with and without the loss, and two more when the batch is of another size."""
    torch.compiler.reset()
    model = with_layer(layer, tail=scaled_and_capped)
    compiled = torch.compile(model, fullgraph=layer is not Scaled, backend="aot_eager")
    xt, x0, known = batch()
    for size in (2, 3, 4):
        options = {name: tensor[:size] for name, tensor in known.items()} | dict(reduction=reduction, given=xt[:size])
        with torch.compiler.set_stance("fail_on_recompile" if size == 4 else "default"):
            got = grads(model, ours(compiled, x0[:size], **options))
            assert compiled(xt[:size]).logits.shape == (size, L, V)
        near(got, grads(model, published(model, x0[:size], **options)))


def test_a_compiled_layer():
    torch.compiler.reset()
    agree(with_layer(partial(torch.compile, backend="aot_eager")))


@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, layer):
    """No further from the exact gradient than the loss of the model's logits, and float16's loss scale fits."""
    _, x0, options = batch()
    model = with_layer(layer, dtype=torch.float32)
    whole = copy.deepcopy(model).double()
    exact = grads(whole, published(whole, x0, **options, reduction="mean"))[1:]
    scaler, found = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16), []
    for loss_of in (ours, published):
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, x0, **options, reduction="mean")
        _, *scaled_up = grads(model, scaler.scale(loss))
        found.append([grad / scaler.get_scale() for grad in scaled_up])
    for a, b, c in zip(*found, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - c).norm() <= 2 * (b - c).norm()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_outputs_that_a_wrapper_rounds(reduction):
    """As FSDP2's output_dtype does: the gradient of the loss has all its bits still."""

    class Rounding(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, input_ids):
            return MaskedLMOutput(logits=self.module(input_ids).logits.bfloat16())

    model, (_, x0, options) = Network(dtype=torch.float32), batch()
    options["reduction"] = reduction
    plain, rounded = ((1 / 3) * ours(called, x0, **options) for called in (model, Rounding(model)))
    for a, b in zip(grads(model, rounded), grads(model, plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = Network()
    model.body.forward = partial(checkpoint, model.body.forward, use_reentrant=reentrant)
    agree(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_whole_model_is_an_error(reentrant):
    """Its second forward comes when the layer gives logits again."""
    model, (xt, x0, options) = Network(), batch()
    start = torch.ones((), requires_grad=True)  # the reentrant mode wants an input with a gradient

    def step():
        with LossHead(model).dce_loss(x0, **options, reduction="sum") as loss_of:
            loss = loss_of(checkpoint(lambda _: model(xt).logits, start, use_reentrant=reentrant))
        loss.backward()

    with pytest.raises(RuntimeError, match="a reentrant checkpoint" if reentrant else r"torch\.utils\.checkpoint"):
        step()
    model.zero_grad()
    agree(model)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
def test_accumulation_and_a_retained_graph(layer):
    xt, x0, known = batch()
    model = with_layer(layer)
    for options in (dict(reduction="mean", num_items=x0.numel()), dict(reduction="none")):
        expected = grads(model, published(model, x0, **known, **options).sum())[1:]
        for rows in (slice(0, 1), slice(1, B)):
            some = {name: tensor[rows] for name, tensor in known.items()}
            loss = ours(model, x0[rows], given=xt[rows], **some, **options)
            for _ in range(3):
                loss.sum().backward(retain_graph=True)
        near([parameter.grad / 3 for parameter in model.parameters()], expected)
        model.zero_grad()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_evaluation(layer, without):
    _, x0, options = batch()
    model = with_layer(layer).eval()
    with without():
        loss = ours(model, x0, **options)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, published(model, x0, **options), rtol=1e-10, atol=0)
    agree(model.train())


class Counting(Network):
    """Draws numbers, and counts what it sees."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(D, dtype=torch.float64)

    def forward(self, input_ids):
        hidden = self.norm(self.body(self.embed(input_ids)).transpose(1, 2)).transpose(1, 2)
        return MaskedLMOutput(logits=self.lm_head(F.dropout(hidden)))


def test_nothing_stays_behind():
    model, (_, x0, options) = Counting(), batch()
    other, state = copy.deepcopy(model), torch.get_rng_state()
    loss = ours(model, x0, **options)
    torch.set_rng_state(state)
    torch.testing.assert_close(loss, published(other, x0, **options), rtol=1e-10, atol=0)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)
    assert all(module.training for module in model.modules())
    assert "forward" not in vars(model.lm_head)


def test_copies():
    """Of a model that has taken a step: each takes its own."""
    model = Network()
    agree(model)
    torch.save(model, saved := io.BytesIO())
    saved.seek(0)
    for again in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        again.tail = scaled
        agree(again)
    agree(model)
