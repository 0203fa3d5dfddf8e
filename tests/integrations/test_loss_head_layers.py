"""LossHead over last layers of any kind: quantised, tied, with adapters, of smaller types."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from loss_heads import (
    REDUCTIONS,
    D,
    Network,
    Scaled,
    V,
    agree,
    batch,
    grads,
    ours,
    published,
    scaled,
    scaled_and_capped,
    unchanged,
    with_layer,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from fastdiff import dce_loss


class Quantised(nn.Module):
    """int8 weights, which have no gradient, and a scale for each id."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, hidden):
        return F.linear(hidden, self.weight.to(hidden.dtype) * self.scale)


class Halved(torch.Tensor):
    """Weights that stand for others, as those of torchao."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not F.linear:
            return super().__torch_function__(function, types, args, kwargs)
        hidden, weight, *bias = args
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(hidden, weight.as_subclass(torch.Tensor) / 2, *bias)


def with_halved_weights(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Halved), requires_grad=False)
    return linear


class Casting(nn.Linear):
    """float32 weights in a model of another type."""

    def forward(self, hidden):
        return F.linear(hidden.to(self.weight.dtype), self.weight)


class Doubling(ModelHook):
    def pre_forward(self, module, *args, **kwargs):
        return (2 * args[0],), kwargs

    def post_forward(self, module, output):
        return 3 * output


def with_hooks(linear):
    linear.register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    linear.register_forward_hook(lambda layer, args, output: 3 * output)
    return linear


def perceptron(linear):
    return nn.Sequential(nn.Linear(D, 2 * D, dtype=torch.float64), nn.Tanh(), nn.Linear(2 * D, V, dtype=torch.float64))


LAYERS = {
    "quantised": Quantised,
    "other weights": with_halved_weights,
    "perceptron": perceptron,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "hooks": with_hooks,
    "accelerate": lambda linear: add_hook_to_module(linear, Doubling()),
    "frozen": lambda linear: linear.requires_grad_(False),
}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    *_, options = batch()
    for reduction in REDUCTIONS:
        agree(with_layer(LAYERS[name], tail=scaled), **options, **reduction)


def test_tied_and_frozen():
    agree(Network(tied=True))
    model = Network()
    model.embed.requires_grad_(False)
    model.body.requires_grad_(False)
    agree(model)
    model.requires_grad_(False)
    assert not ours(model, batch()[1]).requires_grad


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", [dict(), dict(use_dora=True), dict(modules_to_save=["lm_head"])])
def test_lora(kind):
    targets = ["body"] if "modules_to_save" in kind else ["body", "lm_head"]
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=targets, **kind)
    *_, options = batch()
    for reduction in REDUCTIONS:
        agree(get_peft_model(Network(bias=False), config).double(), **options, **reduction)


@pytest.mark.usefixtures("small_parts")
def test_dropout_in_the_layer_is_the_same_in_backward():
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["lm_head"], lora_dropout=0.5)
    model = get_peft_model(Network(bias=False), config).double()
    _, x0, options = batch()

    def loss():
        torch.manual_seed(1)
        return ours(model, x0, **options, reduction="sum")

    weight = model.base_model.model.lm_head.lora_A["default"].weight
    (grad,) = torch.autograd.grad(loss(), weight)
    direction, values = torch.randn_like(weight), []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * direction
            values.append(loss())
            weight -= step * direction
    torch.testing.assert_close((grad * direction).sum(), (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_smaller_types(dtype, layer):
    """The error is no more than a few times that of the loss of the model's logits."""
    _, x0, options = batch()
    for tail in (unchanged, scaled_and_capped):
        model = with_layer(layer, tail=tail, dtype=dtype)
        whole = copy.deepcopy(model).double()
        exact = grads(whole, published(whole, x0, **options, reduction="mean"))
        theirs = grads(model, dce_loss(model(batch()[0]).logits, x0, **options, reduction="mean"))
        for a, b, c in zip(grads(model, ours(model, x0, **options, reduction="mean")), theirs, exact, strict=True):
            assert a.dtype == b.dtype
            floor = torch.finfo(dtype).eps * c.norm()
            assert (a - c).norm() <= 2 * (b - c).norm() + floor


def test_a_layer_of_another_type():
    model = Network(dtype=torch.bfloat16)
    model.lm_head = Casting(D, V, bias=False)
    agree(model, rtol=2**-7)
