"""Losses after pretraining, of estimated likelihoods: preferences (DPO) and checked rewards (GRPO)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastdiff.checks import check_bool, check_choice, check_tensor, check_tokens, check_values
from fastdiff.estimators.estimate import LogRatioEstimate


class DPOLoss(NamedTuple):
    """The loss, and by how much the noise of the margins raises it on average.

    `bias` has the shape of `loss` and no gradient; it is None where the margins came without their variances.
    """

    loss: Tensor
    bias: Tensor | None


class GRPOLoss(NamedTuple):
    """The loss, with its gradient, and what one logs: scalars without.

    Attributes:
        loss: scalar.
        kl: mean estimate of KL(p || p_ref) in nats a token (a sequence, without num_tokens); 0 without a reference.
        clipped_low, clipped_high: shares of ratios that are clipped from below and above, and so have no gradient.
    """

    loss: Tensor
    kl: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def dpo_loss(
    margin: LogRatioEstimate | Tensor, *, beta: float = 0.1, debias: bool = False, reduction: str = "mean"
) -> DPOLoss:
    """-log sigmoid(beta m), m = [log p(x) - log p(y)] - [log p_ref(x) - log p_ref(y)]: x is preferred to y.

    (Rafailov et al., 2023, equation 7.) An unbiased estimate of m makes the loss too high on average, since it is
    convex in m: with s = sigmoid(beta m), by about (beta^2 / 2) s (1 - s) var(m), Jensen's bias to second order.

    Args:
        margin: what `log_likelihood_ratio(..., reference=..., differentiable=True)` gives, or margins [B] in nats.
        beta: > 0, how much a nat counts.
        debias: subtract that bias, gradient included.
        reduction: "none" for [B], "sum", or "mean".

    Raises:
        TypeError: margin is neither, or not of a floating dtype.
        ValueError: a margin that is not finite, by its row; beta not above 0; an unknown reduction; margins of
            another shape than [B]; debias=True without variances.
    """
    check_choice("reduction", reduction, ("none", "sum", "mean"))
    if not 0 < beta < math.inf:
        raise ValueError(f"beta: expected a finite number above 0, got {beta}")
    m, variance = (margin.log_ratio, margin.variance) if isinstance(margin, LogRatioEstimate) else (margin, None)
    _check_floats("margin", m)
    if m.dim() != 1 or not len(m):
        raise ValueError(f"margin: expected shape [B] with B >= 1, got {tuple(m.shape)}")
    if debias and variance is None:
        raise ValueError("debias: needs variances, a LogRatioEstimate as margin, got a tensor")
    check_values("margin", m, ~m.isfinite(), "finite numbers")
    loss = -logsigmoid(beta * m)
    if variance is None:
        return DPOLoss(_reduced(loss, reduction), None)
    s = torch.sigmoid(beta * m)
    bias = beta**2 / 2 * s * (1 - s) * variance
    return DPOLoss(_reduced(loss - bias if debias else loss, reduction), _reduced(bias.detach(), reduction))


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    num_tokens: Tensor | None = None,
    reference_logps: Tensor | None = None,
    clip: float | tuple[float, float] = 0.2,
    beta: float = 0.0,
    kl: str = "k2",
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> GRPOLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A) + beta KL of answers, or of tokens (Shao et al., 2024, equation 3).

    - Answers: logps [B] are log p(answer). With num_tokens r = exp((logps - old_logps) / num_tokens), as in GSPO (Zheng
      et al., 2025, equation 7) and ESPO; without, r = exp(logps - old_logps).
    - Tokens: logps [B, L] count where mask is true, each with the ratio of its own, as in d1, coupled-GRPO and SPG.

    Estimates on the same masks (one seed, one sample_ids) share their noise, which ratios and the KL then lose.

    The KL is estimated from D = logps - reference_logps (Schulman, 2020): "k2" is D^2 / 2, whose gradient is on
    average that of the KL on answers that p drew; "k3" is exp(-D) + D - 1, which d1 and others take of tokens, and
    which overflows on whole answers. Either is divided by num_tokens, where given, as ESPO's is.

    Args:
        logps: [B] or [B, L] log-likelihoods in nats, such as `-time_free_nll(..., differentiable=True).nll`.
        old_logps: the same under the model that drew the answers, without gradient; None where that is this model,
            so that r = 1.
        advantages: [B], how much better an answer was than others; without gradient.
        mask: [B, L] bool, the tokens of the answers; with logps [B, L], and only there.
        num_tokens: [B] integers, lengths of the answers; with logps [B].
        reference_logps: the same under the reference, without gradient; needed where beta > 0.
        clip: how far r may leave 1 and still have a gradient, or a pair (low, high).
        beta: >= 0, what a nat of the KL costs.
        kl: "k2" or "k3".
        reduction: "mean" over all answers, or over all tokens; "sequence_mean" over the tokens of each answer and
            then over answers, as in the equation.
        num_items: divides the sum over answers or tokens in place of their number: the tokens of a whole step where
            gradients accumulate (DAPO), or B times the longest length (Dr. GRPO).

    Raises:
        TypeError: an argument that is no tensor, or of a wrong dtype.
        ValueError: a log-likelihood, ratio or KL that is not finite, by its place; an answer without tokens; shapes
            or options that do not fit.
    """
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    if not (0 <= low < 1 and high >= 0):
        raise ValueError(f"clip: expected 0 <= low < 1 and high >= 0, got {clip}")
    check_choice("kl", kl, ("k2", "k3"))
    check_choice("reduction", reduction, ("mean", "sequence_mean"))
    if not 0 <= beta < math.inf or (beta and reference_logps is None):
        raise ValueError(f"beta: expected 0, or a finite number above it with reference_logps, got {beta}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: divides the sum, so needs reduction='mean', got {reduction!r}")
    if not isinstance(num_items, Tensor) and num_items is not None and not num_items > 0:
        raise ValueError(f"num_items: expected a number above 0, got {num_items}")
    mask = _scored(logps, mask, num_tokens)
    length = 1 if num_tokens is None else num_tokens
    logps = _finite("logps", logps, mask)
    old = logps.detach() if old_logps is None else _finite("old_logps", old_logps.detach(), mask)
    gain = _finite("advantages", advantages.detach(), mask.view(len(mask), -1).any(1))
    gain = gain.view(-1, *[1] * (mask.dim() - 1))

    # min(r A, clip(r) A) clips r on one side, from above where A > 0: then what is clipped cannot overflow either
    log_ratio, floor, ceiling = (logps - old) / length, math.log1p(-low), math.log1p(high)
    ratio = torch.where(gain >= 0, log_ratio.clamp(max=ceiling), log_ratio.clamp(min=floor)).exp()
    check_values("logps - old_logps", log_ratio, ~ratio.isfinite(), "a finite ratio")
    distance = torch.zeros_like(logps)
    if reference_logps is not None:
        d = logps - _finite("reference_logps", reference_logps.detach(), mask)
        distance = (d**2 / 2 if kl == "k2" else torch.exp(-d) + d - 1) / length
        check_values("logps - reference_logps", d, ~distance.isfinite(), "a finite KL, as kl='k2' gives")

    counts = mask.to(logps.dtype)
    each = counts / counts.sum()
    weight = each if num_items is None else counts / num_items
    if reduction == "sequence_mean" and mask.dim() == 2:
        weight = counts / counts.sum(1, keepdim=True) / len(mask)
    loss = (weight * (beta * distance - gain * ratio)).sum()
    clipped_low, clipped_high = (gain < 0) & (log_ratio < floor), (gain > 0) & (log_ratio > ceiling)
    return GRPOLoss(loss, *((each * x).sum().detach() for x in (distance, clipped_low, clipped_high)))


