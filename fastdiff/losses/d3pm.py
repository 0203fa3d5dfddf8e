"""The objective of D3PM (Austin et al. 2021): the bound of a chain of finitely many steps, a step at a time."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.checks import Number, check_choice, check_integer, check_values, per_token, vocabulary_index
from fastdiff.losses.linear_losses import last_layer, last_layer_loss
from fastdiff.losses.row_losses import checked_rows, logits_loss
from fastdiff.ops.functors import FUNCTORS, Functor
from fastdiff.ops.row_loss import Rows
from fastdiff.schedules import LogLinear, Schedule

FUNCTORS["d3pm_uniform"] = Functor(
    lambda r: reference.d3pm_uniform(r.z, r.sigma, r.extra, r.xt, r.x0, r.penalty),
    masked=False,
    apart="xt",
    extra="sigma_s",
    extra_range=lambda r: (~((r.extra >= 0) & (r.extra < r.sigma)), "numbers in [0, sigma)"),
)


def d3pm_loss(
    logits: Tensor,
    step: int | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    num_steps: int,
    graph: str = "absorb",
    schedule: Schedule | None = None,
    auxiliary: float = 0.0,
    mask_index: int = -1,
    ignore_index: int = -100,
    weight: Number | Tensor | None = None,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A step of D3PM's bound, `num_steps w (KL(q(x_s | x_t, x0) || p(x_s | x_t)) - auxiliary log c_x0)`, in nats.

    Step i leads from noise sigma(i / num_steps) at x_t back to sigma((i - 1) / num_steps), and step 1 to x0, whatever
    the schedule leaves at time 0. Over steps drawn uniformly from 1..num_steps the loss is unbiased for the sum over
    all of them, which with the divergence at the end, KL(q(x_T | x0) || prior), bounds -log p(x0). The network tells
    c = softmax(logits), its law of x0, and p(x_s | x_t) is proportional to q(x_t | x_s) times the mean of q(x_s | x0)
    under c. Absorbing, that is cross-entropy of the masked tokens with weight (alpha_s - alpha_t) / (1 - alpha_t);
    uniform, all tokens have a loss.

    Args:
        logits: [..., V] as in `dce_loss`.
        step: int64 steps in 1..num_steps, an int or a tensor over a prefix of the token shape ([B] is one a sequence).
        xt, x0: [...] int64 noised and clean tokens. Where x0 = ignore_index the loss is 0.
        num_steps: T.
        graph: "absorb" or "uniform".
        schedule: of the noise; None is `LogLinear()`.
        auxiliary: >= 0, the weight of cross-entropy beside the divergence, where that has a loss.
        mask_index: the absorbing graph's mask, negative from the end, which c leaves out.
        weight: w, a further factor, a number or a tensor over a prefix of the token shape. It has no gradient.
        reduction, num_items: as in `dce_loss`.

    Returns:
        float32 (float64 for float64 logits) [...] or [].

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; on the CPU also if a step or an id is out of
            range, or (absorbing) x0 is the mask or xt is neither x0 nor the mask.
        BackendUnavailable: the backend named cannot run here.
    """
    options: dict[str, Any] = dict(schedule=schedule, auxiliary=auxiliary, mask_index=mask_index, weight=weight)
    options |= dict(ignore_index=ignore_index, reduction=reduction, num_items=num_items)
    make_rows = partial(d3pm_rows, num_steps=num_steps, graph=graph, **options)
    return logits_loss("logits", logits, make_rows, (step, xt, x0), None, backend)[0]


def linear_d3pm_loss(
    hidden: Tensor,
    lm_head: Tensor,
    step: int | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    summed: bool = False,
    capacity: int | None = None,
    backend: str | None = None,
    **options: Any,
) -> Tensor:
    """`d3pm_loss` of the logits hidden @ lm_head.T + bias, which are never whole in memory.

    Args:
        hidden, lm_head, bias, softcap, summed, capacity: as in `linear_dce_loss`.
        step, xt, x0, options, backend: as in `d3pm_loss`, with [...] the shape of hidden without D.

    Returns:
        float32 (float64 for float64 inputs) [...] or [].

    Raises:
        ValueError, TypeError: as `d3pm_loss`; shapes, types or devices of hidden, lm_head and bias do not fit.
        BackendUnavailable: the backend named cannot run here.
    """
    head = last_layer(hidden, lm_head, bias, softcap, capacity, None)
    return last_layer_loss(head, partial(d3pm_rows, **options), (step, xt, x0), backend, summed)[0]


def d3pm_rows(
    z: Tensor,
    step: int | Tensor,
    xt: Tensor,
    x0: Tensor,
    *,
    num_steps: int,
    graph: str = "absorb",
    schedule: Schedule | None = None,
    auxiliary: float = 0.0,
    mask_index: int = -1,
    weight: Number | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "none",
    num_items: Number | Tensor | None = None,
) -> Rows:
    """The checked arguments of D3PM's loss over rows z, of which only type, shape and device are looked at."""
    check_choice("graph", graph, ("absorb", "uniform"))
    num_steps = check_integer("num_steps", num_steps, 1)
    if not auxiliary >= 0:
        raise ValueError(f"auxiliary: expected a number >= 0, got {auxiliary}")
    if not isinstance(step, Tensor):
        step = check_integer("step", step)
    elif step.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"step: expected int64 or int32 steps, got {step.dtype}")
    shape, device = z.shape[:-1], z.device
    number = per_token("step", step, shape, device)
    check_values("step", number, ~((number >= 1) & (number <= num_steps)), f"steps in [1, {num_steps}]")
    schedule = LogLinear() if schedule is None else schedule
    sigma, before = (schedule.total_noise(i / num_steps) for i in (number, number - 1))
    before = torch.where(number == 1, 0, before)
    factor = num_steps if weight is None else num_steps * per_token("weight", weight, shape, device)
    options: dict[str, Any] = dict(ignore_index=ignore_index, reduction=reduction, num_items=num_items)
    if graph == "uniform":
        options |= dict(sigma=sigma, sigma_s=before, penalty=auxiliary, weight=factor)
        return checked_rows("d3pm_uniform", z, x0, xt=xt, **options)
    unmasked = torch.exp(-before) * torch.expm1(before - sigma) / torch.expm1(-sigma)
    mask_index = vocabulary_index("mask_index", mask_index, z.shape[-1])
    options |= dict(mask_index=mask_index, weight=factor * (unmasked + auxiliary))
    return checked_rows("dce", z, x0, xt=xt, **options)
