"""The transformer that SEDD, RADD, MDLM, Duo and BD3-LM share, time-free or seeing the noise level."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checks import check_integer, check_tensor, check_tokens
from fastdiff.files import import_safetensors, read_config, write_atomically
from fastdiff.generation.block_cache import BlockCache
from fastdiff.noise.blocks import mean_of_blocks, two_streams

_FREQUENCIES = 128  # of the noise level, cosines and sines


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a `DiffusionTransformer`.

    Args:
        num_states: size of the vocabulary, the mask included where the graph has one.
        max_length: longest sequence the model takes; None for any, without learned positions.
        dim: width; a multiple of 2 heads.
        depth: number of blocks.
        heads: attention heads.
        cond_dim: width of what the noise level becomes; 0 for conditionals that do not see it.
        norm_bias: whether norms have one, as RADD's do.
        learned_positions: a vector for each place beside rotary positions, which alone cannot tell places apart where
            all is masked.
    """

    num_states: int
    max_length: int | None
    dim: int = 256
    depth: int = 6
    heads: int = 4
    cond_dim: int = 0
    norm_bias: bool = False
    learned_positions: bool = True

    def __post_init__(self) -> None:
        least = {"num_states": 1, "max_length": 1, "dim": 1, "depth": 1, "heads": 1, "cond_dim": 0}
        if self.max_length is None and not self.learned_positions:
            del least["max_length"]
        for name, at_least in least.items():
            object.__setattr__(self, name, check_integer(name, getattr(self, name), at_least))
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim: expected a multiple of 2 x heads = {2 * self.heads}, got {self.dim}")


