"""What is minimised: the noise of a batch, and its loss.

All draws are named by the row of the whole batch, so ranks and accumulated parts meet what one process would meet.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.integrations.loss_head import LossHead
from fastdiff.losses.mixture import mixture_loss
from fastdiff.losses.row_losses import dce_loss, dse_loss
from fastdiff.model import noised_stream
from fastdiff.noise.blocks import block_strata, num_blocks, per_token_of_blocks
from fastdiff.noise.graphs import Absorbing, Uniform
from fastdiff.noise.mixture import Mixture, mixture_weight
from fastdiff.noise.noising import corrupt, mask_exactly, mask_tokens, sample_mask_counts, sample_times, spread
from fastdiff.noise.times import ImportanceTimes
from fastdiff.training.config import MIXED, SCHEDULE, SCORES

LARGE_VOCABULARY = 4096  # from where on the last layer is multiplied for the scored tokens only
_PROPOSALS = {"dce-k": "stratified", "dce-harmonic": "harmonic"}
_DEVIATIONS = 8  # from its mean, beyond which the number of masks in a batch is once in 10^15


class Noised(NamedTuple):
    """A batch as its loss sees it: tokens [B, L], and the noise and weight of each sequence, [B].

    On a GPU also the most tokens that may be scored, so that nothing waits for their number; and the times that a law
    gave the sequences, [B] float64 on the CPU. With a block_length, sigma and weight are of tokens, [B, L], and times
    of blocks, [B K]. For "gidd" weight is of tokens too, and share what is uniform of a sequence's noise.
    """

    x0: Tensor
    xt: Tensor
    sigma: Tensor
    weight: Tensor
    capacity: int | None = None
    times: Tensor | None = None
    block_length: int = 0
    share: Tensor | None = None


class _Rows(NamedTuple):
    """What is noised as one, sequences or their blocks: a name each, and which of n strata it takes, int64 [R]; and
    whether it is the second of two, which is noised where the first is not, bool [R]."""

    names: Tensor
    strata: Tensor
    n: int
    second: Tensor | None


def noise(
    x0: Tensor,
    loss: str,
    num_states: int,
    *,
    seed: int,
    step: int,
    first: int = 0,
    batch_size: int | None = None,
    law: ImportanceTimes | None = None,
    complementary: bool = False,
    block_length: int = 0,
) -> Noised:
    """Noise tokens [n, L] as `loss`, one of `LOSSES`, wants it; a mask is the last of num_states.

    They are the rows from `first` on of a batch of batch_size (None: n), over which counts and times are stratified;
    draws are named by seed, step and row. The weight is that of a sequence's summed loss; for the score entropies it is
    dsigma.

    Args:
        law: gives times and counts in the place of uniform ones; of [0, 1) for "dce-k", not for "dce-harmonic".
        complementary: for "dce-k", rows 2j and 2j + 1 are one sequence under a mask and under its complement, of m and
            L - m tokens, m uniform on 0..L: weights (L + 1) / m and (L + 1) / (L - m). batch_size is even.
        block_length: noises each block of so many tokens as if it were a sequence, with a level of its own; 0 does not.
    """
    n, length = x0.shape
    total = n if batch_size is None else batch_size
    rows = torch.arange(first, first + n, device="cpu")
    names, draws = (rows // 2, total // 2) if complementary else (rows, total)
    second = rows % 2 == 1 if complementary else None
    if not block_length:
        return _noised(x0, loss, num_states, _Rows(names, spread(draws)[names], draws, second), law, seed, step)
    blocks = num_blocks(length, block_length)
    names, draws = (names.unsqueeze(1) * blocks + torch.arange(blocks, device="cpu")).flatten(), draws * blocks
    second = None if second is None else second.repeat_interleave(blocks)
    of_blocks = _Rows(names, block_strata(names, draws, seed=seed, step=step), draws, second)
    noised = _noised(x0.reshape(-1, block_length), loss, num_states, of_blocks, law, seed, step)
    sigma, weight = (per_token_of_blocks(value, x0, block_length) for value in (noised.sigma, noised.weight))
    return noised._replace(x0=x0, xt=noised.xt.view(x0.shape), sigma=sigma, weight=weight, block_length=block_length)


def _noised(
    x0: Tensor, loss: str, num_states: int, rows: _Rows, law: ImportanceTimes | None, seed: int, step: int
) -> Noised:
    """`noise` of rows [n, L], whatever they are."""
    names, strata, draws, second = rows
    n, length = x0.shape
    there = partial(Tensor.to, device=x0.device, non_blocking=True)
    named: dict[str, Any] = {"seed": seed, "step": step}
    of_rows = {**named, "sample_ids": there(names)}
    mask_index, nothing = num_states - 1, x0.new_zeros(n, dtype=torch.float32)
    times, share = None, torch.ones(n, dtype=torch.float32, device="cpu")
    if law is not None:
        times, share = (values[strata] for values in law.sample(draws, **named))
    if loss in _PROPOSALS:
        least = 0 if second is not None else 1
        sizes = length + 1 - least
        if times is None:
            drawn = sample_mask_counts(draws, sizes, proposal=_PROPOSALS[loss], **named)
            counts, weight = (values[strata] for values in drawn)
        else:
            counts = 1 + (times * sizes).long()
            weight = share * sizes / counts
        masks = counts - 1 + least
        mask = mask_exactly(x0, there(masks), mask_index=mask_index, **of_rows).mask
        if second is not None:
            masks = torch.where(second, length - masks, masks)
            mask, weight = mask ^ there(second).unsqueeze(1), weight * counts / masks.clamp_min(1)
        xt = torch.where(mask, mask_index, x0)
        return Noised(x0, xt, nothing, there(weight), int(masks.sum()) if x0.is_cuda else None, times)
    t = sample_times(draws, **named)[strata] if times is None else times.float()
    if loss == "gidd":
        sigma, dsigma, mixed, dmixed = map(there, (*MIXED(t), MIXED.share(t), MIXED.rate_share(t)))
        graph = Mixture(num_states, share=mixed)
        xt = corrupt(x0, sigma, graph, **of_rows)
        weight = there(share).unsqueeze(1) * mixture_weight(xt, x0, sigma, dsigma, graph, dshare=dmixed)
        return Noised(x0, xt, sigma, weight, n * length, times, share=mixed)
    sigma, dsigma = SCHEDULE(t)
    p = t if loss == "dce-lambda" else -torch.expm1(-sigma)
    capacity = _most(p, length) if x0.is_cuda else None
    if loss == "dce-lambda":
        xt = mask_tokens(x0, there(p), mask_index=mask_index, **of_rows).xt
        return Noised(x0, xt, nothing, there(share / t), capacity, times)
    sigma, weight = there(sigma), there(share * (dsigma / torch.expm1(sigma) if loss == "dce-t" else dsigma))
    if loss == "dse-uniform":
        return Noised(x0, corrupt(x0, sigma, Uniform(num_states), **of_rows), sigma, weight, n * length, times)
    return Noised(x0, corrupt(x0, sigma, Absorbing(num_states), **of_rows), sigma, weight, capacity, times)


def _most(p: Tensor, length: int) -> int:
    """The most masks in sequences whose tokens are masked with probability p [n]."""
    mean, variance = length * p.double().sum(), length * (p * (1 - p)).double().sum()
    return min(len(p) * length, math.ceil(mean + _DEVIATIONS * (variance.sqrt() + 1)))


def diffusion_loss(model: nn.Module, batch: Noised, loss: str, **reduction: Any) -> Tensor:
    """The weighted loss of a noised batch in nats; `reduction` and `num_items` as in `dce_loss`.

    With a large vocabulary the logits are never whole in memory, and of losses a token only the sum has a gradient.

    Args:
        model: a `DiffusionTransformer`, as it is or wrapped (DDP, FSDP2).
    """
    x0, xt, sigma, weight, capacity, _, block_length, share = batch
    network: Any = getattr(model, "module", model)
    inputs: tuple[Tensor, ...] = (xt,)
    targets: tuple[Any, ...] = (x0,)
    options: dict[str, Any] = {"xt": xt, "weight": weight}
    if loss.startswith("dse"):
        inputs, targets = (xt, sigma), (sigma, xt, x0)
        graph = loss.removeprefix("dse-")
        options = {"graph": graph, "parametrization": SCORES[graph], "dsigma": weight}
    elif loss == "gidd":
        inputs, targets, options = (xt, sigma), (sigma, share, xt, x0), {"weight": weight}
    options |= reduction
    scored: Any = {"dce": dce_loss, "dse": dse_loss, "gidd": mixture_loss}[loss.partition("-")[0]]
    called = partial(noised_stream, model, x0=x0, block_length=block_length) if block_length else model
    if network.config.num_states < LARGE_VOCABULARY:
        return scored(called(*inputs), *targets, **options)
    noise_of_one = tuple(tensor.flatten()[:1] for tensor in inputs[1:])
    head = LossHead(model, network.lm_head, logits=lambda tokens: model(tokens, *noise_of_one))
    with getattr(head, scored.__name__)(*targets, **options, summed=True, capacity=capacity) as loss_of:
        return loss_of(called(*inputs))
