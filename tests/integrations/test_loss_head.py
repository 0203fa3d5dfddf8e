"""LossHead against the losses of the model's own logits, in plain PyTorch: values, and gradients of all parameters."""

import copy
import io
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchrun
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MaskedLMOutput

import fastdiff.integrations.loss_head as loss_head
from fastdiff import dce_loss, dse_loss
from fastdiff.integrations.loss_head import LossHead

V, D, B, L = 34, 8, 4, 17
MASK = V - 3
REDUCTIONS = [dict(reduction=name) for name in ("none", "sum", "mean")] + [dict(reduction="mean", num_items=7)]


def unchanged(z):
    return z


class Network(nn.Module):
    """Embeddings, one layer, the last layer, and what the model does behind it."""

    def __init__(self, tail=unchanged, *, bias=True, tied=False, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D, dtype=dtype)
        self.body = nn.Linear(D, D, dtype=dtype)
        self.lm_head = nn.Linear(D, V, bias=bias, dtype=dtype)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.tail = tail

    def forward(self, input_ids):
        return MaskedLMOutput(logits=self.tail(self.lm_head(torch.tanh(self.body(self.embed(input_ids))))))

    def get_output_embeddings(self):
        return self.lm_head


def with_layer(make, **options):
    network = Network(**options)
    network.lm_head = make(network.lm_head)
    return network


class Scaled(nn.Module):
    """A layer that is not an `nn.Linear`: it is called in parts."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return 2 * self.inner(hidden)


def batch(seed=0):
    """xt, x0 and what is known of each token; half of the sequences have few that are masked."""
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, MASK, (B, L), generator=g)
    mask = torch.rand(B, L, generator=g) < 0.5
    mask[1::2, 2:] = False
    return torch.where(mask, MASK, x0), x0, dict(mask=mask, weight=torch.rand(B, L, generator=g, dtype=torch.float64))


def grads(model, loss, **options):
    """The loss's number, and gradients of all parameters under an upstream one that differs from token to token."""
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if loss.dim() else None
    loss.backward(upstream, **options)
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return loss.detach(), *found


def near(got, expected, rtol=1e-10):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item() if b.numel() else 0)


def published(model, x0, *, sigma=None, **options):
    """The loss of the model's logits in plain PyTorch."""
    logits = model(input_ids=options.pop("given", batch()[0])).logits
    if sigma is not None:
        return dse_loss(logits, sigma, options.pop("xt"), x0, **options, backend="reference")
    return dce_loss(logits, x0, **options, backend="reference")


def ours(model, x0, *, sigma=None, **options):
    """The same as a user calls it."""
    given, head = options.pop("given", batch()[0]), LossHead(model)
    scoring = head.dce_loss(x0, **options) if sigma is None else head.dse_loss(sigma, options.pop("xt"), x0, **options)
    with scoring as loss_of:
        return loss_of(model(input_ids=given).logits)


def agree(model, x0=None, *, rtol=1e-10, **options):
    """Loss and gradients, and that the model then gives logits as before."""
    xt, clean, known = batch()
    options, x0, before = options or known, clean if x0 is None else x0, model(input_ids=xt).logits
    expected = grads(model, published(model, x0, **options))
    near(grads(model, ours(model, x0, **options)), expected, rtol)
    assert torch.equal(model(input_ids=xt).logits, before)


def scaled(z):
    return z * 0.3


def capped(z):
    return 2 * torch.tanh(z / 2)


def scaled_and_capped(z):
    return 2 * torch.tanh(z / 3 / 2)


def scaled_in_place(z):
    return z.mul_(0.3)


def cut(z):
    return z[..., : MASK + 1]


def low(*ids):
    def tail(z):
        z = z.clone()
        z[..., list(ids)] = -math.inf
        return z

    return tail


def lowered(z):
    return torch.where(torch.arange(V) == MASK, z - 1e6, z)


PLAIN = (unchanged, scaled, capped, scaled_and_capped, scaled_in_place, cut)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setitem(loss_head.TILE_BYTES, "cpu", 7 * V * 8)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
@pytest.mark.parametrize("tail", PLAIN)
def test_what_is_behind_the_layer(tail, layer):
    *_, options = batch()
    for reduction in REDUCTIONS:
        for bias in (False, True):
            agree(with_layer(layer, tail=tail, bias=bias), **options, **reduction, exclude_mask=False)
        agree(with_layer(layer, tail=tail), **options, **reduction, mask_index=MASK)