class DiffusionTransformer(nn.Module):
    """Bidirectional transformer: rotary positions, pre-norm, scaled-dot-product attention.

    Time-free (`cond_dim=0`): `model(xt)` gives logits of the conditionals p(x_0 | x_t), for `dce_loss` and
    `time_free_nll`. Otherwise `model(xt, sigma)`, whose norms and branches follow the noise level (adaLN-zero), for
    `dse_loss` with `parametrization="scale_by_sigma"`, of the uniform graph "log_score". Before training all outputs
    are 0. Weights have the names that they have in those codebases, and are made in torch's default type on its default
    device, as those of any module.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_embed = nn.Embedding(config.num_states, config.dim)
        places = config.max_length if config.learned_positions else None
        self.embed_position = None if places is None else nn.Embedding(places, config.dim)
        self.sigma_map = _SigmaMap(config.cond_dim) if config.cond_dim else None
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.output_layer = _Output(config)
        for name, parameter in self.named_parameters():
            if "adaLN" in name or name.startswith(("embed_position", "output_layer.linear")):
                nn.init.zeros_(parameter)  # branches start closed, and the loss at log V
            elif name.endswith(("attn_out.weight", "mlp.2.weight")):
                parameter.data /= math.sqrt(2 * config.depth)  # the residual stream keeps its scale at any depth

    @property
    def lm_head(self) -> nn.Linear:
        """The last layer."""
        return self.output_layer.linear

    def forward(
        self,
        xt: Tensor,
        sigma: Tensor | None = None,
        sees: Tensor | None = None,
        positions: Tensor | None = None,
        first: int | None = None,
    ) -> Tensor:
        """Logits, or the unscaled log score of a model that sees the noise level: [B, L, num_states].

        Arguments and errors are those of `body`.
        """
        return self.lm_head(self.body(xt, sigma, sees, positions, first))

    def body(
        self,
        xt: Tensor,
        sigma: Tensor | None = None,
        sees: Tensor | None = None,
        positions: Tensor | None = None,
        first: int | None = None,
        past: Sequence[Callable[[Tensor, Tensor], tuple[Tensor, ...]]] | None = None,
    ) -> Tensor:
        """Hidden states in front of `lm_head`: [B, L, dim].

        Args:
            xt: [B, L] int64 or int32 token ids in [0, num_states), 1 <= L <= max_length.
            sigma: [B], or [B, L] for a level per token: total noise >= 0, for a model that sees it only.
            sees: bool, [L, L] or what broadcasts to [B, heads, L, L]: which tokens (columns) each token attends to;
                None means all.
            positions: [L] int64 in [0, max_length), of sequences that hold several side by side; None counts them.
            first: how many tokens, from the front, are wanted: [B, first, dim]; None means all.
            past: for each layer, what makes of keys and values of xt, [B, heads, L, dim / heads], those of all tokens
                that are attended to, which `sees` then counts.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or length; ids, sigma or positions out of range (on the CPU).
        """
        self._check(xt, sigma, positions)
        positions = torch.arange(xt.shape[1], device=xt.device) if positions is None else positions
        h = self.vocab_embed(xt)
        if self.embed_position is not None:
            h = h + self.embed_position(positions)
        c = None if sigma is None or self.sigma_map is None else self.sigma_map(sigma)
        rotary = _rotary(positions, self.config.dim // self.config.heads, h.dtype)
        bias = None if sees is None else _bias(sees, h)
        for layer, block in enumerate(self.blocks):
            h = block(h, rotary, c, bias, past and past[layer])
        return self.output_layer(h[:, :first], None if c is None else c[:, :first])

    def conditionals(
        self, mask_index: int, total_noise: Callable[[Tensor], Tensor]
    ) -> tuple[Callable[[Tensor], Tensor], nn.Linear]:
        """For the estimators: (body, last layer) of p(x0 | xt), of the absorbing graph.

        A model that sees the noise level is asked at the noise that m masks in L tokens suggest, total_noise(m / L).
        """
        if self.sigma_map is None:
            return self.body, self.lm_head
        return lambda xt: self.body(xt, total_noise((xt == mask_index).double().mean(1)).float()), self.lm_head

    def block_conditionals(
        self, block_length: int, mask_index: int, total_noise: Callable[[Tensor], Tensor]
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], nn.Linear]:
        """For the block estimators: (body, last layer) of p(x0 in a block | xt in it, x0 in the blocks before).

        body(xt [b, L], x0 [b, L]) gives the hidden states [b, L, dim] of all blocks in one pass of twice the tokens. A
        model that sees the noise level is asked at total_noise(m / n) for a block of n tokens with m masks.

        Raises (body):
            TypeError, ValueError: as `two_streams`, or as `body`, of L tokens.
        """

        def body(xt: Tensor, x0: Tensor) -> Tensor:
            sigma = None
            if self.sigma_map is not None:
                sigma = total_noise(mean_of_blocks((xt == mask_index).double(), block_length)).float()
            return noised_stream(self.body, xt, sigma, x0=x0, block_length=block_length)

        return body, self.lm_head

    def cache(
        self,
        batch_size: int,
        block_length: int,
        mask_index: int | None = None,
        total_noise: Callable[[Tensor], Tensor] | None = None,
    ) -> BlockCache:
        """Keys and values of clean blocks, of a model trained in blocks, for `sample(cache=)`; empty at first.

        Args:
            batch_size: sequences.
            block_length: as in training.
            mask_index, total_noise: as in `block_conditionals`, for a model that sees the noise level only.
        """
        return BlockCache(self, batch_size, block_length, mask_index, total_noise)

    def save_pretrained(self, folder: str | os.PathLike, **sections: dict) -> None:
        """Write config.json and model.safetensors into a folder, each whole or not at all.

        Args:
            folder: made if missing.
            sections: further named parts of config.json, beside "model".
        """
        safetensors = import_safetensors()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model": dataclasses.asdict(self.config), **sections}
        write_atomically(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(folder / "model.safetensors", safetensors.save(weights))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "DiffusionTransformer":
        """Load what `save_pretrained` or `exporting.export` wrote, in float32 on the CPU.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is damaged, cut short, or they do not belong together.
        """
        from fastdiff.weights import read_weights

        config = read_config(folder)
        try:
            with torch.device("meta"):
                model = cls(ModelConfig(**config["model"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{Path(folder) / 'config.json'}: not a model's configuration: {error}") from error
        weights = read_weights(folder)
        check_alike(model, weights, folder)
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
        return model

    def _check(self, xt: Tensor, sigma: Tensor | None, positions: Tensor | None) -> None:
        place = self.lm_head.weight.device  # "meta" where the layer is offloaded
        check_tokens("xt", xt, None, None if place.type == "meta" else place)
        if xt.dim() != 2:
            raise ValueError(f"xt: expected shape [B, L], got {tuple(xt.shape)}")
        most = self.config.max_length or xt.shape[1]
        if xt.shape[1] < 1 or (positions is None and xt.shape[1] > most):
            raise ValueError(f"xt: expected a length in [1, {most}], got {xt.shape[1]}")
        if positions is not None and positions.shape != xt.shape[1:]:
            raise ValueError(f"positions: expected shape [L] = ({xt.shape[1]},), got {tuple(positions.shape)}")
        if (sigma is None) != (self.config.cond_dim == 0):
            raise ValueError(
                "sigma: this model is conditioned on sigma, but none came"
                if sigma is None
                else "sigma: this model is time-free and takes none"
            )
        if sigma is not None:
            check_tensor("sigma", sigma)
            if not sigma.is_floating_point():
                raise TypeError(f"sigma: expected floating-point noise, got {sigma.dtype}")
            if sigma.shape not in (xt.shape[:1], xt.shape):
                raise ValueError(f"sigma: expected shape [B] = ({xt.shape[0]},) or [B, L], got {tuple(sigma.shape)}")
        if xt.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (xt.min().item(), xt.max().item()) if xt.numel() else (0, 0)
            if low < 0 or high >= self.config.num_states:
                raise ValueError(f"xt: expected ids in [0, {self.config.num_states}), got {low} to {high}")
            if sigma is not None and not (sigma >= 0).all():
                raise ValueError(f"sigma: expected >= 0, got {sigma.min().item()}")
            low, high = (0, 0) if positions is None else (positions.min().item(), positions.max().item())
            if low < 0 or (self.config.max_length is not None and high >= self.config.max_length):
                raise ValueError(f"positions: expected numbers in [0, {most}), got {low} to {high}")


def noised_stream(
    network: Callable[..., Tensor], xt: Tensor, sigma: Tensor | None = None, *, x0: Tensor, block_length: int
) -> Tensor:
    """What a `DiffusionTransformer`, its body, or a wrapper of it gives for xt, each block given the clean ones before.

    Args:
        sigma: [B, L], the noise of each token of xt, for a model that sees it.
        xt, x0, block_length: as `two_streams`.
    """
    tokens, positions, sees = two_streams(xt, x0, block_length)
    sigma = None if sigma is None else torch.cat([sigma, torch.zeros_like(sigma)], 1)
    return network(tokens, sigma, sees, positions, xt.shape[1])


class _Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.norm1 = _Norm(config)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = _Norm(config)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * dim) if config.cond_dim else None

    def forward(
        self,
        h: Tensor,
        rotary: Tensor,
        c: Tensor | None,
        bias: Tensor | None,
        past: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None,
    ) -> Tensor:
        # h [B, L, D], c [B, 1 or L, C], bias [L, L] or more
        shift1, scale1, gate1, shift2, scale2, gate2 = _parts(self.adaLN_modulation, c, 6)
        qkv = self.attn_qkv(_modulated(self.norm1(h), shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, D / heads]
        v = v.contiguous()  # a view would have autograd keep q and k whole, beside the turned ones
        k = _rotated(k, rotary)
        if past is not None:
            k, v = past(k, v)
        a = F.scaled_dot_product_attention(_rotated(q, rotary), k, v, attn_mask=bias)
        h = h + _gated(self.attn_out(a.transpose(1, 2).flatten(2)), gate1)
        return h + _gated(self.mlp(_modulated(self.norm2(h), shift2, scale2)), gate2)


class _Output(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_final = _Norm(config)
        self.linear = nn.Linear(config.dim, config.num_states)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.dim) if config.cond_dim else None

    def forward(self, h: Tensor, c: Tensor | None) -> Tensor:
        """What `linear` is given."""
        return _modulated(self.norm_final(h), *_parts(self.adaLN_modulation, c, 2))


class _Norm(nn.Module):
    """LayerNorm in float32 at least, also under autocast."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.bias = nn.Parameter(torch.zeros(config.dim)) if config.norm_bias else None

    def forward(self, h: Tensor) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(h.device.type, enabled=False):
            return F.layer_norm(h.to(wide), self.weight.shape, self.weight.to(wide), bias).to(h.dtype)


