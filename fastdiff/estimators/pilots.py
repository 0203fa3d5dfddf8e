"""How many passes a tolerance takes, by pilots whose estimates are thrown away."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.estimators.estimate import NLLEstimate, student_t

_LEAST_SAMPLES = 16  # after a pilot: an error bar of 15 masks
_PILOT = 2**23  # its steps are after any that an estimate takes

Parts = list[tuple[Tensor, NLLEstimate]]  # places in a batch, and the estimates that belong there
Estimates = Callable[[Tensor, Tensor, Tensor, int], Parts]  # of numbers of passes [B], seed, sample_ids [B], first step


@torch.no_grad()
def pilots(
    estimates: Estimates,
    most_tokens: Tensor,
    pilot: Tensor,
    max_samples: int,
    tolerance: float,
    seed: Tensor,
    sample_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Passes [B] to take, and those spent on pilots of `pilot` [B] passes, 0 for none.

    What a pilot says is trusted for four times its passes; who needs more gets a pilot of these, or is enumerated.
    """
    num, spent, least, stage = torch.zeros_like(pilot), torch.zeros_like(pilot), pilot.clamp(max=_LEAST_SAMPLES), 1
    while pilot.any():
        for which, estimate in estimates(pilot, seed, sample_ids, stage * _PILOT):
            num[which] = _enough(estimate, tolerance).clamp(least[which], least[which].clamp(min=max_samples))
            spent[which] += estimate.num_forwards
        larger = 4 * pilot
        more = (num > larger) & (larger < max_samples) & ~fits(most_tokens, larger)
        pilot, stage = larger.where(more, 0), stage + 1
    return num, spent


def _enough(pilot: NLLEstimate, tolerance: float) -> Tensor:
    """Passes [B] after which a 95% interval is hardly ever wider than +- tolerance nats, by what a pilot saw."""
    # A pilot's variance is so much too small one time in forty: chi-square over nu, by Wilson and Hilferty, of two
    # thirds of the degrees of freedom, since losses have heavier tails than normals.
    spread = 3 / (9 * pilot.degrees_of_freedom)
    too_small = (1 - spread - 1.96 * spread.sqrt()).clamp(min=0.1) ** 3
    ratio = (student_t(0.95, pilot.degrees_of_freedom) * pilot.stderr / tolerance) ** 2 / too_small
    # More passes gain at least as their number; fewer lose up to as its cube, for there is less to fit controls on.
    passes = (pilot.num_forwards * torch.maximum(ratio, ratio ** (1 / 3))).nan_to_num(1.0).clamp(1, 2**40)
    return (2 ** ((4 * passes.log2()).ceil() / 4)).ceil().long()  # few different numbers: sequences still run together


def fits(num_tokens: Tensor, num_samples: Tensor) -> Tensor:
    """Whether the 2^n - 1 subsets of n tokens fit a number of passes."""
    return 2 ** num_tokens.clamp(max=62) - 1 <= num_samples
