"""The diffusion transformer that SEDD, RADD, MDLM, Duo and BD3-LM share, under the names that their weights have."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FREQUENCIES = 256  # of the noise level, cosines and sines


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape of a `DiT`.

    Args:
        num_states: ids, the mask and padding included.
        dim, depth, heads: width, blocks, attention heads.
        cond_dim: width of what the noise level becomes; 0 for a model that does not see it.
        norm_bias: whether norms have one (RADD's).
    """

    num_states: int
    dim: int
    depth: int
    heads: int
    cond_dim: int = 0
    norm_bias: bool = False


class DiT(nn.Module):
    """Bidirectional transformer with rotary positions, whose norms and branches follow the noise level (adaLN-zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_embed = _Embedding(config)
        self.sigma_map = _SigmaMap(config.cond_dim) if config.cond_dim else None
        self.rotary_emb = _Rotary(config.dim // config.heads)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.output_layer = _Output(config)

    def forward(
        self, xt: Tensor, sigma: Tensor | None = None, sees: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """What the last layer gives, [B, L, num_states]; arguments as `body`."""
        return self.output_layer.linear(self.body(xt, sigma, sees, positions))

    def body(
        self, xt: Tensor, sigma: Tensor | None = None, sees: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Hidden states in front of the last layer, [B, L, dim].

        Args:
            xt: [B, L] int64 ids.
            sigma: [B], or [B, L] for a level per token, of a model that sees it.
            sees: bool, [L, L] or what broadcasts to [B, heads, L, L]: which tokens (columns) each token attends to;
                None means all.
            positions: [L] int64; None counts them.
        """
        h, c = self.vocab_embed.embedding[xt], None
        if self.sigma_map is not None:
            c = self.sigma_map(sigma)
        rotary = self.rotary_emb(torch.arange(xt.shape[1], device=xt.device) if positions is None else positions)
        for block in self.blocks:
            h = block(h, rotary, c, sees)
        return self.output_layer(h, c)


class _Embedding(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.num_states, config.dim))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))


class _SigmaMap(nn.Module):
    """Waves of the noise level, then a small network, in full precision: [B] -> [B, 1, C], [B, L] -> [B, L, C]."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        half = _FREQUENCIES // 2
        waves = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=sigma.device) / half)
        angle = (sigma if sigma.dim() == 2 else sigma.unsqueeze(1)).float().unsqueeze(-1) * waves
        features = torch.cat((angle.cos(), angle.sin()), -1).to(next(self.parameters()).dtype)
        with torch.autocast(sigma.device.type, enabled=False):
            return F.silu(self.mlp(features))


class _Rotary(nn.Module):
    """Cosines and sines of the angles by which positions turn pairs: [2, L, D / 2]."""

    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, dim, 2).float() / dim))

    def forward(self, positions: Tensor) -> Tensor:
        angle = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq)
        return torch.stack((angle.cos(), angle.sin()))


class _Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.norm1 = _Norm(config)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = _Norm(config)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = _modulation(config, 6)

    def forward(self, h: Tensor, rotary: Tensor, c: Tensor | None, sees: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulated_by(self.adaLN_modulation, c, 6)
        qkv = self.attn_qkv(_modulate(self.norm1(h), shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, D / heads]
        a = F.scaled_dot_product_attention(_rotate(q, rotary), _rotate(k, rotary), v, attn_mask=sees)
        h = h + gate1 * self.attn_out(a.transpose(1, 2).flatten(2))
        return h + gate2 * self.mlp(_modulate(self.norm2(h), shift2, scale2))


class _Output(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = _Norm(config)
        self.linear = nn.Linear(config.dim, config.num_states)
        nn.init.zeros_(self.linear.weight), nn.init.zeros_(self.linear.bias)
        self.adaLN_modulation = _modulation(config, 2)

    def forward(self, h: Tensor, c: Tensor | None) -> Tensor:
        """What `linear` is given."""
        return _modulate(self.norm_final(h), *_modulated_by(self.adaLN_modulation, c, 2))


class _Norm(nn.Module):
    """LayerNorm in float32 at least."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.bias = nn.Parameter(torch.zeros(config.dim)) if config.norm_bias else None

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            normed = F.layer_norm(h.to(torch.promote_types(h.dtype, torch.float32)), self.weight.shape)
        normed = normed * self.weight
        return normed if self.bias is None else normed + self.bias


def _modulation(config: DiTConfig, parts: int) -> nn.Linear | None:
    if not config.cond_dim:
        return None
    layer = nn.Linear(config.cond_dim, parts * config.dim)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


def _modulated_by(layer: nn.Linear | None, c: Tensor | None, parts: int) -> tuple:
    """Shifts, scales and gates of the noise level; without one nothing is shifted or scaled, and gates are open."""
    return (0, 0, 1, 0, 0, 1)[:parts] if layer is None else layer(c).chunk(parts, -1)


def _modulate(h: Tensor, shift: Tensor | int, scale: Tensor | int) -> Tensor:
    return h * (1 + scale) + shift


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + D/2}) of [B, H, L, D] by the angles of their positions."""
    cos, sin = rotary.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
