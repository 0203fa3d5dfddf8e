"""The likelihood of masked diffusion as an integral over time, as it is usually published."""

import math

import torch
from torch import Tensor

from fastdiff.checks import check_choice
from fastdiff.estimators.estimate import NLLEstimate, mean_of_independent, mean_of_strata
from fastdiff.estimators.scoring import Model, Scorer
from fastdiff.estimators.time_free import draw_names
from fastdiff.noise.noising import mask_tokens
from fastdiff.philox import Purpose, uniform
from fastdiff.schedules import Schedule

_TOKENS_FOR_BIAS = 8


def time_integral_nll(
    model: Model,
    x0: Tensor,
    *,
    mask_index: int,
    num_samples: int = 64,
    times: str = "stratified",
    eps: float = 1e-3,
    schedule: Schedule | None = None,
    target: Tensor | None = None,
    lengths: Tensor | None = None,
    exclude_mask: bool = True,
    batch_size: int | None = None,
    seed: int | Tensor | None = 0,
    sample_ids: Tensor | None = None,
    differentiable: bool = False,
    backend: str | None = None,
) -> NLLEstimate:
    """The time integral of masked cross-entropies, cut at lambda = eps, in nats, with its standard error:

        `int_eps^1 (1 / lambda) E[sum_{i masked} -log c(x0_i | xt)] d lambda`

    where each of the L target tokens is masked with probability lambda. At eps = 0 this is the quantity that
    `time_free_nll` estimates without bias and, for the same passes, with less variance. This is here to compare with
    published numbers. It is too low by about eps sum_i -log c(x0_i | all others), and its variance grows like
    log(1 / eps).

    `bias` is an estimate of what the cut leaves out, from passes that are made anyway: - eps L times the mean loss of
    the tokens masked in the passes of smallest lambda, as many as it takes to mask 8.

    With a schedule it is what MDLM prints, `E_t[dsigma / expm1(sigma) sum_{i masked} -log c(x0_i | xt)]` over t uniform
    on [eps, 1]: 1 / (1 - eps) times an integral that leaves out some noise at both ends. `bias`, how far that is from
    the whole integral, is then not estimated: NaN.

    Args:
        model, x0, mask_index, target, lengths, exclude_mask, batch_size, seed, sample_ids, differentiable, backend: as
            in `time_free_nll`.
        num_samples: network passes for each sequence, at least 2.
        times: "stratified", one lambda in each of num_samples equal parts of [eps, 1]; the standard error comes from
            neighbouring parts, and its square is on average no smaller than the variance. Or "iid".
        eps: where the integral is cut, in [0, 1).
        schedule: of the noise over t; None for the integral over lambda.

    Raises:
        TypeError, ValueError: as `time_free_nll`; also for unknown times and an eps out of range.
    """
    if not 0 <= eps < 1:
        raise ValueError(f"eps: expected a number in [0, 1), got {eps}")
    score = Scorer(
        model,
        x0,
        mask_index,
        target=target,
        lengths=lengths,
        exclude_mask=exclude_mask,
        batch_size=batch_size,
        differentiable=differentiable,
        backend=backend,
    )
    seed, sample_ids = draw_names(x0, seed, sample_ids)
    t = eps + (1 - eps) * draw_times(num_samples, times, seed, sample_ids)
    level, weight = t, (1 - eps) / t
    if schedule is not None:
        sigma, dsigma = schedule(t)
        level, weight = -torch.expm1(-sigma), dsigma / torch.expm1(sigma)
    loss, counts = masked_losses(score, level, seed, sample_ids)
    nll, stderr, freedom = mean_over_times(weight * loss, times)
    bias = -eps * score.num_tokens.double() * _loss_of_few(level, loss.detach(), counts)
    return NLLEstimate(
        nll=nll,
        stderr=stderr.detach(),
        num_tokens=score.num_tokens,
        num_forwards=torch.full_like(score.num_tokens, num_samples),
        degrees_of_freedom=freedom.detach(),
        bias=bias if schedule is None else torch.full_like(bias, math.nan),
    )


def draw_times(num_samples: int, times: str, seed: Tensor, sample_ids: Tensor) -> Tensor:
    """Times in (0, 1), [B, num_samples] float64, independent or one in each of num_samples equal parts."""
    check_choice("times", times, ("stratified", "iid"))
    if num_samples < 2:
        raise ValueError(f"num_samples: expected at least 2 for a standard error, got {num_samples}")
    part = torch.arange(num_samples, device=sample_ids.device)
    u = uniform(seed, Purpose.TIME, 0, sample_ids.unsqueeze(1), 0, part)
    return (part + u) / num_samples if times == "stratified" else u


def masked_losses(score: Scorer, level: Tensor, seed: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Summed losses and masked tokens of each pass, [B, P], with target tokens masked with probability level [B, P]."""
    passes = level.shape[1]
    loss, counts = torch.zeros_like(level), torch.zeros_like(level)
    with score.evaluating(level.numel()):
        for group in score.groups():
            length = int(score.lengths[group[0]])
            for rows in score.batches(len(group) * passes):
                which, step = group[rows // passes], rows % passes
                masked = mask_tokens(
                    score.x0[which, :length],
                    level[which, step],
                    mask_index=score.mask_index,
                    maskable=score.target[which, :length],
                    seed=seed,
                    step=step,
                    sample_ids=sample_ids[which],
                    backend=score.backend,
                )
                loss[which, step] = score(which, masked).sum(1)
                counts[which, step] = masked.mask.sum(1).double()
    return loss, counts


def mean_over_times(values: Tensor, times: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard error and degrees of freedom, [B] each, of one value [B, P] per time."""
    return (mean_of_independent if times == "iid" else mean_of_strata)(values)


def _loss_of_few(level: Tensor, loss: Tensor, counts: Tensor) -> Tensor:
    """Mean loss of a token where few others are masked: [B]."""
    order = level.argsort(1)
    loss, counts = loss.gather(1, order), counts.gather(1, order)
    first = counts.cumsum(1) - counts < _TOKENS_FOR_BIAS
    return torch.where(first, loss, 0).sum(1) / torch.where(first, counts, 0).sum(1).clamp(min=1)
