"""Log-probabilities and entropies from a last layer, against those of the model's own logits: with all gradients."""

import pytest
import torch
from loss_heads import MASK, PLAIN, Network, Scaled, batch, low, near, with_layer
from peft import LoraConfig, get_peft_model

from fastdiff.integrations.loss_head import LossHead

KINDS = {"linear": lambda linear: linear, "in parts": Scaled}


def from_logits(model, x0, mask, temperature, left_out):
    z = model(input_ids=batch()[0]).logits / temperature
    if left_out:
        z = z.index_fill(-1, torch.tensor([MASK]), -torch.inf)
    logps = z.log_softmax(-1)
    entropy = -torch.where(logps.isneginf(), 0, logps.exp() * logps.masked_fill(logps.isneginf(), 0)).sum(-1)
    found = logps.gather(-1, x0[..., None])[..., 0], entropy
    return [number.where(mask, 0) for number in found]


def from_layer(model, x0, mask, temperature, left_out, **options):
    options |= dict(temperature=temperature, mask_index=MASK, exclude_mask=left_out, mask=mask)
    with LossHead(model).token_logps(x0, **options) as logps_of:
        return logps_of(model(input_ids=batch()[0]).logits)


def grads(model, numbers):
    """Numbers, and gradients of all parameters where each number has a weight of its own."""
    weights = [torch.linspace(i - 1, i + 2, number.numel()).view(number.shape) for i, number in enumerate(numbers)]
    sum((n * w).sum() for n, w in zip(numbers, weights, strict=True)).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return [number.detach() for number in numbers], found


def agree(model, temperature=1.0, left_out=False):
    _, x0, options = batch()
    given = x0, options["mask"], temperature, left_out
    expected = grads(model, from_logits(model, *given))
    for got, wanted in zip(grads(model, from_layer(model, *given, return_entropy=True)), expected, strict=True):
        near(got, wanted)
    logps, *_ = expected
    near(from_layer(model, *given)[None], logps[:1])


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("tail", PLAIN)
def test_what_is_behind_the_layer(tail, layer):
    model = with_layer(KINDS[layer], tail=tail)
    agree(model)
    agree(model, 0.7)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("layer", KINDS)
def test_the_mask_left_out_by_the_model_or_not(layer):
    agree(with_layer(KINDS[layer]), 1.3, left_out=True)
    agree(with_layer(KINDS[layer], tail=low(MASK)), left_out=True)


@pytest.mark.usefixtures("small_parts")
def test_lora():
    model = get_peft_model(Network(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    agree(model, 0.7)


@pytest.mark.parametrize("layer", KINDS)
def test_nothing_to_score(layer):
    model, (_, x0, options) = with_layer(KINDS[layer]), batch()
    for number in from_layer(model, x0, options["mask"] & False, 1.0, False, return_entropy=True):
        assert not number.any()
