"""dFactory (inclusionAI/dFactory, on VeOmni): the training step of LLaDA2.0 in tasks/train_llada2_bd.py.

loss = train_llada2_loss(model, micro_batch, labels, args.train.same_token_labels) / len(micro_batches)
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checks import check_tensor
from fastdiff.integrations.loss_head import LossHead


def train_llada2_loss(
    model: nn.Module, micro_batch: dict[str, Any], labels: Tensor, same_token_labels: bool = False
) -> Tensor:
    """Mean cross-entropy of the masked tokens in nats, float32 (float64 for float64 hidden states) [].

    It calls the model as the task does, whose last layer computes the loss (`LossHead`): of [xt, x0] only tokens of xt
    that are masked are multiplied. 0, and not NaN, where none is.

    Args:
        micro_batch: what the model is called with; input_ids [B, 2 L], or [B, L] where it is not in
            block_diffusion_mode.
        labels: [B, L] int64, -100 where there is no loss.
        same_token_labels: as the task's; False means that logits at i predict token i + 1.

    Raises:
        ValueError, TypeError, RuntimeError: as `LossHead.dce_loss`; labels are neither input_ids' length nor its half.
    """
    check_tensor("labels", labels)
    batch, length = micro_batch["input_ids"].shape
    if labels.shape not in ((batch, length), (batch, length / 2)):
        raise ValueError(f"labels: expected shape [{batch}, {length}] or half as long, got {tuple(labels.shape)}")
    x0 = labels if same_token_labels else F.pad(labels[:, 1:], (0, 1), value=-100)
    x0 = F.pad(x0, (0, length - labels.shape[1]), value=-100)
    with LossHead(model).dce_loss(x0, exclude_mask=False, reduction="mean") as loss_of:
        return loss_of(model(**micro_batch, use_cache=False, output_router_logits=False).logits)
