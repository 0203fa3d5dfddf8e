"""What is minimised: the noise of a batch, and its loss.

All draws are named by the row of the whole batch, so ranks and accumulated parts meet what one process would meet.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.graphs import Absorbing, Uniform
from fastdiff.integrations.loss_head import LossHead
from fastdiff.losses import dce_loss, dse_loss
from fastdiff.noising import corrupt, mask_exactly, mask_tokens, sample_mask_counts, sample_times, spread
from fastdiff.schedules import LogLinear

SCHEDULE = LogLinear()
LARGE_VOCABULARY = 4096  # from where on the last layer is multiplied for the scored tokens only
_PROPOSALS = {"dce-k": "stratified", "dce-harmonic": "harmonic"}
_DEVIATIONS = 8  # from its mean, beyond which the number of masks in a batch is once in 10^15


class Noised(NamedTuple):
    """A batch as its loss sees it: tokens [B, L], and the noise and weight of each sequence, [B].

    On a GPU also the most tokens that may be scored, so that nothing waits for their number.
    """

    x0: Tensor
    xt: Tensor
    sigma: Tensor
    weight: Tensor
    capacity: int | None = None


def noise(
    x0: Tensor, loss: str, num_states: int, *, seed: int, step: int, first: int = 0, batch_size: int | None = None
) -> Noised:
    """Noise tokens [n, L] as `loss`, one of `LOSSES`, wants it; a mask is the last of num_states.

    They are the rows from `first` on of a batch of batch_size (None: n), over which counts and times are stratified;
    draws are named by seed, step and row. The weight is that of a sequence's summed loss; for the score entropies it is
    dsigma.
    """
    n, length = x0.shape
    total = n if batch_size is None else batch_size
    rows = torch.arange(first, first + n, device="cpu")
    strata = spread(total)[rows]
    there = partial(Tensor.to, device=x0.device, non_blocking=True)
    names: dict[str, Any] = {"seed": seed, "step": step}
    named = {**names, "sample_ids": there(rows)}
    mask_index, nothing = num_states - 1, x0.new_zeros(n, dtype=torch.float32)
    if loss in _PROPOSALS:
        counts, weight = sample_mask_counts(total, length, proposal=_PROPOSALS[loss], **names)
        counts = counts[strata]
        xt = mask_exactly(x0, there(counts), mask_index=mask_index, **named).xt
        return Noised(x0, xt, nothing, there(weight[strata]), int(counts.sum()) if x0.is_cuda else None)
    t = sample_times(total, **names)[strata]
    sigma, dsigma = SCHEDULE(t)
    p = t if loss == "dce-lambda" else -torch.expm1(-sigma)
    capacity = _most(p, length) if x0.is_cuda else None
    if loss == "dce-lambda":
        xt = mask_tokens(x0, there(p), mask_index=mask_index, **named).xt
        return Noised(x0, xt, nothing, there(1 / t), capacity)
    sigma, dsigma = there(sigma), there(dsigma)
    if loss == "dse-uniform":
        return Noised(x0, corrupt(x0, sigma, Uniform(num_states), **named), sigma, dsigma, n * length)
    xt = corrupt(x0, sigma, Absorbing(num_states), **named)
    return Noised(x0, xt, sigma, dsigma / torch.expm1(sigma) if loss == "dce-t" else dsigma, capacity)


def _most(p: Tensor, length: int) -> int:
    """The most masks in sequences whose tokens are masked with probability p [n]."""
    mean, variance = length * p.double().sum(), length * (p * (1 - p)).double().sum()
    return min(len(p) * length, math.ceil(mean + _DEVIATIONS * (variance.sqrt() + 1)))


def diffusion_loss(model: nn.Module, batch: Noised, loss: str, **reduction: Any) -> Tensor:
    """The weighted loss of a noised batch in nats; `reduction` and `num_items` as in `dce_loss`.

    With a large vocabulary the logits are never whole in memory.

    Args:
        model: a `DiffusionTransformer`, as it is or wrapped (DDP, FSDP2).
    """
    x0, xt, sigma, weight, capacity = batch
    network: Any = getattr(model, "module", model)
    inputs: tuple[Tensor, ...] = (xt,)
    targets: tuple[Tensor, ...] = (x0,)
    options: dict[str, Any] = {"xt": xt, "weight": weight}
    if loss.startswith("dse"):
        inputs, targets = (xt, sigma), (sigma, xt, x0)
        options = {"graph": loss.removeprefix("dse-"), "parametrization": "scale_by_sigma", "dsigma": weight}
    options |= reduction
    if network.config.num_states < LARGE_VOCABULARY:
        return (dse_loss if loss.startswith("dse") else dce_loss)(model(*inputs), *targets, **options)
    noise_of_one = tuple(tensor[:1] for tensor in inputs[1:])
    head = LossHead(model, network.lm_head, logits=lambda tokens: model(tokens, *noise_of_one))
    scoring = head.dse_loss if loss.startswith("dse") else head.dce_loss
    with scoring(*targets, **options, capacity=capacity) as loss_of:
        return loss_of(model(*inputs))
