"""SPG's upper bound of log p(x0), which a policy gradient pushes down where the advantage is negative."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdiff.estimators.estimate import NLLEstimate
from fastdiff.estimators.scoring import Model, Scorer
from fastdiff.estimators.time_free import draw_names
from fastdiff.noise.noising import sample_mask_counts


def upper_bound_nll(
    model: Model,
    x0: Tensor,
    *,
    mask_index: int,
    beta: float = 1.0,
    num_samples: int = 64,
    target: Tensor | None = None,
    lengths: Tensor | None = None,
    exclude_mask: bool = True,
    batch_size: int | None = None,
    seed: int | Tensor | None = 0,
    sample_ids: Tensor | None = None,
    differentiable: bool = False,
    backend: str | None = None,
) -> NLLEstimate:
    """Minus an upper bound of log p(x0), in nats, `(1 / beta) sum_i log E[(L / m) 1(i masked) c(x0_i | xt)^beta]`.

    Of the L target tokens m are masked, m uniform on 1..L. The expectation is a mean of c^beta over random orders, so
    the bound rises with beta, from minus the NLL of `time_free_nll` as beta goes to 0. It holds

    - at every beta > 0 where the conditionals are consistent (Jensen);
    - at beta >= L, the number of target tokens, against log E_pi p_pi(x0) of any network (Hoelder). At a smaller beta a
      network whose tokens are easy or hard together, by the order, breaks it.

    Of few passes it is no bound: the logarithm of a mean is on average too small, and nll too large, by about `bias`, a
    jackknife over the passes, which does not see a token that no pass masked (it counts 0, the largest log c).
    nll - bias is closer on average, and noisier. The standard error is the jackknife's.

    Args:
        model, x0, mask_index, target, lengths, exclude_mask, batch_size, seed, sample_ids, differentiable, backend: as
            in `time_free_nll`.
        beta: a positive number.
        num_samples: passes, independent, at least 2.

    Raises:
        TypeError, ValueError: as `time_free_nll`; also for a beta that is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta: expected a positive number, got {beta}")
    if num_samples < 2:
        raise ValueError(f"num_samples: expected at least 2 for a standard error, got {num_samples}")
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
    without_one = token_nll.new_zeros(len(x0), num_samples)
    passes = torch.arange(num_samples, device=x0.device)
    with score.evaluating(without_one.numel()):
        for which in score.groups():
            ids = sample_ids[which]
            counts, weight = sample_mask_counts(
                num_samples, score.num_tokens[which], proposal="uniform", seed=seed, sample_ids=ids
            )
            loss, mask = score.draw(which, counts, passes, seed, ids)
            found, rest = _bounds(weight.unsqueeze(2).log() - beta * loss, mask)
            token_nll = token_nll.index_add(0, which, pad(-found / beta, (0, x0.shape[1] - loss.shape[2])))
            without_one[which] = -rest / beta
    nll, off = token_nll.sum(1), without_one - without_one.mean(1, keepdim=True)
    return NLLEstimate(
        nll=nll,
        stderr=((1 - 1 / num_samples) * (off**2).sum(1)).sqrt(),
        num_tokens=score.num_tokens,
        num_forwards=torch.full_like(score.num_tokens, num_samples),
        degrees_of_freedom=torch.full_like(off[:, 0], num_samples - 1),
        bias=(num_samples - 1) * (without_one.mean(1) - nll.detach()),
        token_nll=token_nll,
    )


def _bounds(logs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """log mean exp of `logs` [K, P, L] over the passes, by token [K, L], 0 if never masked; and the sums over tokens of
    what it is without each pass [K, P]."""
    passes, seen = logs.shape[1], mask.any(1)
    found = torch.where(mask, logs, -math.inf).masked_fill(~seen.unsqueeze(1), 0).logsumexp(1) - math.log(passes)
    found = torch.where(seen, found, 0)
    share = torch.where(mask, (logs.detach() - found.detach().unsqueeze(1)).exp() / passes, 0)  # of a pass in the mean
    others = mask.sum(1, keepdim=True) > mask.long()
    left = torch.where(
        others, ((1 - share).clamp(min=0) * passes / (passes - 1)).log() + found.detach().unsqueeze(1), 0
    )
    return found, left.sum(2)
