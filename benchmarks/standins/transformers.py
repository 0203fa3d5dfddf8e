"""What a Trainer's compute_loss does by hand for masked diffusion: cross-entropy per token of widened logits, weighted,
over the number of labels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.integrations.loss_head import LossHead
from standins import Network, Problem


def weighted_masked_lm_loss(logits: Tensor, labels: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(-1, logits.shape[-1])
    loss = F.cross_entropy(wide, labels.masked_fill(~mask, -100).view(-1), reduction="none").view(labels.shape)
    return (loss * weight).sum() / (labels != -100).sum()


def cases(p: Problem) -> dict[str, tuple[Callable[[Network], Tensor], Callable[[Network], Tensor]]]:
    mask, weight, num_items = p.xt == p.mask_index, 1 / p.t, p.x0.numel()

    def published(network: Network) -> Tensor:
        return weighted_masked_lm_loss(network(p.xt).logits, p.x0, mask, weight[:, None])

    def ours(network: Network) -> Tensor:
        head = LossHead(network)
        options = dict(exclude_mask=False, reduction="mean", num_items=num_items)
        with head.dce_loss(p.x0, mask=mask, weight=weight, **options) as loss_of:
            return loss_of(network(p.xt).logits)

    return {"masked diffusion": (published, ours)}
