"""DITs of the checkouts of MDLM, BD3-LM and Duo: tiny, random, in float64, without the packages that need a GPU."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F


def _rotated(x, cos, sin):
    """[B, L, heads, D], by angles [L, D / 2]."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def _rotated_qkv(qkv, cos, sin):
    q, k, v = qkv.unbind(2)
    return torch.stack((_rotated(q, cos, sin), _rotated(k, cos, sin), v), 2)


def _attention(qkv, cu_seqlens, max_seqlen, dropout_p, causal=False):
    """Of sequences of one length, packed: [B L, 3, heads, D]."""
    q, k, v = qkv.unflatten(0, (-1, max_seqlen)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(0, 1)


FLASH_ATTN = SimpleNamespace(
    layers=SimpleNamespace(rotary=SimpleNamespace(apply_rotary_emb_qkv_=_rotated_qkv, apply_rotary_emb_torch=_rotated)),
    flash_attn_interface=SimpleNamespace(flash_attn_varlen_qkvpacked_func=_attention),
)


def tiny_dit(module, monkeypatch, num_states, length=8, **algo):
    """`module.DIT`, whose zeros are random too, for sequences of this length; algo: its configuration's."""
    sizes = dict(hidden_size=16, cond_dim=6, n_blocks=2, n_heads=2, dropout=0.1, length=length, scale_by_sigma=True)
    algo = dict(name="bd3lm", parameterization="subs", causal_attention=False, cross_attn=False) | algo
    config = SimpleNamespace(
        model=SimpleNamespace(**sizes, tie_word_embeddings=False, attn_backend="sdpa"),
        algo=SimpleNamespace(**algo),
        sampling=SimpleNamespace(kv_cache=False),
        block_size=4,
    )
    monkeypatch.setattr(module, "flash_attn", FLASH_ATTN)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # which its norms and embeddings of time call
    return random_numbers(module.DIT(config, vocab_size=num_states))


def random_numbers(model):
    """In float64, all of its parameters, of which DITs begin with many zeros."""
    torch.manual_seed(0)
    for parameter in model.double().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model
