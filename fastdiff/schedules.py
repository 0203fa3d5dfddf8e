"""Noise schedules: total noise sigma(t), its rate dsigma(t), survival probability alpha(t) = exp(-sigma(t)).

Time runs from 0 (data) to 1 (noise). A schedule is three formulas, evaluated in float64, in forms that keep
1 - alpha precise near t = 0. Results come back in the dtype of the argument.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.checks import check_tensor

__all__ = ["Cosine", "Geometric", "Hybrid", "Linear", "LogLinear", "Polynomial", "Schedule"]


class Schedule(ABC):
    """A noise schedule. Times are in [0, 1]; tensors of any shape and float dtype go in, the same come out.

    A diffusion loss takes ``sigma, dsigma = schedule(t)``. A new schedule defines ``_sigma``, ``_dsigma`` and
    ``_time``, each float64 in and float64 out.

    Raises:
        TypeError: a time or a noise level that is not a floating-point tensor.
        ValueError: parameters outside their range, when the schedule is made.
    """

    def total_noise(self, t: Tensor) -> Tensor:
        """Total noise sigma(t), sigma_bar in the papers: a token survives with probability exp(-sigma)."""
        return self._sigma(_float64("t", t)).to(t.dtype)

    def rate_noise(self, t: Tensor) -> Tensor:
        """Noise rate dsigma(t) = d sigma / dt."""
        return self._dsigma(_float64("t", t)).to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        """Survival probability alpha(t) = exp(-sigma(t))."""
        return torch.exp(-self._sigma(_float64("t", t))).to(t.dtype)

    def inverse(self, sigma: Tensor) -> Tensor:
        """Time t at which ``total_noise(t)`` is sigma."""
        return self._time(_float64("sigma", sigma)).to(sigma.dtype)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(sigma, dsigma)`` at time t."""
        return self.total_noise(t), self.rate_noise(t)

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _dsigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _time(self, sigma: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LogLinear(Schedule):
    """alpha = 1 - (1 - eps) t: tokens are masked at a constant rate. At eps = 0, sigma(1) is infinite."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - self.eps) * t)

    def _dsigma(self, t: Tensor) -> Tensor:
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def _time(self, sigma: Tensor) -> Tensor:
        return -torch.expm1(-sigma) / (1 - self.eps)


@dataclass(frozen=True)
class Geometric(Schedule):
    """sigma = sigma_min^(1-t) sigma_max^t. Some noise, sigma_min, is there already at t = 0."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)
        if self.sigma_min == 0:
            raise ValueError("sigma_min: expected > 0 for a geometric schedule, got 0")

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(t * self._log_ratio)

    def _dsigma(self, t: Tensor) -> Tensor:
        return self._log_ratio * self._sigma(t)

    def _time(self, sigma: Tensor) -> Tensor:
        return torch.log(sigma / self.sigma_min) / self._log_ratio


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = eps + (1 - eps) cos(pi t / 2). At eps = 0, sigma(1) is infinite."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    # 1 - cos(pi t / 2) = 2 sin(pi t / 4)^2 keeps its precision at small t
    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-2 * (1 - self.eps) * torch.sin(math.pi / 4 * t) ** 2)

    def _dsigma(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * math.pi / 2 * torch.sin(math.pi / 2 * t) * torch.exp(self._sigma(t))

    def _time(self, sigma: Tensor) -> Tensor:
        return 4 / math.pi * torch.asin(torch.sqrt(-torch.expm1(-sigma) / (2 * (1 - self.eps))))


@dataclass(frozen=True)
class Linear(Schedule):
    """sigma = sigma_min + (sigma_max - sigma_min) t."""

    sigma_min: float = 0.0
    sigma_max: float = 10.0

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + (self.sigma_max - self.sigma_min) * t

    def _dsigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_max - self.sigma_min)

    def _time(self, sigma: Tensor) -> Tensor:
        return (sigma - self.sigma_min) / (self.sigma_max - self.sigma_min)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """alpha = 1 - (1 - eps) t^k. At eps = 0, sigma(1) is infinite; at k < 1, dsigma(0) is."""

    k: float
    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        if not 0 < self.k < math.inf:
            raise ValueError(f"k: expected a positive finite number, got {self.k}")

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - self.eps) * t**self.k)

    def _dsigma(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * self.k * t ** (self.k - 1) / (1 - (1 - self.eps) * t**self.k)

    def _time(self, sigma: Tensor) -> Tensor:
        return (-torch.expm1(-sigma) / (1 - self.eps)) ** (1 / self.k)


@dataclass(frozen=True)
class Hybrid(Schedule):
    """GIDD's noise, masks and uniform tokens (von Ruette et al. 2025), with u = (1 - eps) t:

    alpha = (1 - u) / (1 + c), and of the noise the share c / (u + c) is uniform, where
    c = 2^gamma p_uniform / (1 - p_uniform) (u (1 - u))^(gamma/2).

    At u = 1/2 a token is uniform noise with probability p_uniform; at both ends with probability 0. With p_uniform = 0
    this is LogLinear(eps). dsigma(0) is infinite where p_uniform > 0 and gamma < 2. At eps = 0, sigma(1) is infinite.
    """

    p_uniform: float = 0.1
    gamma: float = 1.0
    eps: float = 1e-4

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        if not 0 <= self.p_uniform < 1:
            raise ValueError(f"p_uniform: expected a number in [0, 1), got {self.p_uniform}")
        if not 0 < self.gamma <= 2:  # above 2 uniform noise would have to be taken back
            raise ValueError(f"gamma: expected a number in (0, 2], got {self.gamma}")

    def share(self, t: Tensor) -> Tensor:
        """The share of the noise that is uniform, in [0, 1], where the rest is the mask."""
        return (1 / (1 + self._odds(_float64("t", t)))).to(t.dtype)

    def rate_share(self, t: Tensor) -> Tensor:
        """d share / dt, for t > 0."""
        odds, u = self._odds(_float64("t", t)), (1 - self.eps) * t.double()
        slope = (1 - self.eps) * ((1 - self.gamma / 2) / u + self.gamma / 2 / (1 - u))
        return torch.where(odds.isinf(), 0, -odds / (1 + odds) ** 2 * slope).to(t.dtype)

    @property
    def _scale(self) -> float:
        return 2**self.gamma * self.p_uniform / (1 - self.p_uniform)

    def _odds(self, t: Tensor) -> Tensor:
        """u / c, masks for each uniform token."""
        u = (1 - self.eps) * t
        if self.p_uniform == 0:
            return torch.full_like(u, math.inf)
        return u ** (1 - self.gamma / 2) * (1 - u) ** (-self.gamma / 2) / self._scale

    def _uniform(self, t: Tensor) -> Tensor:
        """c."""
        u = (1 - self.eps) * t
        return self._scale * (u * (1 - u)) ** (self.gamma / 2)

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.log1p(self._uniform(t)) - torch.log1p(-(1 - self.eps) * t)

    def _dsigma(self, t: Tensor) -> Tensor:
        u, c = (1 - self.eps) * t, self._uniform(t)
        grown = 1 / (1 - u)
        if self.p_uniform > 0:
            grown = grown + self.gamma / 2 * (1 - 2 * u) * self._scale * (u * (1 - u)) ** (self.gamma / 2 - 1) / (1 + c)
        return (1 - self.eps) * grown

    def _time(self, sigma: Tensor) -> Tensor:
        """By bisection: there is no formula."""
        low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(110):
            middle = (low + high) / 2
            below = self._sigma(middle) < sigma
            low, high = middle.where(below, low), high.where(below, middle)
        return high


def _float64(name: str, value: Tensor) -> Tensor:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    return value.double()


def _check_eps(eps: float) -> None:
    if not 0 <= eps < 1:
        raise ValueError(f"eps: expected a number in [0, 1), got {eps}")


def _check_range(sigma_min: float, sigma_max: float) -> None:
    if not 0 <= sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min: expected 0 <= sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
