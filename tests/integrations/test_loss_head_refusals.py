"""What LossHead refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_heads import MASK, B, D, L, Network, V, agree, batch, capped, cut, low, near, ours, published, scaled
from torch import nn

from fastdiff import dce_loss
from fastdiff.integrations.loss_head import LossHead


def temperature(z):
    return z * torch.linspace(1, 1.1, z.shape[1], dtype=z.dtype)[:, None]


REFUSED = {
    "log_softmax": lambda z: z.log_softmax(-1),
    "a bias": lambda z: z + torch.linspace(0, 1, V, dtype=z.dtype),
    "a temperature for each token": temperature,
    "a shift": lambda z: torch.cat([z[:, :1], z[:, :-1]], 1),
    "tokens mixed": lambda z: z - z.mean(1, keepdim=True),
    "fewer tokens": lambda z: z[:, :-1],
    "more ids": lambda z: F.pad(z, (0, 1)),
    "ids left out": low(3, 5),
    "every id left out": low(*range(V)),
    "ids in another order": lambda z: z.flip(-1),
    "clamped": lambda z: z.clamp(-30, 30),
    "NaN": lambda z: z * math.nan,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loss_cannot_follow(name, dtype):
    """Nor where the model rounds it."""
    for tail in (REFUSED[name], lambda z: REFUSED[name](z).to(dtype)):
        with pytest.raises(ValueError, match=r"^logits: expected"):
            ours(Network(tail, dtype=dtype), batch()[1])


def test_what_the_model_leaves_out_is_what_the_loss_does():
    xt, x0, options = batch()
    for wrong in (dict(options), dict(xt=xt, mask_index=5), dict(options, mask_index=5)):
        with pytest.raises(ValueError, match="mask_index: expected 30, which the model leaves out, got"):
            ours(Network(low(MASK)), x0, **wrong)
    for tail, wrong in ((low(MASK), dict(graph="uniform")), (low(*range(MASK, V)), dict(mask_index=MASK))):
        with pytest.raises(ValueError, match="graph: expected a model that leaves out no id"):
            ours(Network(tail), x0, sigma=1.0, xt=xt, **dict(mask_index=MASK) | wrong)


def test_models_without_a_last_layer():
    model, x0 = Network(), batch()[1]
    for layer, what in ((None, "nothing"), (model.embed, "a Embedding")):
        model.get_output_embeddings = lambda layer=layer: layer
        with pytest.raises(TypeError, match=f"layer: expected a last layer, .* gives {what}"):
            LossHead(model)
    with pytest.raises(TypeError, match="nothing"):
        LossHead(model.body)
    with pytest.raises(RuntimeError, match="calls its last layer once, it did 0 times"):
        LossHead(model, nn.Linear(D, V)).dce_loss(x0).__enter__()


def test_a_layer_that_is_called_twice():
    model, (xt, x0, _) = Network(), batch()
    forward = model.forward
    model.forward = lambda input_ids: forward(input_ids) and forward(input_ids)
    with pytest.raises(RuntimeError, match="calls its last layer once, it did 2 times"):
        ours(model, x0)
    model.forward = forward
    with LossHead(model).dce_loss(x0):
        model(xt)
        with pytest.raises(RuntimeError, match="called twice"):
            model(xt)
    agree(model)


def test_what_is_not_what_the_layer_gave():
    model, (xt, x0, options) = Network(), batch()
    logits = model(xt).logits
    not_this = r"expected what the last layer gave, \[..., 33\] in 4 rows, got"
    for wrong, error, message in (
        *((wrong, RuntimeError, not_this) for wrong in (logits, logits[..., :D], logits[0, 0], logits[:, :2])),
        (logits[:1, :4], RuntimeError, "something else behind its last layer"),
        (logits.tolist(), TypeError, r"logits: expected a torch\.Tensor, got list"),
    ):
        with LossHead(model).dce_loss(x0, **options, reduction="sum") as loss_of:
            with pytest.raises(RuntimeError, match="did not call its last layer, a Linear"):
                loss_of(logits)
            right = model(xt).logits
            with pytest.raises(error, match=message):
                loss_of(wrong)
            with pytest.raises(RuntimeError, match="has no gradient"):
                loss_of(right.detach())
    with LossHead(model).dce_loss(x0), torch.no_grad(), pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
        model(xt)
    agree(model)


def test_a_model_that_changes():
    """It is asked once; another behaviour is an error, and then it is asked again."""
    model, x0, asked = Network(), batch()[1], []
    model.register_forward_pre_hook(lambda model, args, kwargs: asked.append(kwargs["input_ids"]), with_kwargs=True)
    for _ in range(3):
        ours(model, x0)
    assert [tuple(ids.shape) for ids in asked] == [(1, 4), *[(B, L)] * 3]
    for tail in (scaled, capped, cut, low(V - 1)):
        model.tail = tail
        with pytest.raises(RuntimeError, match=r"something else behind|what the last layer gave"):
            ours(model, x0)
        agree(model)


def test_models_that_share_a_layer():
    first, second = Network(), Network(scaled)
    second.lm_head = first.lm_head
    for model in (first, second, first, second):
        agree(model)


def test_failed_and_nested_steps():
    model, (xt, x0, options) = Network(), batch()
    with pytest.raises(ValueError, match=r"x0: expected shape \(4, 17\), got \(4, 16\)"):
        ours(model, x0[:, 1:])
    with pytest.raises(ValueError, match="x0: expected ids in"):
        ours(model, x0 + V)
    with pytest.raises(TypeError, match=r"x0: expected a torch.Tensor, got list"):
        ours(model, x0.tolist())
    with pytest.raises(TypeError, match="bias"):
        ours(model, x0, bias=None)
    with pytest.raises(IndexError):
        ours(model, x0, given=xt + V)
    with LossHead(model).dce_loss(x0, **options), pytest.raises(RuntimeError, match="computes another loss"):
        ours(model, x0)
    with LossHead(model).dce_loss(x0, **options) as f, LossHead(other := Network(scaled)).dce_loss(x0, **options) as g:
        losses = f(model(xt).logits), g(other(xt).logits)
    near(losses, [published(one, x0, **options) for one in (model, other)])
    agree(model)


def test_a_model_that_is_called_in_another_way():
    model, (xt, x0, options) = Network(), batch()
    plain, recurrent = nn.Sequential(model.embed, model.lm_head), nn.LSTM(D, V, dtype=torch.float64)
    with LossHead(plain, model.lm_head, logits=plain).dce_loss(x0, **options) as loss_of:
        loss = loss_of(plain(xt))
    near([loss], [dce_loss(plain(xt), x0, **options)])
    for head, error, message in (
        (LossHead(nn.Sequential(*plain), plain[1]), RuntimeError, r"^logits: expected a way .*TypeError: .*input_ids"),
        (LossHead(model, logits=model), TypeError, r"logits: expected a torch\.Tensor, got MaskedLMOutput"),
        (
            LossHead(model, recurrent, logits=lambda tokens: recurrent(model.embed(tokens))[0]),
            RuntimeError,
            r"layer: expected one that gives each token's logits, got a LSTM",
        ),
    ):
        with pytest.raises(error, match=message):
            head.dce_loss(x0).__enter__()
