"""The mean NLL of a corpus, with the error of random masks and that of sampling its texts apart."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_choice
from fastdiff.estimators.chains import allowance, plan
from fastdiff.estimators.estimate import NLLEstimate, student_t
from fastdiff.estimators.scoring import Model, Scorer
from fastdiff.estimators.time_free import PROPOSALS, draw_names, time_free_nll

_ASKED = 32  # sequences of a pilot
STAGE = 40  # the bit of a seed from which on pilots differ from each other and from what comes after


@dataclass(frozen=True, eq=False)
class CorpusEstimate:
    """Mean NLL of N sequences in nats per token, all nats over all tokens, with two errors.

    Attributes:
        nll: [] float64, nats per token: a long sequence counts for more than a short one.
        masking_stderr: [] float64, what random masks leave open of the mean of these very sequences.
        stderr: [] float64, of the mean of what these sequences were drawn from, as their estimates spread: masks and
            texts together. NaN of one sequence.
        degrees_of_freedom: [] float64, those of masking_stderr; of stderr they are N - 1.
        num_tokens: [] int64.
        num_forwards: [] int64, network passes, those of pilots included.
        sequences: of each sequence; `sequences.nll.mean()` is the mean per sequence.
    """

    nll: Tensor
    masking_stderr: Tensor
    stderr: Tensor
    degrees_of_freedom: Tensor
    num_tokens: Tensor
    num_forwards: Tensor
    sequences: NLLEstimate

    @property
    def sampling_stderr(self) -> Tensor:
        """What other texts would change if none were masked at random: the root of stderr² - masking_stderr², or 0."""
        return (self.stderr**2 - self.masking_stderr**2).clamp(min=0).sqrt()

    @property
    def bits_per_token(self) -> Tensor:
        """nll / log 2."""
        return self.nll / math.log(2)

    @property
    def perplexity(self) -> Tensor:
        """exp(nll), per token."""
        return torch.exp(self.nll)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds (low, high) that hold the mean of these sequences with probability `level` (Student's t).

        Raises:
            ValueError: level outside (0, 1).
        """
        half = student_t(level, self.degrees_of_freedom) * self.masking_stderr
        return self.nll - half, self.nll + half

    def population_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Likewise, of the mean of what these sequences were drawn from, each independently of the others.

        Raises:
            ValueError: level outside (0, 1).
        """
        freedom = torch.full_like(self.stderr, max(1, len(self.sequences.nll) - 1))
        half = student_t(level, freedom) * self.stderr
        return self.nll - half, self.nll + half


def corpus_nll(
    model: Model,
    x0: Tensor,
    *,
    mask_index: int,
    num_samples: int = 16,
    proposal: str = "stratified",
    tolerance: float | None = None,
    max_samples: int = 4096,
    target: Tensor | None = None,
    lengths: Tensor | None = None,
    seed: int | Tensor | None = 0,
    sample_ids: Tensor | None = None,
    **options: Any,
) -> CorpusEstimate:
    """Unbiased estimate of the mean time-free NLL of N sequences, in nats per token, with its two errors.

    All sequences get the same number of passes. Texts differ by more than 8 or 16 passes err, so that for what they
    stand for more texts tell more than more passes.

    Args:
        x0: [N, L] int64 tokens.
        num_samples: network passes for a sequence, as in `time_free_nll`.
        tolerance: nats per token. If given, up to 32 sequences, evenly spread, tell how many passes make the 95%
            interval of these sequences' mean, that of masking alone, no wider than +- tolerance: num_samples, 1.5 times
            as many, and so on. The estimate is made from new passes alone, so that it knows nothing of what pilots
            found. It is an aim, as in `time_free_nll`.
        max_samples: most passes for a sequence to try.
        model, mask_index, proposal, target, lengths, seed, sample_ids: as in `time_free_nll`.
        options: exclude_mask, batch_size, backend of `time_free_nll`.

    Raises:
        TypeError, ValueError: as `time_free_nll`; also where there is no sequence.
    """
    check_choice("proposal", proposal, PROPOSALS)
    score = Scorer(model, x0, mask_index, target=target, lengths=lengths)
    if len(x0) == 0:
        raise ValueError("x0: expected at least one sequence, got none")
    seed, sample_ids = draw_names(x0, seed, sample_ids)
    rows: dict[str, Any] = dict(x0=x0, target=score.target, lengths=score.lengths, sample_ids=sample_ids)

    def ask(which: Tensor, num: int, seed: Tensor) -> NLLEstimate:
        names: dict[str, Any] = dict(mask_index=mask_index, num_samples=num, proposal=proposal, seed=seed)
        return time_free_nll(model, **{name: row[which] for name, row in rows.items()}, **names, **options)

    spent = 0
    if tolerance is not None:
        num_samples, spent = enough(
            lambda which, num, stage: _in_sums(ask(which.to(x0.device), num, seed ^ (stage << STAGE)), proposal),
            len(x0),
            num_samples,
            max_samples,
            tolerance,
        )
    found = ask(torch.arange(len(x0), device=x0.device), num_samples, seed)
    whole = _in_sums(found, proposal).pooled()
    return CorpusEstimate(
        nll=(whole.nll / whole.num_tokens).squeeze(),
        masking_stderr=(whole.stderr / whole.num_tokens).squeeze(),
        stderr=stderr_of_ratio(found.nll.detach(), found.num_tokens),
        degrees_of_freedom=whole.degrees_of_freedom.squeeze(),
        num_tokens=whole.num_tokens.squeeze(),
        num_forwards=whole.num_forwards.squeeze() + spent,
        sequences=found,
    )


def enough(
    pilot: Callable[[Tensor, int, int], NLLEstimate],
    num_sequences: int,
    num_samples: int,
    max_samples: int,
    tolerance: float,
) -> tuple[int, int]:
    """Passes of each of N sequences after which the 95% interval of their mean is hardly ever wider than +- tolerance
    nats per token, and passes that pilots spent.

    Args:
        pilot: estimates of some of the sequences, by their numbers [n], from so many passes each, with draws of the
            stage 1, 2, ...
        num_samples, max_samples: the first and the most passes to try.

    Raises:
        ValueError: a tolerance that is not positive.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number of nats, got {tolerance}")
    asked = min(num_sequences, _ASKED)
    which = torch.arange(asked, device="cpu") * num_sequences // asked
    num, spent, stage = num_samples, 0, 1
    while True:
        found = pilot(which, num, stage)
        spent += int(found.num_forwards.sum())
        if num >= max_samples or _half_width(found, num_sequences) <= tolerance:
            return num, spent
        num, stage = min(num + (num + 1) // 2, max_samples), stage + 1


def _half_width(found: NLLEstimate, num_sequences: int) -> float:
    """Of the 95% interval of the mean of N sequences, in nats per token, by some of them."""
    variance = found.stderr.nan_to_num(0.0) ** 2  # an infinite nll has none
    # What other sequences, and these sequences' errors of errors, may raise it to.
    most = variance.mean() + 2 * variance.std(correction=0) / math.sqrt(len(variance))
    t = student_t(0.95, found.pooled().degrees_of_freedom.nan_to_num(1.0))
    return (t * (most / num_sequences).sqrt() / found.num_tokens.double().mean()).item()


def stderr_of_ratio(nll: Tensor, sizes: Tensor) -> Tensor:
    """Standard error of sum nll / sum sizes, of N pairs drawn independently, by what the ratio leaves of each: []."""
    n, size = len(nll), sizes.double()
    left = nll - nll.sum() / size.sum() * size
    return torch.linalg.vector_norm(left) / size.sum() * (math.sqrt(n / (n - 1)) if n > 1 else math.nan)


def _in_sums(found: NLLEstimate, proposal: str) -> NLLEstimate:
    """With standard errors as a sum over many sequences needs them.

    Chains allow for more shared parameters than they have, lest the interval of one sequence miss; in a sum one is
    enough (measured: docs/estimators.md).
    """
    if proposal != "stratified":
        return found
    chains = [
        plan(*passes).chains for passes in zip(found.num_forwards.tolist(), found.num_tokens.tolist(), strict=True)
    ]
    one = [(1 + 1 / (number - 1)) / allowance(number) for number in chains]
    return dataclasses.replace(found, stderr=found.stderr * found.stderr.new_tensor(one).sqrt())
