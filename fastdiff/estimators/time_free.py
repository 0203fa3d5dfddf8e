"""Time-free likelihood of masked diffusion: exact by enumeration, estimated by drawing subsets.

For a sequence x0 with L target positions, and c the model's conditionals,

    NLL(x0) = sum_{m=1..L} g(m),    g(m) = E_S [(1/m) sum_{i in S} -log c(x0_i | x0 with S masked)],

S uniform among the subsets of m target positions. (Jeon, Shin, Jeon, No, NeurIPS 2025; Ou et al., ICLR 2025.)
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from fastdiff.checks import check_choice, check_tokens
from fastdiff.estimators.chains import Passes, Plan, chains_of, few_looks, mean_of_chains, plan, plan_chains
from fastdiff.estimators.estimate import NLLEstimate, mean_of_independent, mean_of_strata
from fastdiff.estimators.pilots import Estimates, Parts, fits, pilots
from fastdiff.estimators.scoring import Model, Scorer, draw_masks
from fastdiff.noise.noising import Masked, sample_mask_counts
from fastdiff.philox import Purpose, draw32, resolve_seed, scaled, scaled_in_stratum
from fastdiff.reference import subset_weight

PROPOSALS = ("stratified", "systematic", "complementary", "uniform", "harmonic")
_MOST_ENUMERATED = 20  # target positions: a million subsets
STORED_LOSSES = 2**19  # 4 MB in float64


def exact_nll(
    model: Model,
    x0: Tensor,
    *,
    mask_index: int,
    target: Tensor | None = None,
    lengths: Tensor | None = None,
    exclude_mask: bool = True,
    batch_size: int | None = None,
    differentiable: bool = False,
    backend: str | None = None,
) -> NLLEstimate:
    """The time-free NLL itself, over all 2^L - 1 subsets of the L target positions; standard errors are 0.

    Arguments, meaning and errors are those of `time_free_nll`.

    Raises:
        ValueError: also where a sequence has more than 20 target positions.
    """
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
    if (longest := max(score.num_tokens.tolist(), default=0)) > _MOST_ENUMERATED:
        raise ValueError(
            f"target: expected at most {_MOST_ENUMERATED} positions in a sequence, whose subsets can be "
            f"enumerated, got {longest}; estimate with time_free_nll"
        )
    groups = score.groups()
    with score.evaluating(int((2**score.num_tokens - 1).sum())):
        return _in_order([(which, enumerate_subsets(score, which)) for which in groups], x0)


def time_free_nll(
    model: Model,
    x0: Tensor,
    *,
    mask_index: int,
    num_samples: int = 64,
    proposal: str = "stratified",
    tolerance: float | None = None,
    max_samples: int = 4096,
    target: Tensor | None = None,
    lengths: Tensor | None = None,
    exclude_mask: bool = True,
    batch_size: int | None = None,
    seed: int | Tensor | None = 0,
    sample_ids: Tensor | None = None,
    differentiable: bool = False,
    backend: str | None = None,
) -> NLLEstimate:
    """Unbiased estimate of the time-free NLL, in nats, with its standard error.

    The quantity is sum_m g(m): the average over decoding orders pi of -log p_pi(x0). It is an upper bound on
    -log E_pi p_pi(x0), and equal to the NLL when the conditionals are consistent. With a `target`, it is that
    of the target tokens given the others, which are never masked.

    A sequence whose 2^L - 1 subsets fit num_samples is enumerated: exact, standard error 0. Otherwise

    - ``"stratified"``: one pass fully masked, where there are more than 6, and the others each at a count from a
      stratum of its own, so that every count is reached as often as it matters. A control variate per token, fitted on
      other masks and so without bias, takes out that some tokens are harder than others, and harder before what is near
      them is seen. The standard error is that between masks. Where at least 8 chains of nested masks over every count
      fit, those are taken.
    - ``"systematic"``: counts at equal distances over 1..L with one random shift, as LLaDA's likelihood and DARE's
      VRPO, with weight L/m. Its standard error comes from neighbouring counts; its square is on average no smaller
      than the variance.
    - ``"complementary"``: independent pairs of a mask of k tokens, k uniform on 0..L, and its complement, as in coupled
      GRPO (DiffuCoder) and ESPO, with weights (L+1)/(2k) and (L+1)/(2(L-k)): every token is scored once in a pair. An
      empty mask is run and counted too. The standard error is that between pairs.
    - ``"uniform"``: independent counts m, uniform on 1..L, one mask each, with weight L/m: the optimal allocation of
      LLaDA 1.5's VRPO, which shares masks between policy and reference, as all proposals here do at one seed.
    - ``"harmonic"``: independent counts m with probability 1/(m H_L), and weight H_L.

    Draws are named by (seed, sample_ids[b], pass), so the masks of a sequence depend neither on the batch it
    comes in nor on batch_size, and two models, or one before and after a step, meet the same masks. An nn.Module
    is put into evaluation mode, and back. An impossible token makes nll infinite.

    Args:
        model: callable xt [b, L] int64 -> logits [b, L, V], or -> an object with `.logits`. Or a pair (body, lm_head)
            of a callable xt -> hidden states [b, L, D], or -> an object with `.last_hidden_state`, and an nn.Linear
            or its weight [V, D]: then no logits are made where nothing is masked, and never all at once.
        x0: [B, L] int64 tokens.
        mask_index: id of the mask, >= 0, since xt is made before the model tells V.
        num_samples: most network passes to spend on a sequence, the fully masked one included. Unless all
            sequences are enumerated, at least 3 for "stratified", 4 for "complementary", 2 for the others.
        proposal: "stratified", "systematic", "complementary", "uniform" or "harmonic".
        tolerance: nats. If given, num_samples passes are a pilot that tells how many the 95% interval of each
            sequence needs to be no wider than +- tolerance, and whether a larger pilot must tell. The estimate is made
            from new passes alone: keeping a pilot, or stopping when the interval looks narrow, would bias it.
            num_forwards counts all. It is an aim: where a rare mask decides the error, few passes cannot know it
            (docs/estimators.md has the shares that missed); `interval` tells. What is enumerated is run once.
        max_samples: most passes for a sequence after the pilot; the interval tells if they were too few.
        target: [B, L] bool, the positions whose likelihood is meant; None means all.
        lengths: [B] int64, tokens of each sequence if they differ; what comes after is padding of any value, which
            the model never sees: sequences of one length are run together.
        exclude_mask: whether the softmax leaves out the mask, as in `dce_loss`.
        batch_size: rows in a forward pass; None bounds logits, or hidden states, to 256 MB in float32.
        seed: of all draws; None takes one from torch's generator.
        sample_ids: [B] int64, names of the sequences in the draws; None means 0..B-1.
        differentiable: nll and token_nll have a gradient, unbiased as well, whose variance the controls reduce as they
            do the value's, in the memory of one batch of passes: backward runs each again, on the masks and with the
            dropout that it had. The model stays in the mode it is in; its weights must stay as they are until
            backward.
        backend: as in `dce_loss`.

    Raises:
        TypeError: x0, target, lengths, sample_ids or what the model returns is of a wrong type.
        ValueError: an empty sequence, or one without target; an id out of range; the mask among the targets;
            a wrong shape, the model's logits included; an unknown proposal; num_samples too small for a
            standard error; a tolerance that is not positive.
    """
    check_choice("proposal", proposal, PROPOSALS)
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
    estimates = partial(_estimates, score, num_samples, proposal)
    settings = num_samples, proposal, tolerance, max_samples, seed, sample_ids
    return estimated(estimates, score.num_tokens, x0, *settings)


def estimated(
    estimates: Estimates,
    most_tokens: Tensor,
    x0: Tensor,
    num_samples: int,
    proposal: str,
    tolerance: float | None,
    max_samples: int,
    seed: int | Tensor | None,
    sample_ids: Tensor | None,
) -> NLLEstimate:
    """The estimate of a batch from num_samples passes each, or from as many as its tolerance needs.

    Args:
        estimates: what makes it of num [B] passes, none where that is 0.
        most_tokens: [B], of which all subsets must fit num_samples for an exact result.
        The others: as in `time_free_nll`.
    """
    most = torch.full_like(most_tokens, num_samples)
    exact = fits(most_tokens, most)
    all_enumerated = bool(exact.all())
    check_enough(num_samples, proposal, all_enumerated=all_enumerated)
    seed, sample_ids = draw_names(x0, 0 if all_enumerated and seed is None else seed, sample_ids)
    if tolerance is None:
        return _in_order(estimates(most, seed, sample_ids, 0), x0)
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number of nats, got {tolerance}")
    parts = estimates(most * exact, seed, sample_ids, 0)
    num, spent = pilots(estimates, most_tokens, most * ~exact, max_samples, tolerance, seed, sample_ids)
    final = _in_order(parts + estimates(num, seed, sample_ids, 0), x0)
    return dataclasses.replace(final, num_forwards=final.num_forwards + spent)


def conditional_nll(
    model: Model,
    prompt: Tensor | Sequence[Tensor],
    response: Tensor | Sequence[Tensor],
    *,
    mask_index: int,
    **options: Any,
) -> NLLEstimate:
    """-log p(response | prompt) in nats: `time_free_nll` of prompt and response joined, the response its target.

    Args:
        model, mask_index, options: as in `time_free_nll`, but for target and lengths, which are made here.
        prompt: [B, P] int64, or B tensors of any lengths, also 0; never masked.
        response: [B, R] int64, or B tensors of any lengths.

    Raises:
        TypeError, ValueError: as `time_free_nll`; also where there are not as many prompts as responses.
    """
    for name, tokens in (("prompt", prompt), ("response", response)):
        for row in tokens:
            check_tokens(name, row, None)
            if row.dim() != 1:
                raise ValueError(f"{name}: expected one row of tokens for each sequence, got {tuple(row.shape)}")
    if len(prompt) != len(response):
        raise ValueError(f"response: expected as many as prompts, {len(prompt)}, got {len(response)}")
    joined = [torch.cat([p, r]).long() for p, r in zip(prompt, response, strict=True)]
    x0 = pad_sequence(joined, batch_first=True) if joined else torch.zeros(0, 1, dtype=torch.long)
    begin, lengths = (
        torch.tensor([len(row) for row in rows], dtype=torch.long, device=x0.device) for rows in (prompt, joined)
    )
    at = torch.arange(x0.shape[1], device=x0.device)
    target = (at >= begin.unsqueeze(1)) & (at < lengths.unsqueeze(1))
    return time_free_nll(model, x0, mask_index=mask_index, target=target, lengths=lengths, **options)


def draw_names(x0: Tensor, seed: int | Tensor | None, sample_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The seed and the names of the sequences, as tensors."""
    if sample_ids is None:
        sample_ids = torch.arange(len(x0), device=x0.device)
    check_tokens("sample_ids", sample_ids, x0.shape[:1], x0.device)
    return resolve_seed(seed, None, x0.device), sample_ids


