"""A small bidirectional transformer for discrete diffusion, time-free or conditioned on the noise level."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checks import check_integer, check_tensor, check_tokens

_FREQUENCIES = 64  # Fourier features of log sigma


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a `DiffusionTransformer`.

    Args:
        num_states: size of the vocabulary, the mask included where the graph has one.
        max_length: longest sequence the model takes.
        dim: width; a multiple of 2 heads.
        depth: number of blocks.
        heads: attention heads.
        sigma_conditioned: False for conditionals that do not see the time, True for a network of (xt, sigma).
    """

    num_states: int
    max_length: int
    dim: int = 256
    depth: int = 6
    heads: int = 4
    sigma_conditioned: bool = False

    def __post_init__(self) -> None:
        for name in ("num_states", "max_length", "dim", "depth", "heads"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), 1))
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim: expected a multiple of 2 x heads = {2 * self.heads}, got {self.dim}")


class DiffusionTransformer(nn.Module):
    """Bidirectional transformer: rotary and learned positions, pre-norm, scaled-dot-product attention.

    Time-free (`sigma_conditioned=False`): `model(xt)` gives logits of the conditionals p(x_0 | x_t), for
    `dce_loss` and `time_free_nll`. Sigma-conditioned: `model(xt, sigma)` sees log sigma through every norm
    (adaLN), for `dse_loss` with `parametrization="scale_by_sigma"`. Before training all outputs are 0.
    Parameters are made in torch's default type on its default device, as those of any module.
    """

    rotary: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.num_states, config.dim)
        self.embed_position = nn.Embedding(config.max_length, config.dim)  # tells all-masked places apart
        self.embed_sigma = _SigmaEmbedding(config.dim) if config.sigma_conditioned else None
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = _Norm(config)
        self.lm_head = nn.Linear(config.dim, config.num_states, bias=False)
        half = config.dim // config.heads // 2
        frequency = 10000 ** -(torch.arange(half, dtype=torch.float32) / half)
        angle = torch.outer(torch.arange(config.max_length), frequency)
        self.register_buffer("rotary", torch.stack((angle.cos(), angle.sin())), persistent=False)
        for name, parameter in self.named_parameters():
            if "modulate" in name or name in ("embed_position.weight", "lm_head.weight"):
                nn.init.zeros_(parameter)  # adaLN starts as a plain norm, and the loss at log V
            elif name.endswith("_out.weight"):
                parameter.data /= math.sqrt(2 * config.depth)  # the residual stream keeps its scale at any depth

    def forward(self, xt: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Logits, or the unscaled log score of a sigma-conditioned model: [B, L, num_states].

        Arguments and errors are those of `body`.
        """
        return self.lm_head(self.body(xt, sigma))

    def body(self, xt: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Hidden states in front of `lm_head`: [B, L, dim].

        Args:
            xt: [B, L] int64 or int32 token ids in [0, num_states), 1 <= L <= max_length.
            sigma: [B] total noise > 0, for a sigma-conditioned model only.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or length; ids or sigma out of range (on the CPU).
        """
        self._check(xt, sigma)
        h, rotary = self.embed(xt) + self.embed_position.weight[: xt.shape[1]], self.rotary[:, : xt.shape[1]]
        c = None if sigma is None or self.embed_sigma is None else self.embed_sigma(sigma)
        for block in self.blocks:
            h = block(h, rotary, c)
        return self.norm(h, c)

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
        """Load what `save_pretrained` wrote, in float32 on the CPU.

        Raises:
            FileNotFoundError: the folder or one of its two files is missing.
            ValueError: a file is damaged, cut short, or the two do not belong together.
        """
        safetensors = import_safetensors()
        config = read_config(folder)
        try:
            with torch.device("cpu"):
                model = cls(ModelConfig(**config["model"])).float()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{Path(folder) / 'config.json'}: not a model's configuration: {error}") from error
        path = Path(folder) / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            weights = safetensors.load(path.read_bytes())
        except Exception as error:  # the Rust side raises its own types
            raise ValueError(f"{path}: damaged or cut short: {error}") from error
        _load(model, weights, path)
        return model

    def _check(self, xt: Tensor, sigma: Tensor | None) -> None:
        check_tokens("xt", xt, None, self.lm_head.weight.device)
        if xt.dim() != 2:
            raise ValueError(f"xt: expected shape [B, L], got {tuple(xt.shape)}")
        if not 1 <= xt.shape[1] <= self.config.max_length:
            raise ValueError(f"xt: expected a length in [1, {self.config.max_length}], got {xt.shape[1]}")
        if (sigma is not None) != self.config.sigma_conditioned:
            raise ValueError(
                "sigma: this model is conditioned on sigma, but none came"
                if sigma is None
                else "sigma: this model is time-free and takes none"
            )
        if sigma is not None:
            check_tensor("sigma", sigma)
            if not sigma.is_floating_point():
                raise TypeError(f"sigma: expected floating-point noise, got {sigma.dtype}")
            if sigma.shape != xt.shape[:1]:
                raise ValueError(f"sigma: expected shape [B] = ({xt.shape[0]},), got {tuple(sigma.shape)}")
        if xt.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (xt.min().item(), xt.max().item()) if xt.numel() else (0, 0)
            if low < 0 or high >= self.config.num_states:
                raise ValueError(f"xt: expected ids in [0, {self.config.num_states}), got {low} to {high}")
            if sigma is not None and not (sigma > 0).all():
                raise ValueError(f"sigma: expected > 0, got {sigma.min().item()}")


class _Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.attention_norm = _Norm(config)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = _Norm(config)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)

    def forward(self, h: Tensor, rotary: Tensor, c: Tensor | None) -> Tensor:  # h [B, L, D], c [B, 1, D]
        qkv = self.qkv(self.attention_norm(h, c)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, D / heads]
        a = F.scaled_dot_product_attention(_rotate(q, rotary), _rotate(k, rotary), v)
        h = h + self.attention_out(a.transpose(1, 2).flatten(2))
        return h + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(h, c)), approximate="tanh"))


