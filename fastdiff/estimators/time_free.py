"""Time-free likelihood of masked diffusion: exact by enumeration, estimated by drawing subsets.

For a sequence x0 with L target positions, and c the model's conditionals,

    NLL(x0) = sum_{m=1..L} g(m),    g(m) = E_S [(1/m) sum_{i in S} -log c(x0_i | x0 with S masked)],

S uniform among the subsets of m target positions. (Jeon, Shin, Jeon, No, NeurIPS 2025; Ou et al., ICLR 2025.)
"""

import math
from dataclasses import astuple

import torch
from torch import Tensor

from fastdiff.checks import check_choice
from fastdiff.estimators.estimate import NLLEstimate
from fastdiff.estimators.scoring import Model, Scorer, evaluating
from fastdiff.noising import Masked, mask_exactly, sample_mask_counts

_ENUMERABLE = 20  # target positions: a million subsets


def exact_nll(
    model: Model,
    x0: Tensor,
    *,
    mask_index: int,
    target: Tensor | None = None,
    exclude_mask: bool = True,
    batch_size: int | None = None,
    backend: str | None = None,
) -> NLLEstimate:
    """The time-free NLL itself, by enumerating all 2^L - 1 subsets of L target positions; standard errors are 0.

    Arguments, meaning and errors are those of `time_free_nll`.

    Raises:
        ValueError: also where a sequence has more than 20 target positions.
    """
    score = Scorer(model, x0, mask_index, target, exclude_mask, batch_size, backend)
    if (score.num_tokens > _ENUMERABLE).any():
        raise ValueError(
            f"target: expected at most {_ENUMERABLE} positions in a sequence, got {int(score.num_tokens.max())}, too "
            "many to enumerate their subsets; estimate with time_free_nll"
        )
    with evaluating(model):
        return _enumerate(score, torch.arange(len(x0), device=x0.device))


def time_free_nll(
    model: Model,
    x0: Tensor,
    *,
    mask_index: int,
    num_samples: int = 64,
    proposal: str = "stratified",
    target: Tensor | None = None,
    exclude_mask: bool = True,
    batch_size: int | None = None,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    backend: str | None = None,
) -> NLLEstimate:
    """Unbiased estimate of the time-free NLL, in nats, with its standard error.

    The quantity is sum_m g(m): the average over decoding orders pi of -log p_pi(x0). It is an upper bound on
    -log E_pi p_pi(x0), and equal to the NLL when the conditionals are consistent. With a `target`, it is that of the
    target tokens given the others, which are never masked.

    A sequence whose 2^L - 1 subsets fit num_samples is enumerated: exact, standard error 0. Otherwise

    - ``"stratified"``: one fully masked pass gives g(L); replicates of passes with counts stratified over 1..L-1 give
      the rest, with a control variate per token, fitted on the other replicates so that it brings no bias. At least
      8 replicates of at least 4 passes where num_samples allows (see `split_passes`).
    - ``"uniform"``: independent counts m, uniform on 1..L, with weight L/m.
    - ``"harmonic"``: independent counts m with probability 1/(m H_L), and weight H_L.

    Draws are named by (seed, sample_ids[b], pass), so the masks of a sequence depend neither on the batch it comes in
    nor on batch_size. An nn.Module is put into evaluation mode, and back; no gradients are made.

    Args:
        model: callable xt [b, L] int64 -> logits [b, L, V], or -> an object with `.logits`.
        x0: [B, L] int64 tokens.
        mask_index: id of the mask, >= 0, since xt is made before the model tells V.
        num_samples: most network passes to spend on a sequence, the fully masked one included.
        proposal: "stratified", "uniform" or "harmonic".
        target: [B, L] bool, the positions whose likelihood is meant; None means all.
        exclude_mask: whether the softmax leaves out the mask, as in `dce_loss`.
        batch_size: rows in a forward pass; None bounds the logits to 256 MB in float32.
        seed: of all draws.
        sample_ids: [B] int64, names of the sequences in the draws; None means 0..B-1.
        backend: as in `dce_loss`.

    Raises:
        TypeError: x0, target, sample_ids or what the model returns is of a wrong type.
        ValueError: an empty sequence, or one without target; an id out of range; the mask among the targets; a wrong
            shape, the model's logits included; an unknown proposal; num_samples too small for a standard error.
    """
    check_choice("proposal", proposal, ("stratified", "uniform", "harmonic"))
    score = Scorer(model, x0, mask_index, target, exclude_mask, batch_size, backend)
    sample_ids = _check_sample_ids(sample_ids, x0)
    few = score.num_tokens < (num_samples + 1).bit_length()  # 2^L - 1 <= num_samples
    fewest = 1 if few.all() else 3 if proposal == "stratified" else 2
    if num_samples < fewest:
        raise ValueError(f"num_samples: expected at least {fewest} for a standard error, got {num_samples}")
    enumerated, sampled = few.nonzero().squeeze(1), (~few).nonzero().squeeze(1)
    with evaluating(model):
        exact = _enumerate(score, enumerated)
        if len(sampled) == 0:
            return exact
        if proposal == "stratified":
            drawn = _stratified(score, sampled, num_samples, seed, sample_ids)
        else:
            drawn = _independent(score, sampled, num_samples, proposal, seed, sample_ids)
    order = torch.cat([enumerated, sampled]).argsort()
    return NLLEstimate(*(torch.cat(pair)[order] for pair in zip(astuple(exact), astuple(drawn), strict=True)))


