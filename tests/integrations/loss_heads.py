"""Networks for LossHead, and the losses of their logits in plain PyTorch."""

import math

import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput

from fastdiff import dce_loss, dse_loss
from fastdiff.integrations.loss_head import LossHead

V, D, B, L = 33, 8, 4, 17
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


PLAIN = (unchanged, scaled, capped, scaled_and_capped, scaled_in_place, cut)
