"""Likelihood ratios from shared masks: what two sequences have in common then cancels, draw by draw."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdiff.checks import check_choice, check_tokens
from fastdiff.estimators.chains import allowance, plan
from fastdiff.estimators.estimate import LogRatioEstimate
from fastdiff.estimators.pilots import fits
from fastdiff.estimators.scoring import Model, Scorer, equal_rows
from fastdiff.estimators.time_free import (
    PROPOSALS,
    check_enough,
    draw_names,
    enumerate_subsets,
    mean_over,
    run_replicates,
)


def log_likelihood_ratio(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    mask_index: int,
    num_samples: int = 64,
    proposal: str = "stratified",
    restrict: bool = False,
    target: Tensor | tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | tuple[Tensor, Tensor] | None = None,
    exclude_mask: bool = True,
    batch_size: int | None = None,
    seed: int | Tensor | None = 0,
    sample_ids: Tensor | None = None,
    differentiable: bool = False,
    backend: str | None = None,
    reference: Model | None = None,
) -> LogRatioEstimate:
    """Unbiased estimate of log p(x) - log p(y) in nats, as the difference of two time-free NLLs on shared masks.

    Counts and masks of x and y come from the same draws (coupled). Where both have one length and target they are the
    same masks; where not, they agree as far as the shorter one goes. (Jeon, Shin, Jeon, No, NeurIPS 2025.)

    With restrict=True only the positions D where x and y differ are masked: log p(x_D | rest) - log p(y_D | rest), of
    far lower variance. That is the same ratio if the conditionals are consistent; a network's are not quite, and then
    it averages only over orders that reveal everything outside D first.

    With a reference model, the margin [log p(x) - log p(y)] - [log p_ref(x) - log p_ref(y)], on the same masks: a
    replicate is the difference of four likelihoods, and stderr that of the margin (VRPO: Zhu et al., LLaDA 1.5, 2025).

    Args:
        model, proposal, exclude_mask, batch_size, seed, sample_ids, differentiable, backend: as in `time_free_nll`.
        x: [B, L] int64 tokens.
        y: [B, M] int64 tokens.
        mask_index: id of the mask.
        num_samples: most network passes to spend on each sequence of a pair.
        restrict: mask only where x and y differ; needs x and y of one shape. Equal sequences give 0.
        target: positions whose likelihood is meant, as in `time_free_nll`: for both, or a pair (of x, of y).
        lengths: [B] int64, tokens of each sequence if they differ, likewise.
        reference: in one of the forms of model, with the same ids. It has no gradient, and a module is put into
            evaluation mode meanwhile.

    Returns:
        What the masks give; if differentiable, log_ratio and variance have a gradient.

    Raises:
        TypeError, ValueError: as `time_free_nll`; also where x and y do not pair up.
    """
    check_choice("proposal", proposal, PROPOSALS)
    for name, tokens in (("x", x), ("y", y)):
        check_tokens(name, tokens, None)
        if tokens.dim() != 2:
            raise ValueError(f"{name}: expected shape [B, L], got {tuple(tokens.shape)}")
    if len(x) != len(y):
        raise ValueError(f"y: expected as many sequences as x, {len(x)}, got {len(y)}")
    inside = [_inside(tokens, length) for tokens, length in zip((x, y), _pair(lengths), strict=True)]
    targets = [where if part is None else part for where, part in zip(inside, _pair(target), strict=True)]
    seed, sample_ids = draw_names(x, seed, sample_ids)
    pairs = torch.arange(len(x), device=x.device)
    if restrict:
        if x.shape != y.shape or not torch.equal(*inside):
            raise ValueError(
                f"restrict: expected x and y of the same lengths, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        targets = [part & (x != y) for part in targets]
        pairs = targets[0].any(1).nonzero().squeeze(1)
    given: dict[str, Any] = dict(
        x0=_stacked((x, y), pairs),
        mask_index=mask_index,
        target=_stacked(targets, pairs),
        lengths=torch.cat([where.sum(1)[pairs] for where in inside]),
        exclude_mask=exclude_mask,
        batch_size=batch_size,
        backend=backend,
    )
    score = Scorer(model, **given, differentiable=differentiable)
    most = torch.full_like(score.num_tokens, num_samples)
    check_enough(num_samples, proposal, all_enumerated=bool(fits(score.num_tokens, most).all()))
    draws = num_samples, proposal, seed, sample_ids[pairs]
    found = _differences(score, *draws)
    if reference is not None:
        others = _differences(Scorer(reference, **given), *draws)
        found = [part.less(other) for part, other in zip(found, others, strict=True)]
    zero = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    columns = [zero, zero, torch.zeros_like(sample_ids), zero + math.inf, zero]
    for part in found:
        columns = [c.index_copy(0, pairs[part.which], p) for c, p in zip(columns, part.mean(proposal), strict=True)]
    return LogRatioEstimate(*columns)


class _Difference(NamedTuple):
    """log p(x) - log p(y) of some pairs [K], replicate by replicate [K, R], and what each pair cost.

    There is one replicate, exact, where all subsets were enumerated.
    """

    which: Tensor
    replicates: Tensor
    passes: int
    exact: bool

    def less(self, other: "_Difference") -> "_Difference":
        return self._replace(replicates=self.replicates - other.replicates, passes=self.passes + other.passes)

    def mean(self, proposal: str) -> tuple[Tensor, ...]:
        """Columns of LogRatioEstimate."""
        forwards = torch.full_like(self.which, self.passes)
        if self.exact:
            zero = torch.zeros_like(self.which, dtype=torch.float64)
            return self.replicates.flatten(), zero, forwards, zero + math.inf, zero
        mean, stderr, freedom = mean_over(self.replicates, proposal)
        allowed = allowance(self.replicates.shape[1]) if proposal == "stratified" else 1.0
        return mean, stderr.detach(), forwards, freedom.detach(), stderr**2 / allowed


def _differences(score: Scorer, num_samples: int, proposal: str, seed: Tensor, sample_ids: Tensor) -> list[_Difference]:
    """Of all pairs, those that agree in all lengths together: x is sequence k, y is B + k."""
    with score.evaluating(num_samples * len(score.x0)):
        return [
            _difference(score, which, num_samples, proposal, seed, sample_ids[which]) for which in _pair_groups(score)
        ]


def _difference(
    score: Scorer, which: Tensor, num_samples: int, proposal: str, seed: Tensor, sample_ids: Tensor
) -> _Difference:
    rows = which, which + len(score.x0) // 2
    sizes = [int(score.num_tokens[row[0]]) for row in rows]
    enumerated = [2**n - 1 <= num_samples for n in sizes]
    chains = plan(num_samples, max((n for n, few in zip(sizes, enumerated, strict=True) if not few), default=2))
    sides, passes = [], 0
    for row, n, few in zip(rows, sizes, enumerated, strict=True):
        if few:
            sides.append(enumerate_subsets(score, row).nll.unsqueeze(1))
            passes += 2**n - 1
        else:
            replicates, spent = run_replicates(score, row, chains, num_samples, proposal, seed, sample_ids)
            sides.append(replicates)
            passes += spent
    x, y = sides
    return _Difference(which, y - x, passes, all(enumerated))


def _pair_groups(score: Scorer) -> list[Tensor]:
    """Pairs whose x agree in length and target tokens, and whose y do."""
    sizes = torch.stack([score.lengths, score.num_tokens], 1)
    return equal_rows(torch.cat(sizes.chunk(2), 1))


def _pair(given: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    return given if isinstance(given, tuple) else (given, given)


def _inside(tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """Which positions are inside the lengths."""
    at = torch.arange(tokens.shape[1], device=tokens.device)
    return (at < (tokens.shape[1] if lengths is None else lengths.unsqueeze(1))).expand(tokens.shape)


def _stacked(both: Sequence[Tensor], pairs: Tensor) -> Tensor:
    """Two [B, .] one above the other, those pairs only, padded to one length."""
    longest = max(part.shape[1] for part in both)
    return torch.cat([pad(part[pairs], (0, longest - part.shape[1])) for part in both])
