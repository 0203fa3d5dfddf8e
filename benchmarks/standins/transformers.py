"""What a Trainer's compute_loss does by hand for masked diffusion: cross-entropy per token of widened logits, weighted,
over the number of labels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.integrations.transformers import masked_diffusion_loss
from standins import Problem


def weighted_masked_lm_loss(logits: Tensor, labels: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(-1, logits.shape[-1])
    loss = F.cross_entropy(wide, labels.masked_fill(~mask, -100).view(-1), reduction="none").view(labels.shape)
    return (loss * weight).sum() / (labels != -100).sum()


def cases(p: Problem) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    mask, weight = p.xt == p.mask_index, (1 / p.t)[:, None]
    return {
        "masked diffusion": (
            lambda z: weighted_masked_lm_loss(z, p.x0, mask, weight),
            lambda z: masked_diffusion_loss(z, p.x0, p.num_states, mask=mask, weight=weight),
        )
    }
