"""Noise that is part mask and part uniform tokens (GIDD, von Ruette et al. 2025), where unmasked tokens may change too.

q_t(y) = alpha [y = x0] + (1 - alpha) (share / N [y != M] + (1 - share) [y = M]), with alpha = exp(-sigma) and N = V - 1
ids other than the mask M. Formulas: reference.py, sections 1 and 4.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff import noising, reference
from fastdiff.checks import (
    Number,
    check_integer,
    check_rows,
    check_tokens,
    check_values,
    per_token,
    vocabulary_index,
)
from fastdiff.logps import token_logps
from fastdiff.ops.row_sample import row_sample
from fastdiff.philox import Purpose, draw32
from fastdiff.schedules import Hybrid, Schedule
from fastdiff.tokens import check_temperature, token_rows

_MOST = 1e20  # of expm1(sigma) and of odds: beyond, the law is at its limit, and float32 would overflow
_ROUNDING = 1e-12  # in probabilities and rates
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

    def sample_transition(self, x0: Tensor, sigma: Number | Tensor, **names: Any) -> Tensor:
        """Tokens noised to sigma, as `fastdiff.corrupt` (its seed, step, sample_ids, generator)."""
        return noising.corrupt(x0, sigma, self, **names)

    def sample_limit(self, *shape: int, seed: int | Tensor | None = None, device: torch.device | None = None) -> Tensor:
        """Tokens at infinite noise, int64 of the given shape [samples, L], on a device (None: CPU)."""
        return noising.corrupt(
            torch.zeros(shape, dtype=torch.int64, device=device or "cpu"), _FORGOTTEN, self, seed=seed
        )

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
    check_values("dshare", dshare, rate < -_ROUNDING * dsigma, "a rate that leaves none below 0")
    law = noise * torch.where(masked, 1 - share, share / ids) + alpha * (xt == x0)
    check_values("xt", xt, law <= 0, "tokens that this noise gives")
    return rate.clamp_min(0) / law


def mixture_reverse_step(
    logits: Tensor,
    xt: Tensor,
    sigma: Number | Tensor,
    share: Number | Tensor,
    *,
    sigma_next: Number | Tensor,
    share_next: Number | Tensor | None = None,
    mask_index: int = -1,
    temperature: float = 1.0,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draws x_s given x_t, each token by itself: masks may become tokens, and tokens others or masks.

    By Bayes, p(x_s | x_t) is proportional to q(x_t | x_s) q_s(x_s | c), where c = softmax(logits) over the ids other
    than the mask is the law of x0 given the other positions, as `mixture_loss` trains it. At sigma_next = 0 no mask
    stays.

    Whether an unmasked token becomes the mask is a draw of its own, draw32(seed, STEP, step, sample_id, 1, position);
    all else is drawn as in `reverse_step`.

    Args:
        logits: [B, L, V] float32, float64, bfloat16 or float16.
        xt: [B, L] int64 tokens.
        sigma, share: the noise of xt, > 0 and in [0, 1]: numbers or tensors over a prefix of [B, L], or ones that
            broadcast to it.
        sigma_next, share_next: that of x_s, likewise, in [0, sigma) and in [0, 1]; a share_next of None is `share`.
        mask_index: the mask's id, negative from the end.
        temperature: >= 0; the law of the id that replaces x_t is raised to 1 / temperature; whether one does, or the
            mask, does not change.
        seed, step, sample_ids, generator, backend: as in `sample_tokens`.

    Returns:
        int64 [B, L].

    Raises:
        ValueError, TypeError: an argument does not fit; on the CPU also noise that cannot grow from (sigma_next,
            share_next) to (sigma, share).
        BackendUnavailable: the backend named cannot run here.
    """
    check_rows("logits", logits)
    mask_index = vocabulary_index("mask_index", mask_index, logits.shape[-1])
    rows = token_rows(logits, xt, None, None, False, (mask_index,), (seed, step, sample_ids, generator))
    share_next = share if share_next is None else share_next
    law, moves, mask_odds = _law(rows.xt, logits.shape[-1], mask_index, sigma, share, sigma_next, share_next)
    masked = rows.xt == mask_index
    rows.law, rows.live, rows.temperature = law, moves, check_temperature(temperature)
    tokens = row_sample(rows, backend).tokens

    to_mask = _becomes_mask(logits, rows.xt, mask_odds, ~masked & moves, mask_index, backend)
    draws = draw32(rows.seed, Purpose.STEP, rows.step, rows.sample_ids, 1, rows.positions)
    return torch.where(draws < torch.round(to_mask * 2.0**32), mask_index, tokens)


def _law(
    xt: Tensor,
    num_states: int,
    mask_index: int,
    sigma: Number | Tensor,
    share: Number | Tensor,
    sigma_next: Number | Tensor,
    share_next: Number | Tensor,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Of each token: what `reverse_weights` needs to know, the mask left out; whether it may move; and the probability
    that it becomes the mask, as (a, b, c) of a / (b c_xt + c).
    """
    shape, device, ids = xt.shape, xt.device, num_states - 1
    sigma = per_token("sigma", sigma, shape, device)
    after = per_token("sigma_next", sigma_next, shape, device)
    check_values("sigma", sigma, ~((sigma > 0) & sigma.isfinite()), "finite numbers > 0")
    check_values("sigma_next", after, ~((after >= 0) & (after < sigma)), "numbers in [0, sigma)")
    share = check_share("share", share, shape, device)
    share_after = check_share("share_next", share_next, shape, device)
    survives, noise, noise_after = torch.exp(after - sigma), -torch.expm1(-sigma), -torch.expm1(-after)
    # Between the two times a token becomes a given id, or the mask, with these probabilities.
    to_id = (noise * share - survives * noise_after * share_after) / ids
    to_mask = noise * (1 - share) - survives * noise_after * (1 - share_after)
    impossible = (to_id * ids < -_ROUNDING) | (to_mask < -_ROUNDING)
    check_values("share_next", share_after, impossible, "noise that can grow to that of sigma and share")
    to_id, to_mask, masked = to_id.clamp_min(0), to_mask.clamp_min(0), xt == mask_index

    odds = torch.expm1(after).clamp_max(_MOST)  # noise for what is left of x0
    uniform = odds * share_after / ids
    came = torch.where(masked, to_mask, to_id)
    kappa = 1 + survives / came.clamp_min(1 / _MOST)
    lam = -kappa * torch.where(masked, odds * (1 - share_after), uniform)
    here = torch.full_like(kappa, torch.nan).masked_fill(
        masked, -torch.inf
    )  # the mask has no conditional; another id its own, of the row
    law = torch.stack([-uniform, torch.where(masked, 0, kappa), lam, here], -1)
    return law, came > 0, (to_id * noise_after * (1 - share_after), torch.exp(-sigma), noise * share / ids)


def _becomes_mask(
    logits: Tensor,
    xt: Tensor,
    odds: tuple[Tensor, Tensor, Tensor],
    where: Tensor,
    mask_index: int,
    backend: str | None,
) -> Tensor:
    """The probability that an unmasked token becomes the mask, 0 elsewhere; only rows where it can be are read."""
    a, b, c = odds
    where = where & (a > 0)
    here = xt.masked_fill(~where, (mask_index + 1) % logits.shape[-1])  # any id that is not the mask
    conditional = token_logps(logits.detach(), here, mask=where, mask_index=mask_index, backend=backend).double().exp()
    return torch.where(where, a / (b * conditional + c), 0)
