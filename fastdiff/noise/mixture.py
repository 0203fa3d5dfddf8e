"""Noise that is part mask and part uniform tokens (GIDD, von Ruette et al. 2025), where unmasked tokens may change too.

q_t(y) = alpha [y = x0] + (1 - alpha) (share / N [y != M] + (1 - share) [y = M]), with alpha = exp(-sigma) and N = V - 1
ids other than the mask M. Formulas: reference/forward.py and reverse.py.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.checks import (
    Number,
    check_integer,
    check_tokens,
    check_values,
    per_token,
    vocabulary_index,
)
from fastdiff.noise.noising import corrupt
from fastdiff.ops import corrupt as ops
from fastdiff.schedules import Hybrid, Schedule

ROUNDING = 1e-12  # in probabilities and rates
_FORGOTTEN = 64.0  # sigma at which no draw of 32 bits leaves a token as it was


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Each token is redrawn with probability 1 - exp(-sigma): uniformly from the ids other than the mask with
    probability `share`, else it becomes the mask.

    Args:
        num_states: V, the mask included, at least 2.
        mask_index: the mask's id, negative from the end.
        share: in [0, 1], a number or a tensor over a prefix of the token shape ([B] is one per sequence). 0 is
            `Absorbing`, 1 is `Uniform` over the other ids. None leaves it to a schedule that has one, in `sample`.

    Raises:
        ValueError, TypeError: an argument does not fit; a share outside [0, 1] where it is used, or None.
    """

    num_states: int
    mask_index: int = -1
    share: Number | Tensor | None = None
    name: ClassVar[str] = "mixture"

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_states", check_integer("num_states", self.num_states, 2))
        object.__setattr__(self, "mask_index", vocabulary_index("mask_index", self.mask_index, self.num_states))
        if self.share is not None and not isinstance(self.share, Tensor):
            self.shares(torch.Size(), torch.device("cpu"))

    def shares(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The share of each token, float64 of the token shape."""
        if self.share is None:
            raise ValueError("share: expected a number or a tensor in [0, 1], got None")
        return check_share("share", self.share, shape, device)

    def at(self, schedule: Schedule, t: Tensor) -> tuple["Mixture", Tensor]:
        """The noise at times t, with its share, and the rate of that, in the shape and type of t.

        A `Hybrid` schedule says the share, where this one has none; with another it is this one's at all times.
        """
        if not isinstance(schedule, Hybrid):
            share = self.shares(torch.Size(), t.device).to(t.dtype)
            return dataclasses.replace(self, share=share.expand_as(t)), torch.zeros_like(t)
        if self.share is not None:
            raise ValueError(f"share: expected None, for the schedule has its own, got {self.share}")
        return dataclasses.replace(self, share=schedule.share(t)), schedule.rate_share(t)

    def transition(self, i: Tensor, sigma: Number | Tensor) -> Tensor:
        """Probabilities p(x_t = . | x_0 = i), float64 [..., V]; they sum to 1."""
        sigma, share = self._noise(i, sigma)
        return reference.mixture_transition(i.long(), sigma, share, self.num_states, self.mask_index)

    def transp_transition(self, i: Tensor, sigma: Number | Tensor) -> Tensor:
        """Probabilities p(x_t = i | x_0 = .), float64 [..., V]; they need not sum to 1."""
        sigma, share = self._noise(i, sigma)
        came = reference.mixture_limit(share, self.num_states, self.mask_index).gather(-1, i.long().unsqueeze(-1))
        stay = torch.nn.functional.one_hot(i.long(), self.num_states)
        return torch.exp(-sigma).unsqueeze(-1) * stay - torch.expm1(-sigma).unsqueeze(-1) * came

    def redrawn(self, x0: Tensor, p: Tensor, names: ops.Names, backend: str | None) -> Tensor:
        """Tokens [B, L], each drawn anew at infinite noise with probability p, float64 [B, L]."""
        p_mask = p * (1 - self.shares(x0.shape, x0.device))
        return ops.mask_tokens(self._other_ids(x0, p, names, backend), p_mask, None, names, self.mask_index, backend)[0]

    def sample_transition(self, x0: Tensor, sigma: Number | Tensor, **names: Any) -> Tensor:
        """Tokens noised to sigma, as `fastdiff.corrupt` (its seed, step, sample_ids, generator)."""
        return corrupt(x0, sigma, self, **names)

    def sample_limit(self, *shape: int, seed: int | Tensor | None = None, device: torch.device | None = None) -> Tensor:
        """Tokens at infinite noise, int64 of the given shape [samples, L], on a device (None: CPU)."""
        return corrupt(torch.zeros(shape, dtype=torch.int64, device=device or "cpu"), _FORGOTTEN, self, seed=seed)

    def _other_ids(self, x0: Tensor, p: Tensor, names: ops.Names, backend: str | None) -> Tensor:
        """Each token redrawn with probability p from the ids other than the mask, which is last meanwhile."""
        last, mask_index = self.num_states - 1, self.mask_index
        if mask_index == last:
            return ops.uniform_tokens(x0, p, names, last, backend)
        moved = torch.where(x0 == mask_index, last, x0 - (x0 > mask_index).long())
        drawn = ops.uniform_tokens(moved, p, names, last, backend)
        return torch.where(drawn == last, mask_index, drawn + (drawn >= mask_index).long())

    def _noise(self, i: Tensor, sigma: Number | Tensor) -> tuple[Tensor, Tensor]:
        check_tokens("i", i, None)
        check_values("i", i, (i < 0) | (i >= self.num_states), f"ids in [0, {self.num_states})")
        sigma = per_token("sigma", sigma, i.shape, i.device)
        check_values("sigma", sigma, ~((sigma >= 0) & sigma.isfinite()), "finite numbers >= 0")
        return sigma, self.shares(i.shape, i.device)


def check_share(name: str, share: Number | Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    share = per_token(name, share, shape, device)
    check_values(name, share, ~((share >= 0) & (share <= 1)), "numbers in [0, 1]")
    return share


def mixture_weight(
    xt: Tensor,
    x0: Tensor,
    sigma: Number | Tensor,
    dsigma: Number | Tensor,
    graph: Mixture,
    *,
    dshare: Number | Tensor = 0.0,
) -> Tensor:
    """GIDD's weight, r(x_t) / q_t(x_t | x0), which makes the mean of `mixture_loss` over times a bound of the NLL.

    r(y) is the rate at which other tokens become y: dsigma (1 - share) - (1 - alpha) dshare of the mask,
    (dsigma share + (1 - alpha) dshare) / N of any other id.

    Args:
        xt, x0: [...] int64 noised and clean tokens.
        sigma: total noise > 0, a number or a tensor over a prefix of the token shape, or one that broadcasts to it.
        dsigma: its rate, likewise. dshare: the rate of the share, likewise; 0 where it is the same at all times.
        graph: the noise, with its share.

    Returns:
        float64 [...]. GIDD's "clip" is this `.clamp(max=2)`.

    Raises:
        ValueError, TypeError: an argument does not fit; on the CPU also a token that this noise cannot give, and a rate
            below 0: a share that moves faster than sigma lets it.
    """
    check_tokens("x0", x0, None)
    check_tokens("xt", xt, x0.shape, x0.device)
    sigma, dsigma, dshare = (
        per_token(name, value, x0.shape, x0.device)
        for name, value in (("sigma", sigma), ("dsigma", dsigma), ("dshare", dshare))
    )
    share, masked = graph.shares(x0.shape, x0.device), xt == graph.mask_index
    alpha, noise, ids = torch.exp(-sigma), -torch.expm1(-sigma), graph.num_states - 1
    rate = torch.where(masked, dsigma * (1 - share) - noise * dshare, (dsigma * share + noise * dshare) / ids)
    check_values("dshare", dshare, rate < -ROUNDING * dsigma, "a rate that leaves none below 0")
    law = noise * torch.where(masked, 1 - share, share / ids) + alpha * (xt == x0)
    check_values("xt", xt, law <= 0, "tokens that this noise gives")
    return rate.clamp_min(0) / law
