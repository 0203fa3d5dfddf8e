"""The rule by which the authors' code estimates a likelihood, and what it gives where the likelihood is known.

Of a response's n tokens m are masked, m from 1 to n - 1 with a probability in proportion to 1/m, and H_n times their
losses is averaged: times their sum in the experiment on LLaDA, their mean in that on text8. The formula asks for sums,
and for m = n too.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.dna import LETTERS, dna_strings
from fastdiff import exact_nll, time_free_nll
from fastdiff.estimators.scoring import Scorer
from fastdiff.evaluating import Model

SUMS, MEANS = "published, sums", "published, means"
MASK = len(LETTERS)


def published(
    model: Model, x0: Tensor, target: Tensor, *, passes: int, mask_index: int, exclude_mask: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """What each pass says of -log p(target | the others), in nats: [B, passes] by either rule.

    target [B, L] is of n > 1 tokens in each sequence.
    """
    score = Scorer(model, x0, mask_index, target=target, exclude_mask=exclude_mask)
    names, share = torch.arange(len(x0)), 1 / torch.arange(1, int(score.num_tokens[0]) + 1)
    generator = torch.Generator().manual_seed(seed)
    counts = 1 + torch.multinomial(share[:-1].expand(len(x0), -1), passes, replacement=True, generator=generator)
    with score.evaluating(counts.numel()):
        loss, _ = score.draw(names, counts, torch.arange(passes), torch.tensor(seed), names)
    total = share.sum() * loss.sum(2)
    return {SUMS: total, MEANS: total / counts}


def known_strings(passes: int) -> dict[str, dict[str, float]]:
    """Of 128 strings of DNA with true conditionals: the mean of -log p by each rule, its excess, and its error."""
    strings, p = dna_strings()
    letters = F.one_hot(strings, MASK + 1).double()

    def conditionals(xt: Tensor) -> Tensor:
        agree = ((xt.unsqueeze(1) == strings) | (xt.unsqueeze(1) == MASK)).all(2)
        return torch.einsum("bs,slv->blv", agree * p, letters).clamp_min(1e-300).log()

    true = -p.log()
    of_passes = published(conditionals, strings, strings < MASK, passes=passes, mask_index=MASK)
    found = {"true": true, "ours, every subset": exact_nll(conditionals, strings, mask_index=MASK).nll}
    found["ours"] = time_free_nll(conditionals, strings, mask_index=MASK, num_samples=passes).nll
    found |= {rule: values.mean(1) for rule, values in of_passes.items()}
    return {rule: excess(nll, true) for rule, nll in found.items()}


def excess(nll: Tensor, true: Tensor) -> dict[str, float]:
    too_much = nll - true
    error = too_much.std().item() / math.sqrt(len(nll))
    return {"nll": nll.mean().item(), "excess": too_much.mean().item(), "error": error}