@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
def test_ids_that_the_model_leaves_out(layer):
    """One id, wherever it is, or the last: the loss does without them, whatever it says of the mask."""
    xt, x0, options = batch()
    last = range(MASK + 1, V)
    for reduction in REDUCTIONS:
        for tail in (low(MASK), lowered, low(*last), low(MASK, *last), low(MASK + 1, *last)):
            model = with_layer(layer, tail=tail)
            agree(model, **options, **reduction, mask_index=MASK)
            agree(model, **options, **reduction, exclude_mask=False)
            agree(model, xt=xt, weight=options["weight"], mask_index=MASK, **reduction)
            agree(model, xt=xt, mask_index=MASK, exclude_mask=False, **reduction)
        for first in range(3):
            other = torch.where(x0 == first, 5, x0)
            agree(with_layer(layer, tail=low(first)), other, **options, **reduction, exclude_mask=False)
            agree(with_layer(layer, tail=low(first)), other, **options, **reduction, mask_index=first)
        agree(with_layer(layer, tail=low(*last)), **options, **reduction)  # the mask is the last of them
        agree(with_layer(layer, tail=low(V - 1)), **options, **reduction)
        agree(with_layer(layer, tail=low(MASK)), sigma=0.7, xt=xt, mask_index=MASK, **reduction)


@pytest.mark.usefixtures("small_parts")
@settings(deadline=None, max_examples=60)
@given(
    parts=st.booleans(),
    tail=st.sampled_from(PLAIN[:5]),
    tokens=st.sampled_from(["xt", "mask", "all"]),
    weight=st.sampled_from([None, 2.5, "[B]", "[B, 1]", "[1, L]", "[B, L]"]),
    options=st.fixed_dictionaries(dict(exclude_mask=st.booleans(), z_loss=st.sampled_from([0.0, 0.1]))),
    ignored=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_options_of_cross_entropy(parts, tail, tokens, weight, options, ignored, reduction):
    xt, x0, known = batch()
    shape = dict(zip(("[B]", "[B, 1]", "[1, L]", "[B, L]"), ((B,), (B, 1), (1, L), (B, L)), strict=True)).get(weight)
    options = options | reduction | dict(mask_index=MASK)
    options["weight"] = weight if shape is None else torch.rand(shape, dtype=torch.float64)
    options |= dict(xt=xt) if tokens == "xt" else dict(mask=known["mask"]) if tokens == "mask" else {}
    if ignored:
        x0 = torch.where(torch.rand(B, L) < 0.3, -100, x0)
    agree(with_layer(Scaled if parts else lambda linear: linear, tail=tail), x0, **options)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("parametrization", ["log_score", "logits", "scale_by_sigma"])
@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_score_entropy(graph, parametrization):
    xt, x0, known = batch()
    xt = xt if graph == "absorb" else torch.where(known["mask"], (x0 + 3) % V, x0)
    sigma = torch.rand(B, dtype=torch.float64) + 0.1
    options = dict(sigma=sigma, xt=xt, graph=graph, parametrization=parametrization, dsigma=known["weight"])
    for reduction in REDUCTIONS:
        for layer in (lambda linear: linear, Scaled):
            agree(with_layer(layer, tail=scaled_and_capped), **options, **reduction, mask_index=MASK)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
@pytest.mark.parametrize("tail", [scaled_and_capped, low(MASK)])
def test_statistics(tail, layer):
    xt, x0, options = batch()
    model = with_layer(layer, tail=tail)
    expected = dce_loss(model(xt).logits, x0, **options, mask_index=MASK, return_stats=True)
    for reduction in REDUCTIONS:
        loss, stats = ours(model, x0, **options, **reduction, mask_index=MASK, return_stats=True)
        near([loss], [published(model, x0, **options, **reduction, mask_index=MASK)])
        near(stats[:2] + stats[3:], expected[1][:2] + expected[1][3:])
        assert torch.equal(stats.correct, expected[1].correct)
        assert not any(one.requires_grad for one in stats)


@pytest.mark.parametrize("layer", [lambda linear: linear, Scaled])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_score(layer, reduction):
    xt, x0, known = batch()
    model = with_layer(layer)
    agree(model, mask=torch.zeros_like(known["mask"]), **reduction)
    agree(model, torch.full_like(x0, -100), **reduction)
    agree(model, x0[:0], given=xt[:0], **reduction)
    agree(model, x0[:, :0], given=xt[:, :0], **reduction)


# ---------------------------------------------------------------------------------------------------------
# Layers.


class Quantised(nn.Module):
    """int8 weights, which have no gradient, and a scale for each id."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, hidden):
        return F.linear(hidden, self.weight.to(hidden.dtype) * self.scale)


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


# ---------------------------------------------------------------------------------------------------------
# Wrappers and what else is done to a step. Many ranks: loss_head_ranks.py.


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


# ---------------------------------------------------------------------------------------------------------
# Errors.


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
        with pytest.raises(ValueError, match="mask_index: expected 31, which the model leaves out, got"):
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
    not_this = r"expected what the last layer gave, \[..., 34\] in 4 rows, got"
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
    model, x0 = Network(), batch()[1]
    agree(model)
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


def test_ranks():
    functions = ("ddp", "fsdp2", "fsdp2_with_the_head_by_itself", "hsdp", "fsdp1", "tensor_parallel")
    torchrun.launch(Path(__file__).with_name("loss_head_ranks.py"), 2, *functions)
