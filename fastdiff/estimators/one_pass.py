"""One pass with the whole response masked, as d1 (diffu-GRPO) and wd1 estimate it: cheap, per token, and biased."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdiff.estimators.estimate import NLLEstimate, mean_of_independent
from fastdiff.estimators.scoring import Model, Scorer
from fastdiff.estimators.time_free import draw_names
from fastdiff.noise.noising import Masked, mask_tokens


def one_pass_nll(
    model: Model,
    x0: Tensor,
    *,
    mask_index: int,
    target: Tensor | None = None,
    prompt_masking: float = 0.0,
    num_samples: int = 1,
    lengths: Tensor | None = None,
    exclude_mask: bool = True,
    batch_size: int | None = None,
    seed: int | Tensor | None = 0,
    sample_ids: Tensor | None = None,
    differentiable: bool = False,
    backend: str | None = None,
) -> NLLEstimate:
    """Sum of -log c(x0_i | xt) over the target tokens, all of them masked, in nats: a biased stand-in for the NLL.

    It takes tokens for independent given what xt shows, so it is the NLL only where they are, else off on either side,
    by an amount that no number of passes tells: `bias` is NaN. With prompt_masking each other token is masked too, with
    that probability, anew in each pass. The standard error is that between passes: 0 where they are all the same, NaN
    where one pass cannot tell.

    Args:
        model, x0, mask_index, target, lengths, exclude_mask, batch_size, seed, sample_ids, differentiable, backend: as
            in `time_free_nll`.
        prompt_masking: probability in [0, 1] that a token off target is masked; d1 takes 0.15.
        num_samples: passes, whose losses are averaged.

    Raises:
        TypeError, ValueError: as `time_free_nll`; also for a prompt_masking outside [0, 1].
    """
    if not 0 <= prompt_masking <= 1:
        raise ValueError(f"prompt_masking: expected a probability in [0, 1], got {prompt_masking}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
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
    token_nll = torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
    of_passes = token_nll.new_zeros(len(x0), num_samples)
    with score.evaluating(of_passes.numel()):
        for group in score.groups():
            length = int(score.lengths[group[0]])
            for rows in score.batches(len(group) * num_samples):
                which, step = group[rows // num_samples], rows % num_samples
                response = score.target[which, :length]
                prompt = mask_tokens(
                    x0[which, :length],
                    prompt_masking,
                    mask_index=mask_index,
                    maskable=~response,
                    seed=seed,
                    step=step,
                    sample_ids=sample_ids[which],
                    backend=backend,
                )
                loss = score(which, Masked(prompt.xt.masked_fill(response, mask_index), response))
                token_nll = token_nll.index_add(0, which, pad(loss, (0, x0.shape[1] - length)) / num_samples)
                of_passes[which, step] = loss.detach().sum(1)
    freedom = stderr = torch.full_like(of_passes[:, 0], math.nan)
    if num_samples > 1:
        _, stderr, freedom = mean_of_independent(of_passes)
    alike = (score.num_tokens == score.lengths) | (prompt_masking in (0, 1))
    return NLLEstimate(
        nll=token_nll.sum(1),
        stderr=stderr.masked_fill(alike, 0),
        num_tokens=score.num_tokens,
        num_forwards=torch.full_like(score.num_tokens, num_samples),
        degrees_of_freedom=freedom.masked_fill(alike, math.inf),
        bias=torch.full_like(stderr, math.nan),
        token_nll=token_nll,
    )
