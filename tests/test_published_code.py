"""Outputs of the published networks themselves, where FASTDIFF_CHECKOUTS names a folder of checkouts."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from standins import published

from fastdiff.model import DiffusionTransformer, ModelConfig

NETWORKS = {
    "sedd": ("model.transformer", "SEDD"),
    "radd": ("model.transformer", "RADD"),
    "mdlm": ("models.dit", "DIT"),
    "duo": ("models.dit", "DIT"),
    "bd3lm": ("models.dit", "DIT"),
}
V, D, DEPTH, HEADS, C, L = 37, 32, 3, 4, 16, 10
CHECKOUTS = Path(os.environ.get("FASTDIFF_CHECKOUTS", os.devnull))


def attention(qkv, cu_seqlens, length, dropout, causal):
    """flash_attn's, of [B L, 3, heads, D] in sequences of one length."""
    q, k, v = qkv.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def turned(x, cos, sin):
    """flash_attn's rotation of [B, L, ..., D] by cosines and sines [L, D / 2]."""
    cos, sin = (t.view(-1, *[1] * (x.dim() - 3), t.shape[-1]) for t in (cos, sin))
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def turned_qkv(qkv, cos, sin):
    return torch.cat((turned(qkv[:, :, :2], cos, sin), qkv[:, :, 2:]), 2)


def network_of(name, network, monkeypatch, graph="absorb"):
    """The codebase's own network, with the weights of a network of ours."""
    config, num_states = network.config, network.config.num_states
    shape = dict(hidden_size=config.dim, n_heads=config.heads, n_blocks=config.depth, cond_dim=config.cond_dim)
    shape |= dict(length=L, dropout=0.1, scale_by_sigma=False, dtype="float32", use_checkpoint=False)
    shape |= dict(tie_word_embeddings=False, attn_backend="sdpa")
    algo = dict(causal_attention=False, parameterization="subs", cross_attn=False)
    said = dict(model=shape, tokens=num_states - (graph == "absorb"), graph=dict(type=graph), algo=algo, block_size=2)
    said |= dict(loader=dict(eval_batch_size=2))
    module_name, class_name = NETWORKS[name]
    module = published(name, module_name)[module_name]
    if hasattr(module, "flash_attn_varlen_qkvpacked_func"):
        monkeypatch.setattr(module, "flash_attn_varlen_qkvpacked_func", attention)
    if hasattr(module, "flash_attn"):
        rotary = SimpleNamespace(apply_rotary_emb_qkv_=turned_qkv, apply_rotary_emb_torch=turned)
        interface = SimpleNamespace(flash_attn_varlen_qkvpacked_func=attention)
        fake = SimpleNamespace(layers=SimpleNamespace(rotary=rotary), flash_attn_interface=interface)
        monkeypatch.setattr(module, "flash_attn", fake)
    options = [num_states] if class_name == "DIT" else []
    made = getattr(module, class_name)(pytest.importorskip("omegaconf").OmegaConf.create(said), *options).eval()
    weights = network.state_dict()
    weights["vocab_embed.embedding"] = weights.pop("vocab_embed.weight")
    made.load_state_dict(made.state_dict() | weights)  # which keeps its buffer of frequencies
    return made


def network_like(name):
    """A network of ours of the codebase's kind, with random weights."""
    radd = name == "radd"
    config = ModelConfig(V, None, D, DEPTH, HEADS, 0 if radd else C, radd, learned_positions=False)
    made, g = DiffusionTransformer(config), torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) / 3
    return made.eval()


@pytest.mark.parametrize("name", [name for name in NETWORKS if (CHECKOUTS / name).is_dir()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_are_those_of_the_published_code(name, dtype, monkeypatch):
    ours = network_like(name)
    theirs = network_of(name, ours, monkeypatch)
    if dtype == torch.float64:  # what they turn to float32 stays as it is
        widen, linear = torch.Tensor.float, F.linear
        monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else widen(t))
        monkeypatch.setattr(F, "linear", lambda x, w, b=None: linear(x.to(w.dtype), w, b))
    xt, sigma = torch.randint(V, (2, L)), 3 * torch.rand(2)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    inputs = (xt,) if name == "radd" else (xt, sigma)
    expected, found = (theirs.logits if name == "radd" else theirs)(*inputs), ours(*inputs)
    if name == "sedd":  # which puts 0 at x_t
        found = found.scatter(-1, xt[..., None], 0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in NETWORKS if (CHECKOUTS / name).is_dir()])
def test_bfloat16_is_no_further_from_float64_than_in_the_published_code(name, monkeypatch):
    """Both under autocast, which the codebases ask of a GPU and here of the CPU."""

    def autocast(*device, enabled=True, dtype=None):
        return torch.autocast("cpu", torch.bfloat16, enabled)

    monkeypatch.setattr(torch.cuda.amp, "autocast", autocast)
    monkeypatch.setattr(torch.amp, "autocast", autocast)
    ours = network_like(name)
    theirs = network_of(name, ours, monkeypatch)
    xt, sigma = torch.randint(V, (64, L)), 3 * torch.rand(64)
    inputs = (xt,) if name == "radd" else (xt, sigma)
    exact = DiffusionTransformer(ours.config).double()
    exact.load_state_dict(ours.state_dict())
    with torch.no_grad():
        expected = exact(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found, told = ours(*inputs), (theirs.logits if name == "radd" else theirs)(*inputs)
    elsewhere = torch.ones_like(expected)
    if name == "sedd":  # which puts 0 at x_t
        elsewhere.scatter_(-1, xt[..., None], 0)
    our_error, their_error = (((y.double() - expected) * elsewhere).square().mean().sqrt() for y in (found, told))
    assert our_error / expected.std() > 1e-4  # it is not in float32
    assert our_error < 2 * their_error