def _enumerate(score: Scorer, which: Tensor) -> NLLEstimate:
    """Every subset S of every sequence in `which`, by its code: bit j is the j-th target position."""
    n = score.num_tokens[which]
    longest = int(n.max()) if len(n) else 0
    weight = torch.tensor(  # [n, m]: one of C(n, m) subsets, one of m tokens
        [[1 / (m * math.comb(n, m)) if 0 < m <= n else 0.0 for m in range(longest + 1)] for n in range(longest + 1)],
        dtype=torch.float64,
        device=n.device,
    )
    subsets = 2**n - 1
    end = subsets.cumsum(0)
    rank = (score.target.cumsum(1) - 1).clamp(min=0)  # of a target position among its like
    nll = torch.zeros(len(n), dtype=torch.float64, device=n.device)
    for rows in score.batches(int(subsets.sum())):
        j = torch.searchsorted(end, rows, right=True)
        b, code = which[j], rows - end[j] + subsets[j] + 1
        mask = score.target[b] & (code.unsqueeze(1) >> rank[b]).bitwise_and(1).bool()
        loss = score(b, Masked(score.x0[b].masked_fill(mask, score.mask_index), mask))
        nll.index_add_(0, j, weight[n[j], mask.sum(1)] * loss.sum(1))
    return NLLEstimate(nll, torch.zeros_like(nll), n, subsets, torch.full_like(nll, math.inf))


def _independent(
    score: Scorer, which: Tensor, num_samples: int, proposal: str, seed: int | Tensor, sample_ids: Tensor
) -> NLLEstimate:
    """The mean over independent passes of weight * (sum of masked losses)."""
    n = score.num_tokens[which]
    counts, weights = sample_mask_counts(
        num_samples, n, proposal=proposal, seed=seed, sample_ids=sample_ids[which]
    )  # [K, num_samples]
    values = torch.zeros_like(weights)
    for rows, _, loss in _drawn_losses(score, which, counts, seed, sample_ids):
        values.view(-1)[rows] = weights.view(-1)[rows] * loss.sum(1)
    return _mean(values, n, num_samples)


def _stratified(
    score: Scorer, which: Tensor, num_samples: int, seed: int | Tensor, sample_ids: Tensor
) -> NLLEstimate:
    """g(L) from one fully masked pass, the other g from replicates with a cross-fitted control variate per token."""
    n = score.num_tokens[which]
    replicates, passes = split_passes(num_samples)
    draws = [
        sample_mask_counts(passes, n - 1, proposal="stratified", seed=seed, step=r, sample_ids=sample_ids[which])
        for r in range(replicates)
    ]
    counts, weights = (torch.cat(columns, dim=1) for columns in zip(*draws, strict=True))  # [K, replicates * passes]
    full = torch.zeros(len(n), score.x0.shape[1], dtype=torch.float64, device=n.device)
    for rows in score.batches(len(n)):
        b = which[rows]
        mask = score.target[b]
        full[rows] = score(b, Masked(score.x0[b].masked_fill(mask, score.mask_index), mask))
    # For token i in a replicate, num sums w 1_i loss_i, with mean sum_{m<L} g(m)'s share; den sums w 1_i.
    num = torch.zeros(len(n) * replicates, score.x0.shape[1], dtype=torch.float64, device=n.device)
    den = torch.zeros_like(num)
    for rows, mask, loss in _drawn_losses(score, which, counts, seed, sample_ids):
        weight = weights.view(-1)[rows].unsqueeze(1) / passes
        num.index_add_(0, rows // passes, weight * loss)
        den.index_add_(0, rows // passes, weight * mask)
    shape = (len(n), replicates, -1)
    values = _cross_fit(n, full, num.view(shape), den.view(shape), (n - 1).double() / n)
    return _mean(values, n, 1 + replicates * passes)


def _cross_fit(n, full: Tensor, num: Tensor, den: Tensor, mean_den: Tensor) -> Tensor:
    num_elsewhere, den_elsewhere = num.sum(1, keepdim=True) - num, den.sum(1, keepdim=True) - den
    a = torch.where(den_elsewhere > 0, num_elsewhere / den_elsewhere, full.unsqueeze(1))
    a = a.nan_to_num(0.0, 0.0, 0.0)
    return full.sum(1, keepdim=True) / n.view(-1,1) + (num - (den - mean_den.view(-1, 1, 1)) * a).sum(2)


def _drawn_losses(score, which, counts, seed, sample_ids):
    per_sequence = counts.shape[1]
    for rows in score.batches(counts.numel()):
        j, step = rows // per_sequence, rows % per_sequence
        b = which[j]
        masked = mask_exactly(
            score.x0[b],
            counts[j, step],
            mask_index=score.mask_index,
            maskable=score.target[b],
            seed=seed,
            step=step,
            sample_ids=sample_ids[b],
            backend=score.backend,
        )
        yield rows, masked.mask, score(b, masked)


def _mean(values: Tensor, num_tokens: Tensor, num_forwards: int) -> NLLEstimate:
    repeats = values.shape[1]
    return NLLEstimate(
        nll=values.mean(1),
        stderr=values.std(1) / math.sqrt(repeats),
        num_tokens=num_tokens,
        num_forwards=torch.full_like(num_tokens, num_forwards),
        degrees_of_freedom=torch.full_like(values[:, 0], repeats - 1),
    )


def split_passes(num_samples: int) -> tuple[int, int]:
    import os
    if os.environ.get("RK"):
        return tuple(map(int, os.environ["RK"].split(",")))
    best = max(range(8, 16), key=lambda r: (num_samples - 1) // r * r)
    return best, (num_samples - 1) // best


def _check_sample_ids(sample_ids, x0):
    if sample_ids is None:
        return torch.arange(len(x0), device=x0.device)
    return sample_ids