class _Norm(nn.Module):
    """LayerNorm; of a sigma-conditioned model its scale and shift also follow the noise level (adaLN)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.modulate = nn.Linear(config.dim, 2 * config.dim) if config.sigma_conditioned else None

    def forward(self, h: Tensor, c: Tensor | None) -> Tensor:
        h = self.norm(h)
        if self.modulate is None:
            return h
        scale, shift = self.modulate(c).chunk(2, -1)
        return h * (1 + scale) + shift


class _SigmaEmbedding(nn.Module):
    """Fourier features of log sigma, then a small network: [B] -> [B, 1, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, sigma: Tensor) -> Tensor:
        frequency = torch.exp(torch.linspace(-3, 3, _FREQUENCIES, dtype=torch.float32, device=sigma.device))
        angle = sigma.float().log().unsqueeze(-1) * frequency
        features = torch.cat((angle.cos(), angle.sin()), -1)
        return self.mlp(features.to(next(self.parameters()).dtype)).unsqueeze(1)


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of [B, H, L, D] by the angles of their positions, [2, L, D/2]."""
    cos, sin = rotary.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def _load(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{path}: does not match its config.json: {name} is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'none')}"
            )
    model.load_state_dict(weights)


def read_config(folder: str | os.PathLike) -> dict:
    """config.json of a model's folder, as the dictionary it holds.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is not JSON.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged or cut short: {error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the file, then rename over it, so that a reader finds the old bytes or the new ones.

    Raises:
        OSError: names the file; the old one stays, and nothing beside it.
    """
    part = path.with_name(path.name + ".part")
    with naming(path):
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or the rename might outlive a power cut, and the bytes not
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system in the block name the file, which that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def import_safetensors() -> ModuleType:
    """safetensors.torch, or an ImportError that says how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("saving and loading needs safetensors: pip install safetensors") from None
    return safetensors.torch