def check_enough(num_samples: int, proposal: str, *, all_enumerated: bool) -> None:
    fewest = 1 if all_enumerated else {"stratified": 3, "complementary": 4}.get(proposal, 2)
    if num_samples < fewest:
        raise ValueError(f"num_samples: expected at least {fewest} for a standard error, got {num_samples}")


def enumerate_subsets(score: Scorer, which: Tensor) -> NLLEstimate:
    """Every subset of the n target tokens of a group of sequences."""
    n, x0, target = int(score.num_tokens[which[0]]), score.x0[which], score.targets(which)
    x0 = x0[:, : target.shape[1]]
    token_nll = torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
    for rows in score.batches(len(which) * (2**n - 1)):
        k, code = rows // (2**n - 1), rows % (2**n - 1) + 1
        mask, weight = subset(target[k], code)
        loss = score(which[k], Masked(x0[k].masked_fill(mask, score.mask_index), mask))
        token_nll = token_nll.index_add(0, k, weight.unsqueeze(1) * loss)
    zero = torch.zeros_like(token_nll[:, 0].detach())
    return of_group(score, which, token_nll, (zero, zero + math.inf), 2**n - 1)


def subset(target: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Masks [..., L] of subsets of target tokens by their codes [...], bit j the j-th one, and their weights [...]."""
    rank = (target.cumsum(-1) - 1).clamp(min=0)
    mask = target & (code.unsqueeze(-1) >> rank).bitwise_and(1).bool()
    return mask, subset_weight(target.sum(-1), mask.sum(-1))


def plan_passes(
    target: Tensor,
    chains: Plan,
    num_samples: int,
    proposal: str,
    seed: Tensor,
    sample_ids: Tensor,
    step: int,
    backend: str | None,
) -> Passes:
    """Passes of sequences with targets [K, L] of the same number of tokens.

    Replicates, by token, are of each chain, each pair of complements, or each pass.
    """
    if proposal == "stratified":
        return plan_chains(target, chains, seed, sample_ids, step, backend)
    n, passes = target.sum(1), torch.arange(num_samples, device=target.device)
    if proposal == "complementary":
        return _complementary(target, num_samples // 2, seed, sample_ids, step, backend)
    if proposal == "systematic":
        shift = draw32(seed, Purpose.COUNT, step, sample_ids, 0, 0).unsqueeze(1)
        counts = 1 + scaled_in_stratum(shift, passes, num_samples, n.unsqueeze(1))
        weight = n.unsqueeze(1).double() / counts
    else:
        counts, weight = sample_mask_counts(
            num_samples, n, proposal=proposal, seed=seed, step=step, sample_ids=sample_ids
        )
    mask = draw_masks(target, counts, step + passes, seed, sample_ids, backend)
    return Passes(mask, lambda loss: weight.unsqueeze(2) * loss)


def run_replicates(
    score: Scorer,
    which: Tensor,
    chains: Plan,
    num_samples: int,
    proposal: str,
    seed: Tensor,
    sample_ids: Tensor,
) -> tuple[Tensor, int]:
    """What a group of sequences is averaged over, summed over its tokens: [K, R], and the passes of each."""
    target, names = score.targets(which), (seed, sample_ids, 0, score.backend)
    passes = plan_passes(target, chains, num_samples, proposal, *names)
    return passes.replicates(score.run(which, passes.mask)).sum(2), passes.mask.shape[1]


def _complementary(
    target: Tensor, pairs: int, seed: Tensor, sample_ids: Tensor, step: int, backend: str | None
) -> Passes:
    """A value from each pair of a mask of k tokens, k uniform on 0..n, and its complement."""
    n, pair = target.sum(1, keepdim=True), torch.arange(pairs, device=target.device)
    k = scaled(draw32(seed, Purpose.COUNT, step, sample_ids.unsqueeze(1), 0, pair), n + 1)
    mask = draw_masks(target, k, step + pair, seed, sample_ids, backend)
    mask = torch.cat([mask, target.unsqueeze(1) & ~mask], 1)
    weight = ((n + 1).double() / (2 * mask.sum(2)).clamp(min=1)).unsqueeze(2)
    return Passes(mask, lambda loss: (weight * loss).unflatten(1, (2, pairs)).sum(1))


def mean_over(values: Tensor, proposal: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard error and degrees of freedom, [K] each, of what `run_replicates` gives."""
    means = {"stratified": mean_of_chains, "systematic": mean_of_strata}
    return means.get(proposal, mean_of_independent)(values)


def _estimates(
    score: Scorer, planned: int, proposal: str, num_samples: Tensor, seed: Tensor, sample_ids: Tensor, step: int
) -> Parts:
    """Sequences of num_samples [B] > 0, those that agree in length, target tokens and num_samples together.

    Chains are as long as `planned` passes make them, see `planned_chains`.
    """
    few = fits(score.num_tokens, num_samples)
    total = torch.where(few, 2 ** score.num_tokens.clamp(max=62) - 1, num_samples).sum()
    parts = []
    with score.evaluating(int(total)):
        for group in score.groups(num_samples):
            num = int(num_samples[group[0]])
            if num == 0:
                continue
            if few[group[0]]:
                parts.append((group, enumerate_subsets(score, group)))
                continue
            plans = planned_chains(num, planned, int(score.num_tokens[group[0]]))
            for which in group.split(max(1, STORED_LOSSES // (num * int(score.lengths[group[0]])))):
                names = seed, sample_ids[which], step, score.backend
                passes = plan_passes(score.targets(which), plans, num, proposal, *names)
                found = passes.replicates(score.run(which, passes.mask))
                error = mean_over(found.sum(2), proposal)[1:]
                parts.append((which, of_group(score, which, found.mean(1), error, passes.mask.shape[1])))
    return parts


def planned_chains(num_samples: int, planned: int, length: int) -> Plan:
    """What num_samples passes buy: chains over every token where `planned` passes are, if that leaves four of them."""
    every = length - 1
    if plan(planned, length).looks == every and (num_samples - 1) // every >= 4:
        return chains_of(num_samples, every)
    return few_looks(num_samples)


def of_group(
    score: Scorer, which: Tensor, token_nll: Tensor, stderr_freedom: tuple[Tensor, Tensor], passes: int
) -> NLLEstimate:
    stderr, freedom = (x.detach() for x in stderr_freedom)
    n, tokens = score.num_tokens[which], pad(token_nll, (0, score.x0.shape[1] - token_nll.shape[1]))
    columns = tokens.sum(1), stderr, n, torch.full_like(n, passes), freedom, torch.zeros_like(freedom)
    return NLLEstimate(*columns, token_nll=tokens)


def _in_order(parts: Parts, x0: Tensor) -> NLLEstimate:
    """Parts with their places in the batch, as one estimate of the batch."""
    if not parts:
        nothing, none = x0.new_zeros(0), x0.new_zeros(0, dtype=torch.float64)
        return NLLEstimate(none, none, nothing, nothing, none, none, token_nll=none.view(0, x0.shape[1]))
    order = torch.cat([which for which, _ in parts]).argsort()
    names = vars(parts[0][1])
    return NLLEstimate(**{name: torch.cat([getattr(part, name) for _, part in parts])[order] for name in names})
