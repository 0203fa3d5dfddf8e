"""TRL: the losses of DPO and GRPO, from the logits of a masked diffusion model whose answers are masked."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.integrations.trl import masked_lm_head
from standins import Case, Problem

DPO = ("log_probs", "entropy", "mean_logits", "is_top1")
GRPO = ("log_probs", "entropy")


def from_logits(
    model: nn.Module, mask_index: int, input_ids: Tensor, labels: Tensor, temperature: float = 1.0, shift: bool = False
) -> SimpleNamespace:
    """What TRL's trainers take from a model, [B, L - 1] each: every row is normalised, and those of answers kept."""
    answer = labels != -100
    logits = model(input_ids=torch.where(answer, mask_index, input_ids)).logits / temperature
    logits = logits[:, :-1] if shift else logits[:, 1:]
    logps, answer, tokens = logits.log_softmax(-1), answer[:, 1:], input_ids[:, 1:]
    found = dict(
        log_probs=logps.gather(-1, tokens[..., None])[..., 0],
        entropy=-(logps.exp() * logps).sum(-1),
        is_top1=logits.argmax(-1) == tokens,
    )
    return SimpleNamespace(**{name: torch.where(answer, value, 0) for name, value in found.items()})


def from_last_layer(
    model: Any, mask_index: int, input_ids: Tensor, labels: Tensor, temperature: float = 1.0, **options: Any
) -> SimpleNamespace:
    """The same by what the integration gives a model, which then loses it again."""
    inner = getattr(model, "module", model)
    outputs = DPO if temperature == 1 else GRPO
    masked_lm_head(SimpleNamespace, mask_index, **dict(shift=False) | options)(inner, temperature, outputs=outputs)
    try:
        return model(input_ids=input_ids, labels=labels, fused_lm_head=True)
    finally:
        del inner.forward


def dpo_loss(scored: Any, network: nn.Module, p: Problem, labels: Tensor) -> Tensor:
    """Of pairs: the first half are chosen, the other rejected; the reference says -20 of each."""
    shares = scored(network, p.mask_index, p.x0, labels).log_probs.sum(1) + 20
    chosen, rejected = shares.split([(len(shares) + 1) // 2, len(shares) // 2])
    return -F.logsigmoid(0.1 * (chosen[: len(rejected)] - rejected)).sum() + 0.01 * chosen[-1]


def grpo_loss(scored: Any, network: nn.Module, p: Problem, labels: Tensor) -> Tensor:
    """Without clipping, beside a bonus for entropy."""
    found = scored(network, p.mask_index, p.x0, labels, temperature=0.9)
    advantages = torch.linspace(-1, 1, len(labels), dtype=torch.float64)[:, None]
    return -(advantages * found.log_probs).sum() - 0.1 * found.entropy.sum()


def cases(p: Problem) -> dict[str, Case]:
    at = torch.arange(p.x0.shape[1])
    labels = torch.where(at >= len(at) // 2, p.x0, -100)

    def pair(loss: Any) -> Case:
        return tuple(partial(loss, scored, p=p, labels=labels) for scored in (from_logits, from_last_layer))

    return {"GRPO": pair(grpo_loss), "DPO": pair(dpo_loss)}
