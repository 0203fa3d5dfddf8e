"""Likelihood of block diffusion: blocks from left to right, each by masked diffusion given the clean ones before it.

    -log p(x0) = sum_k NLL(block k | blocks before k),

each term the time-free NLL of a block (`time_free`). A model that sees the clean blocks before, as block diffusion
models are trained, answers for all blocks in one pass, each masked in its own way, and so the passes are shared.
(Arriola et al., ICLR 2025.)
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdiff.checks import check_choice, check_integer
from fastdiff.estimators.chains import Passes
from fastdiff.estimators.estimate import NLLEstimate, sum_of_independent
from fastdiff.estimators.pilots import Parts
from fastdiff.estimators.scoring import Scorer, equal_rows
from fastdiff.estimators.time_free import (
    PROPOSALS,
    STORED_LOSSES,
    estimated,
    mean_over,
    of_group,
    plan_passes,
    planned_chains,
    subset,
)
from fastdiff.evaluating import BlockModel
from fastdiff.noise.noising import Masked

_BLOCK_NAME = 2**40  # from one block's draws to those of the next, beyond names that people give


def block_nll(
    model: BlockModel,
    x0: Tensor,
    *,
    mask_index: int,
    block_length: int,
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
    """Unbiased estimate of -log p(x0) of a block diffusion model, in nats, with its standard error.

    The sum over blocks of the time-free NLL of a block given the clean blocks before it. Each network pass masks all
    blocks at once, each with its own count and subset. A block whose 2^n - 1 subsets fit num_samples is enumerated:
    with block_length = 1 one pass gives the autoregressive likelihood. Blocks draw independently, so that their
    variances add up. With block_length = L this is `time_free_nll`.

    Args:
        model: callable (xt [b, L], x0 [b, L]) int64 -> logits [b, L, V], or an object with `.logits`, where position i
            sees xt of its own block and x0 of the blocks before. Or a pair (body, lm_head), as in `time_free_nll`;
            `DiffusionTransformer.block_conditionals` makes one.
        block_length: tokens of a block, of which the first begins at position 0; the last may be shorter.
        num_samples: most network passes to spend on a sequence, all of its blocks together.
        target: [B, L] bool, the positions whose likelihood is meant; those of a block are given the blocks before
            and the block's other positions.
        x0, mask_index, proposal, tolerance, max_samples, lengths: as in `time_free_nll`.
        exclude_mask, batch_size, seed, sample_ids, differentiable, backend: as in `time_free_nll`.

    Raises:
        TypeError, ValueError: as `time_free_nll`; also for a block_length below 1.
    """
    check_choice("proposal", proposal, PROPOSALS)
    block_length = check_integer("block_length", block_length, 1)
    score = _BlockScorer(
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
    most_tokens = _in_blocks(score.target, block_length).sum(2).amax(1)
    estimates = partial(_estimates, score, block_length, num_samples, proposal)
    settings = num_samples, proposal, tolerance, max_samples, seed, sample_ids
    return estimated(estimates, most_tokens, x0, *settings)


class _BlockScorer(Scorer):
    """Losses of a model that is told x0 as well, and sees of it the blocks before a position's own."""

    def __call__(self, which: Tensor, masked: Masked) -> Tensor:
        x0 = self.x0[which, : masked.xt.shape[1]]
        return self.in_one_pass(lambda: self.losses(self.output(masked.xt, x0), which, masked.mask))


def _estimates(
    score: Scorer,
    block_length: int,
    planned: int,
    proposal: str,
    num_samples: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    step: int,
) -> Parts:
    """Sequences of num_samples [B] > 0, those that agree in it, in length and in target tokens by block together."""
    parts, tokens = [], _in_blocks(score.target, block_length).sum(2)
    most = 2 ** tokens.amax(1).clamp(max=62) - 1
    with score.evaluating(int(torch.minimum(num_samples, most).sum())):
        for group in equal_rows(torch.cat([torch.stack([score.lengths, num_samples], 1), tokens], 1)):
            num, length = int(num_samples[group[0]]), int(score.lengths[group[0]])
            for which in group.split(max(1, STORED_LOSSES // (num * length))) if num else ():
                target = _in_blocks(score.targets(which), block_length)
                number = torch.arange(target.shape[1], device=target.device)
                names = sample_ids[which].unsqueeze(1) + _BLOCK_NAME * number
                alike = _plans(target, num, planned, proposal, seed, names, step, score.backend)
                parts.append((which, _of_blocks(score, which, target, alike, proposal)))
    return parts


class _Alike(NamedTuple):
    """Blocks with as many target tokens, by their places in [K, blocks], and their passes."""

    at: tuple[Tensor, ...]
    passes: Passes
    enumerated: bool


def _plans(
    target: Tensor,
    num_samples: int,
    planned: int,
    proposal: str,
    seed: Tensor,
    names: Tensor,
    step: int,
    backend: str | None,
) -> list[_Alike]:
    """Of all blocks of a target [K, blocks, block length] that have some of it."""
    tokens, found = target.sum(2), []
    for n in tokens[tokens > 0].unique().tolist():
        at = (tokens == n).nonzero(as_tuple=True)
        enumerated = 2**n - 1 <= num_samples
        if enumerated:
            passes = _all_subsets(target[at], n)
        else:
            chains = planned_chains(num_samples, planned, n)
            passes = plan_passes(target[at], chains, num_samples, proposal, seed, names[at], step, backend)
        found.append(_Alike(at, passes, enumerated))
    return found


def _all_subsets(target: Tensor, n: int) -> Passes:
    """A pass for each subset of n target tokens, and one value of all of them."""
    mask, weight = subset(target.unsqueeze(1), torch.arange(1, 2**n, device=target.device))
    return Passes(mask, lambda loss: (weight.unsqueeze(2) * loss).sum(1, keepdim=True))


def _of_blocks(score: Scorer, which: Tensor, target: Tensor, alike: list[_Alike], proposal: str) -> NLLEstimate:
    """Of sequences [K], from passes that the blocks of a sequence share."""
    passes, length = max(part.passes.mask.shape[1] for part in alike), int(score.lengths[which[0]])
    mask = target.new_zeros(*target.shape[:2], passes, target.shape[2])
    for part in alike:
        mask[part.at] = pad(part.passes.mask, (0, 0, 0, passes - part.passes.mask.shape[1]))
    loss = score.run(which, mask.transpose(1, 2).flatten(2)[..., :length])
    loss = _in_blocks(loss, target.shape[2]).transpose(1, 2)
    token_nll = torch.zeros_like(target, dtype=torch.float64)
    stderr, freedom = torch.zeros_like(token_nll[..., 0]), torch.full_like(token_nll[..., 0], torch.inf)
    for part in alike:
        found = part.passes.replicates(loss[part.at][:, : part.passes.mask.shape[1]])
        token_nll = token_nll.index_put(part.at, found.mean(1))
        if not part.enumerated:
            _, stderr[part.at], freedom[part.at] = (x.detach() for x in mean_over(found.sum(2), proposal))
    error = sum_of_independent(stderr, freedom)
    return of_group(score, which, token_nll.flatten(1)[:, :length], error, passes)


def _in_blocks(tokens: Tensor, block_length: int) -> Tensor:
    """[..., L] -> [..., blocks, block length], the last filled up with zeros."""
    block_length = min(block_length, tokens.shape[-1])
    return pad(tokens, (0, -tokens.shape[-1] % block_length)).unflatten(-1, (-1, block_length))
