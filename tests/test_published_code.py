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


def network_of(name, config, monkeypatch):
    module_name, class_name = NETWORKS[name]
    module = published(name, module_name)[module_name]
    if hasattr(module, "flash_attn_varlen_qkvpacked_func"):
        monkeypatch.setattr(module, "flash_attn_varlen_qkvpacked_func", attention)
    if hasattr(module, "flash_attn"):
        rotary = SimpleNamespace(apply_rotary_emb_qkv_=turned_qkv, apply_rotary_emb_torch=turned)
        interface = SimpleNamespace(flash_attn_varlen_qkvpacked_func=attention)
        fake = SimpleNamespace(layers=SimpleNamespace(rotary=rotary), flash_attn_interface=interface)
        monkeypatch.setattr(module, "flash_attn", fake)
    return getattr(module, class_name)(config, *([] if class_name != "DIT" else [V]))


@pytest.mark.parametrize("name", [name for name in NETWORKS if (CHECKOUTS / name).is_dir()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_are_those_of_the_published_code(name, dtype, monkeypatch):
    omegaconf = pytest.importorskip("omegaconf")
    shape = dict(hidden_size=D, n_heads=HEADS, n_blocks=DEPTH, cond_dim=C, length=L)
    shape |= dict(dropout=0.1, scale_by_sigma=False, dtype="float32", use_checkpoint=False)
    shape |= dict(tie_word_embeddings=False, attn_backend="sdpa")
    algo = dict(causal_attention=False, parameterization="subs", cross_attn=False)
    said = dict(model=shape, tokens=V - 1, graph=dict(type="absorb"), algo=algo, block_size=2)
    said |= dict(loader=dict(eval_batch_size=2))
    theirs = network_of(name, omegaconf.OmegaConf.create(said), monkeypatch).eval()
    g = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) / 3
    radd, weights = name == "radd", theirs.state_dict()
    config = ModelConfig(V, None, D, DEPTH, HEADS, 0 if radd else C, radd, learned_positions=False)
    ours = DiffusionTransformer(config)
    weights["vocab_embed.weight"] = weights.pop("vocab_embed.embedding")
    del weights["rotary_emb.inv_freq"]
    ours.load_state_dict(weights)
    if dtype == torch.float64:  # what they turn to float32 stays as it is
        widen, linear = torch.Tensor.float, F.linear
        monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else widen(t))
        monkeypatch.setattr(F, "linear", lambda x, w, b=None: linear(x.to(w.dtype), w, b))
    xt, sigma = torch.randint(V, (2, L)), 3 * torch.rand(2)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    expected = theirs.logits(xt) if radd else theirs(xt, sigma)
    found = ours(xt) if radd else ours(xt, sigma)
    if name == "sedd":  # which puts 0 at x_t
        found = found.scatter(-1, xt[..., None], 0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
