"""NeMo Automodel: the loss of masked diffusion."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastdiff.integrations import nemo
from standins import Problem, published


class DLLMLossOutput(NamedTuple):
    total_loss: Tensor
    dllm_loss: Tensor
    draft_correct_per_pos: Tensor | None = None
    draft_count_per_pos: Tensor | None = None


class MDLMCrossEntropyLoss(nn.Module):
    def __init__(self, fp32_upcast=True):
        super().__init__()
        self.fp32_upcast = fp32_upcast

    def forward(
        self,
        logits,
        target_ids,
        noise_mask,
        p_mask,
        loss_mask,
        loss_mask_ar=None,
        num_diffusion_tokens=None,
        num_ar_tokens=None,
        causal_logits=None,
        noisy_input_ids=None,
    ):
        """Every row is scored, in the type of the logits; the others' weight is 0. Sharded logits are gathered."""
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        nll = F.cross_entropy(logits.flatten(0, 1), target_ids.flatten(), reduction="none").view(target_ids.shape)
        scored = (noise_mask & loss_mask.bool()).float()
        loss = (nll * scored * (1 / p_mask.clamp(min=1e-8))).sum()
        if num_diffusion_tokens is not None:
            loss = loss / max(num_diffusion_tokens, 1)
        return DLLMLossOutput(loss, loss.detach().clone())


class MDLMStrategy:
    def create_loss_fn(self, dllm_cfg):
        return MDLMCrossEntropyLoss()


PUBLISHED = published("nemo", "nemo_automodel.components.loss.dllm_loss", "nemo_automodel.recipes.dllm.strategy")
MDLMCrossEntropyLoss = PUBLISHED["nemo_automodel.components.loss.dllm_loss"].MDLMCrossEntropyLoss
DLLMLossOutput = PUBLISHED["nemo_automodel.components.loss.dllm_loss"].DLLMLossOutput


def cases(p: Problem) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    supervised = (torch.arange(p.x0.shape[1]) > 1).long().expand(p.x0.shape)
    arguments = (p.x0, p.xt == p.mask_index, p.t[:, None].expand(p.x0.shape), supervised)
    theirs, ours = MDLMCrossEntropyLoss(), nemo.MDLMCrossEntropyLoss()
    tokens = 3 * int(supervised.sum())  # of all ranks

    def pair(**options: int):
        return (
            lambda z: theirs(z, *arguments, **options).total_loss,
            lambda z: ours(z, *arguments, **options).total_loss,
        )

    return {"MDLM": pair(num_diffusion_tokens=tokens), "MDLM, summed": pair()}
