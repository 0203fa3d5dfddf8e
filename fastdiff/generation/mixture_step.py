"""One step of mixed noise run backwards, where masks may become tokens, and tokens others or masks."""

import torch
from torch import Tensor

from fastdiff.checks import Number, check_rows, check_values, per_token, vocabulary_index
from fastdiff.generation.tokens import check_temperature, token_rows
from fastdiff.losses.logps import token_logps
from fastdiff.noise.mixture import ROUNDING, check_share
from fastdiff.ops.row_sample import row_sample
from fastdiff.philox import Purpose, draw32

_MOST = 1e20  # of expm1(sigma) and of odds: beyond, the law is at its limit, and float32 would overflow


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
    impossible = (to_id * ids < -ROUNDING) | (to_mask < -ROUNDING)
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
