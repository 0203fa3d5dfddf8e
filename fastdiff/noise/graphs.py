"""The two noising graphs, with the methods the field gives them. Formulas: reference/forward.py and reverse.py."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.checks import (
    check_integer,
    check_rows,
    check_tensor,
    check_tokens,
    check_values,
    per_token,
    vocabulary_index,
)
from fastdiff.losses.row_losses import dse_loss
from fastdiff.noise.noising import corrupt
from fastdiff.ops import corrupt as ops
from fastdiff.philox import Purpose, draw32, resolve_seed, scaled


@dataclasses.dataclass(frozen=True)
class Graph(ABC):
    """What both graphs share. num_states counts the mask, where there is one."""

    num_states: int
    name: ClassVar[str]
    mask_index: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_states", check_integer("num_states", self.num_states, 2))

    def sample_transition(self, x0: Tensor, sigma: float | Tensor, **names: Any) -> Tensor:
        """Tokens noised to sigma, as `fastdiff.corrupt` (its seed, step, sample_ids, generator)."""
        return corrupt(x0, sigma, self, **names)

    @abstractmethod
    def redrawn(self, x0: Tensor, p: Tensor, names: ops.Names, backend: str | None) -> Tensor:
        """Tokens [B, L], each drawn anew at infinite noise with probability p, float64 [B, L]."""

    def transition(self, i: Tensor, sigma: float | Tensor) -> Tensor:
        """Probabilities p(x_t = . | x_0 = i), [..., num_states]; they sum to 1. float64 if sigma is a float64 tensor,
        else float32; so too below."""
        at, alpha, noise = self._noise(i, sigma)
        if self.mask_index is None:
            return self._filled(noise / self.num_states, at, alpha + noise / self.num_states)
        probs = self._filled(torch.zeros_like(noise), at, alpha)
        probs[..., self.mask_index] += noise.squeeze(-1)  # also where i is the mask, whose entry has alpha then
        return probs

    def transp_transition(self, i: Tensor, sigma: float | Tensor) -> Tensor:
        """Probabilities p(x_t = i | x_0 = .), [..., num_states]; they need not sum to 1."""
        if self.mask_index is None:
            return self.transition(i, sigma)
        at, alpha, noise = self._noise(i, sigma)
        came = noise * (at == self.mask_index)
        return self._filled(came, at, alpha + came)

    def reverse_rate(self, i: Tensor, score: Tensor) -> Tensor:
        """Reverse-time rates out of i at dsigma = 1, [..., num_states]; each row sums to 0. float64 if score is, else
        float32; so too below."""
        self._check_rows("score", score)
        self._check_tokens(i, score.shape[:-1])
        at, dtype = i.long().unsqueeze(-1), _precision(score)
        if self.mask_index is None:  # a tensor, so that it and not a 16-bit score sets the type of the product
            leaving = torch.full_like(at, 1, dtype=dtype) / self.num_states
        else:
            leaving = (at == self.mask_index).to(dtype)
        rate = (score * leaving).scatter_(-1, at, 0)
        return rate.scatter_(-1, at, -rate.sum(-1, keepdim=True))

    def staggered_score(self, score: Tensor, dsigma: float | Tensor) -> Tensor:
        """The score seen from dsigma less noise, exp(-dsigma Q) score, [..., num_states]."""
        self._check_rows("score", score)
        dtype = _precision(score)
        grow = per_token("dsigma", dsigma, score.shape[:-1], score.device).exp().unsqueeze(-1)
        spread = (1 - grow) * score.sum(-1, keepdim=True, dtype=dtype)
        # In two factors: exp(89) alone overflows float32, where the result need not.
        factor = (grow / 256).to(dtype)
        if self.mask_index is None:
            return torch.addcmul((spread / self.num_states).to(dtype), score, factor, value=256)
        result = torch.addcmul(torch.zeros_like(factor), score, factor, value=256)
        at_mask = slice(self.mask_index, self.mask_index + 1)
        result[..., at_mask] = (grow * score[..., at_mask] + spread).to(dtype)
        return result

    def score_entropy(self, log_score: Tensor, sigma: float | Tensor, xt: Tensor, x0: Tensor) -> Tensor:
        """Score entropy per token in nats, as `fastdiff.dse_loss`."""
        self._check_rows("log_score", log_score)
        mask_index = -1 if self.mask_index is None else self.mask_index
        return dse_loss(log_score, sigma, xt, x0, graph=self.name, mask_index=mask_index)

    def _noise(self, i: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """i, alpha and 1 - alpha, each [..., 1]."""
        self._check_tokens(i, None)
        dtype = _precision(sigma)
        sigma = per_token("sigma", sigma, i.shape, i.device)
        check_values("sigma", sigma, ~((sigma >= 0) & sigma.isfinite()), "finite numbers >= 0")
        at, sigma = i.long().unsqueeze(-1), sigma.unsqueeze(-1)
        return at, torch.exp(-sigma).to(dtype), -torch.expm1(-sigma).to(dtype)

    def _filled(self, fill: Tensor, at: Tensor, here: Tensor) -> Tensor:
        """Rows of `fill`, with `here` in the place `at`."""
        return fill.expand(*at.shape[:-1], self.num_states).clone().scatter_(-1, at, here)

    def _check_tokens(self, i: Tensor, shape: torch.Size | None) -> None:
        check_tokens("i", i, shape)
        check_values("i", i, (i < 0) | (i >= self.num_states), f"ids in [0, {self.num_states})")

    def _check_rows(self, name: str, rows: Tensor) -> None:
        check_tensor(name, rows)
        check_rows(name, rows.unsqueeze(0) if rows.dim() == 1 else rows)  # one row too
        if rows.shape[-1] != self.num_states:
            raise ValueError(f"{name}: expected {self.num_states} states in the last dimension, got {rows.shape[-1]}")


def _precision(given: float | Tensor) -> torch.dtype:
    return torch.float64 if isinstance(given, Tensor) and given.dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class Absorbing(Graph):
    """Each token becomes the mask M with probability 1 - exp(-sigma)."""

    mask_index: int = -1  # type: ignore[misc]  # a field here, where the base has none
    name: ClassVar[str] = "absorb"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mask_index", vocabulary_index("mask_index", self.mask_index, self.num_states))

    def redrawn(self, x0: Tensor, p: Tensor, names: ops.Names, backend: str | None) -> Tensor:
        return ops.mask_tokens(x0, p, None, names, self.mask_index, backend)[0]

    def sample_limit(self, *shape: int, device: torch.device | None = None) -> Tensor:
        """Tokens at infinite noise: all masks, int64 of the given shape, on a device (None: CPU)."""
        return torch.full(shape, self.mask_index, device=device or "cpu")


@dataclasses.dataclass(frozen=True)
class Uniform(Graph):
    """Each token is redrawn uniformly from all num_states with probability 1 - exp(-sigma)."""

    name: ClassVar[str] = "uniform"

    def redrawn(self, x0: Tensor, p: Tensor, names: ops.Names, backend: str | None) -> Tensor:
        return ops.uniform_tokens(x0, p, names, self.num_states, backend)

    def sample_limit(self, *shape: int, seed: int | Tensor | None = None, device: torch.device | None = None) -> Tensor:
        """Tokens at infinite noise: uniform draws, int64 of the given shape [samples, ...], on a device (None: CPU)."""
        device = device or torch.device("cpu")
        seed = resolve_seed(seed, None, device)
        flat = torch.arange(torch.Size(shape[1:]).numel(), device=device)
        sample = torch.arange(shape[0], device=device).unsqueeze(1)
        draws = draw32(seed, Purpose.LIMIT, 0, sample, 0, flat)
        return scaled(draws, self.num_states).view(shape)
