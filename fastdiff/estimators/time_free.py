"""Time-free likelihood of masked diffusion: exact by enumeration, estimated by drawing subsets.

For a sequence x0 with L target positions, and c the model's conditionals,

    NLL(x0) = sum_{m=1..L} g(m),    g(m) = E_S [(1/m) sum_{i in S} -log c(x0_i | x0 with S masked)],

S uniform among the subsets of m target positions. (Jeon, Shin, Jeon, No, NeurIPS 2025; Ou et al., ICLR 2025.)
"""

import math

import torch
from torch import Tensor

from fastdiff.checks import check_choice, check_tokens
from fastdiff.estimators.estimate import NLLEstimate
from fastdiff.estimators.scoring import Model, Scorer, evaluating
from fastdiff.noising import Masked, mask_exactly, resolve_seed, sample_mask_counts
from fastdiff.philox import Purpose, uniform
from fastdiff.reference import subset_weight

_MOST_ENUMERATED = 20  # target positions: a million subsets
_STORED_LOSSES = 2**22  # 32 MB in float64


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
    """The time-free NLL itself, over all 2^L - 1 subsets of the L target positions; standard errors are 0.

    Arguments, meaning and errors are those of `time_free_nll`.

    Raises:
        ValueError: also where a sequence has more than 20 target positions.
    """
    score = Scorer(model, x0, mask_index, target, exclude_mask, batch_size, backend)
    if (longest := max(score.num_tokens.tolist(), default=0)) > _MOST_ENUMERATED:
        raise ValueError(
            f"target: expected at most {_MOST_ENUMERATED} positions in a sequence, whose subsets can be "
            f"enumerated, got {longest}; estimate with time_free_nll"
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
    seed: int | Tensor | None = 0,
    sample_ids: Tensor | None = None,
    backend: str | None = None,
) -> NLLEstimate:
    """Unbiased estimate of the time-free NLL, in nats, with its standard error.

    The quantity is sum_m g(m): the average over decoding orders pi of -log p_pi(x0). It is an upper bound on
    -log E_pi p_pi(x0), and equal to the NLL when the conditionals are consistent. With a `target`, it is that
    of the target tokens given the others, which are never masked.

    A sequence whose 2^L - 1 subsets fit num_samples is enumerated: exact, standard error 0. Otherwise

    - ``"stratified"``: one fully masked pass gives g(L). The rest of num_samples, in pairs, is spent on one
      count from each of as many strata of 1..L-1, narrower where few tokens are masked or few are seen. A
      control variate per token, fitted on the other passes and so without bias, takes out that some tokens
      are harder than others. The standard error comes from pairs of neighbouring strata; its square is on
      average no smaller than the variance. With some 30 passes or fewer, and losses that depend mostly on
      which first few tokens are seen, 95% intervals hold the truth less often than that.
    - ``"uniform"``: independent counts m, uniform on 1..L, with weight L/m.
    - ``"harmonic"``: independent counts m with probability 1/(m H_L), and weight H_L.

    Draws are named by (seed, sample_ids[b], pass), so the masks of a sequence depend neither on the batch it
    comes in nor on batch_size. An nn.Module is put into evaluation mode, and back; no gradients are made.

    Args:
        model: callable xt [b, L] int64 -> logits [b, L, V], or -> an object with `.logits`. Or a pair (body, lm_head)
            of a callable xt -> hidden states [b, L, D], or -> an object with `.last_hidden_state`, and an nn.Linear
            or its weight [V, D]: then no logits are made where nothing is masked, and never all at once.
        x0: [B, L] int64 tokens.
        mask_index: id of the mask, >= 0, since xt is made before the model tells V.
        num_samples: most network passes to spend on a sequence, the fully masked one included. Unless all
            sequences are enumerated, at least 3 for "stratified" and 2 for the others.
        proposal: "stratified", "uniform" or "harmonic".
        target: [B, L] bool, the positions whose likelihood is meant; None means all.
        exclude_mask: whether the softmax leaves out the mask, as in `dce_loss`.
        batch_size: rows in a forward pass; None bounds logits, or hidden states, to 256 MB in float32.
        seed: of all draws; None takes one from torch's generator.
        sample_ids: [B] int64, names of the sequences in the draws; None means 0..B-1.
        backend: as in `dce_loss`.

    Raises:
        TypeError: x0, target, sample_ids or what the model returns is of a wrong type.
        ValueError: an empty sequence, or one without target; an id out of range; the mask among the targets;
            a wrong shape, the model's logits included; an unknown proposal; num_samples too small for a
            standard error.
    """
    check_choice("proposal", proposal, ("stratified", "uniform", "harmonic"))
    score = Scorer(model, x0, mask_index, target, exclude_mask, batch_size, backend)
    if sample_ids is None:
        sample_ids = torch.arange(len(x0), device=x0.device)
    check_tokens("sample_ids", sample_ids, x0.shape[:1], x0.device)
    seed = resolve_seed(seed, None, x0.device)
    few = score.num_tokens < (num_samples + 1).bit_length()  # 2^L - 1 <= num_samples
    fewest = 1 if few.all() else 3 if proposal == "stratified" else 2
    if num_samples < fewest:
        raise ValueError(f"num_samples: expected at least {fewest} for a standard error, got {num_samples}")
    enumerated, sampled = few.nonzero().squeeze(1), (~few).nonzero().squeeze(1)
    with evaluating(model):
        parts = [_enumerate(score, enumerated)]
        for which in sampled.split(max(1, _STORED_LOSSES // (num_samples * x0.shape[1]))):
            if len(which) == 0:
                continue
            if proposal == "stratified":
                parts.append(_stratified(score, which, num_samples, seed, sample_ids[which]))
            else:
                parts.append(_independent(score, which, num_samples, proposal, seed, sample_ids[which]))
    order = torch.cat([enumerated, sampled]).argsort()
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return NLLEstimate(*(torch.cat(column)[order] for column in columns))


def _enumerate(score: Scorer, which: Tensor) -> NLLEstimate:
    """Every subset of every sequence in `which` [K], by its code: bit j is the j-th target position."""
    n = score.num_tokens[which]
    subsets = 2**n - 1
    end = subsets.cumsum(0)  # the rows of sequence k are end[k] - subsets[k] .. end[k] - 1
    rank = (score.target.cumsum(1) - 1).clamp(min=0)
    nll = torch.zeros(len(n), dtype=torch.float64, device=n.device)
    for rows in score.batches(int(subsets.sum())):
        k = torch.searchsorted(end, rows, right=True)
        code = rows - end[k] + subsets[k] + 1
        mask = score.target[which[k]] & (code.unsqueeze(1) >> rank[which[k]]).bitwise_and(1).bool()
        loss = score(which[k], Masked(score.x0[which[k]].masked_fill(mask, score.mask_index), mask))
        nll.index_add_(0, k, subset_weight(n[k], mask.sum(1)) * loss.sum(1))
    return NLLEstimate(nll, torch.zeros_like(nll), n, subsets, torch.full_like(nll, math.inf))


def _independent(
    score: Scorer, which: Tensor, num_samples: int, proposal: str, seed: Tensor, sample_ids: Tensor
) -> NLLEstimate:
    """The mean of independent values, weight times summed loss, of the sequences `which` [K]."""
    n = score.num_tokens[which]
    counts, weight = sample_mask_counts(num_samples, n, proposal=proposal, seed=seed, sample_ids=sample_ids)
    loss, _ = _draw(score, which, counts, seed, sample_ids)
    value = weight * loss.sum(2)
    return NLLEstimate(
        nll=value.mean(1),
        stderr=value.std(1) / math.sqrt(num_samples),
        num_tokens=n,
        num_forwards=torch.full_like(n, num_samples),
        degrees_of_freedom=torch.full_like(value[:, 0], num_samples - 1),
    )


def _stratified(score: Scorer, which: Tensor, num_samples: int, seed: Tensor, sample_ids: Tensor) -> NLLEstimate:
    """g(L) from the fully masked pass, sum_{m<L} g(m) = sum_s width_s E[g(m_s)] from a pass per stratum s.

    Whatever its count, E[width_s 1{i in S} / m_s] = width_s / L for each token i. So subtracting
    (width_s 1{i in S} / m_s - width_s / L) a_i changes no expectation while a_i comes from other passes.
    """
    n, pairs = score.num_tokens[which], (num_samples - 1) // 2
    strata = {length: _strata(length, pairs) for length in set(n.tolist())}
    edges = torch.stack([strata[length] for length in n.tolist()]).to(n.device)  # [K, 2 pairs + 1]
    width = edges.diff()
    stratum = torch.arange(2 * pairs, device=n.device)
    u = uniform(seed, Purpose.COUNT, 0, sample_ids.unsqueeze(1), 0, stratum)
    counts = 1 + (edges[:, :-1] + width * u).long().minimum(n.unsqueeze(1) - 2)
    loss, mask = _draw(score, which, torch.cat([n.unsqueeze(1), counts], 1), seed, sample_ids)
    full, loss, mask = loss[:, :1], loss[:, 1:], mask[:, 1:]  # [K, 1, L], [K, 2 pairs, L]
    width, weight = width.unsqueeze(2), (width / counts).unsqueeze(2)
    num, den = weight * loss, weight * mask
    num_elsewhere, den_elsewhere = num.sum(1, keepdim=True) - num, den.sum(1, keepdim=True) - den
    a = torch.where(den_elsewhere > 0, num_elsewhere / den_elsewhere, full)
    a = a.nan_to_num(0.0, 0.0, 0.0)  # an infinite loss makes the estimate infinite, not NaN
    value = (num - (den - width / n.view(-1, 1, 1)) * a).sum(2)
    square = (value[:, 0::2] - value[:, 1::2]) ** 2
    variance = square.sum(1)
    freedom = (3 * variance**2 / (square**2).sum(1) - 2).clamp(1, pairs)  # Satterthwaite, squares of normals
    return NLLEstimate(
        nll=full.sum((1, 2)) / n + value.sum(1),
        stderr=variance.sqrt(),
        num_tokens=n,
        num_forwards=torch.full_like(n, 1 + 2 * pairs),
        degrees_of_freedom=torch.where(variance == 0, math.inf, freedom),
    )


def _strata(length: int, pairs: int) -> Tensor:
    """Edges [2 pairs + 1] that cut [0, length - 1] into pairs of equal strata; count m is [m - 1, m).

    Losses of few masked tokens vary most, like 1/m, and g bends most where few tokens are seen. So strata are
    spread by sqrt(x), by log(1 - x / length) and by x itself, a third each.
    """
    x = torch.arange(length, dtype=torch.float64)
    part = x / (length - 1)
    share = (part + part.sqrt() - torch.log1p(-x / length) / math.log(length)) / 3
    quantile = torch.linspace(0, 1, pairs + 1, dtype=torch.float64)
    j = torch.searchsorted(share, quantile).clamp(1, length - 1)
    edges = x[j - 1] + (quantile - share[j - 1]) / (share[j] - share[j - 1])
    return torch.cat([torch.stack([edges[:-1], (edges[:-1] + edges[1:]) / 2], 1).flatten(), edges[-1:]])


def _draw(score: Scorer, which: Tensor, counts: Tensor, seed: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and masks [K, passes, L] of the sequences `which` [K] with counts [K, passes] masked."""
    passes, length = counts.shape[1], score.x0.shape[1]
    loss = torch.empty(counts.numel(), length, dtype=torch.float64, device=counts.device)
    mask = torch.empty_like(loss, dtype=torch.bool)
    for rows in score.batches(counts.numel()):
        k, step = rows // passes, rows % passes
        masked = mask_exactly(
            score.x0[which[k]],
            counts[k, step],
            mask_index=score.mask_index,
            maskable=score.target[which[k]],
            seed=seed,
            step=step,
            sample_ids=sample_ids[k],
            backend=score.backend,
        )
        loss[rows], mask[rows] = score(which[k], masked), masked.mask
    return loss.view(-1, passes, length), mask.view(-1, passes, length)