def _reduced(each: Tensor, reduction: str) -> Tensor:
    return {"none": each, "sum": each.sum(), "mean": each.mean()}[reduction]


def _scored(logps: Tensor, mask: Tensor | None, num_tokens: Tensor | None) -> Tensor:
    """Which log-likelihoods count, in the shape of logps, with every answer in it."""
    _check_floats("logps", logps)
    if logps.dim() not in (1, 2) or not len(logps):
        raise ValueError(f"logps: expected shape [B] or [B, L] with B >= 1, got {tuple(logps.shape)}")
    if logps.dim() == 2:
        if mask is None or num_tokens is not None:
            raise ValueError(f"mask: expected one, and no num_tokens, for logps {tuple(logps.shape)} of tokens")
        check_bool("mask", mask, logps.shape, logps.device)
        check_values("mask", mask.sum(1), ~mask.any(1), "a token in every answer")
        return mask
    if mask is not None:
        raise ValueError(f"mask: expected None for logps {tuple(logps.shape)} of answers; num_tokens has their lengths")
    if num_tokens is not None:
        check_tokens("num_tokens", num_tokens, logps.shape, logps.device)
        check_values("num_tokens", num_tokens, num_tokens < 1, "at least 1")
    return torch.ones_like(logps, dtype=torch.bool)


def _finite(name: str, value: Tensor, mask: Tensor) -> Tensor:
    """value where mask is true, in float32 at least, and 0 elsewhere."""
    _check_floats(name, value)
    if value.shape != mask.shape or value.device != mask.device:
        raise ValueError(
            f"{name}: expected shape {tuple(mask.shape)} on {mask.device}, got {tuple(value.shape)} on {value.device}"
        )
    check_values(name, value, mask & ~value.isfinite(), "finite numbers")
    return value.to(torch.promote_types(value.dtype, torch.float32)).where(mask, 0)


def _check_floats(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