class _SigmaMap(nn.Module):
    """Waves of the noise level, then a small network, in full precision: [B] -> [B, 1, C], [B, L] -> [B, L, C]."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        steps = torch.arange(_FREQUENCIES, dtype=torch.float32, device=sigma.device)
        waves = torch.exp(-math.log(10000) * steps / _FREQUENCIES)
        angle = (sigma if sigma.dim() == 2 else sigma.unsqueeze(1)).float().unsqueeze(-1) * waves
        features = torch.cat((angle.cos(), angle.sin()), -1).to(next(self.parameters()).dtype)
        with torch.autocast(sigma.device.type, enabled=False):
            return F.silu(self.mlp(features))


def _parts(layer: nn.Linear | None, c: Tensor | None, n: int) -> tuple[Tensor | None, ...]:
    """Shifts, scales and gates that follow the noise level, n of them; None without one."""
    return (None,) * n if layer is None else layer(c).chunk(n, -1)


def _modulated(h: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    return h if shift is None or scale is None else h * (1 + scale) + shift


def _gated(h: Tensor, gate: Tensor | None) -> Tensor:
    return h if gate is None else gate * h


def inverse_frequencies(dim: int, device: torch.device | None = None) -> Tensor:
    """By how much a place turns each of the pairs of a head: float32 [dim / 2]."""
    return 1 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def _bias(sees: Tensor, h: Tensor) -> Tensor:
    """What attention adds to its scores: made once, or each layer would make one, and autograd keep them all."""
    casts = torch.is_autocast_enabled(h.device.type) and h.dtype != torch.float64
    dtype = torch.get_autocast_dtype(h.device.type) if casts else h.dtype
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, -math.inf)


def _rotary(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of the angles by which positions turn pairs, in float32 at least: [2, L, D / 2]."""
    wide = torch.promote_types(dtype, torch.float32)
    angle = torch.outer(positions.to(wide), inverse_frequencies(dim, positions.device).to(wide))
    return torch.stack((angle.cos(), angle.sin()))


def _rotated(x: Tensor, rotary: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + D/2}) of [B, H, L, D] by the angles of their positions."""
    cos, sin = rotary.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def check_alike(network: nn.Module, weights: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Raises ValueError unless weights have the names and shapes of a network's."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path}: {len(wrong)} tensors do not fit; {name} is {found.get(name, 'missing')}, "
            f"expected {expected.get(name, 'none')}"
        )
