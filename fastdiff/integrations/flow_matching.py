"""flow_matching (facebookresearch/flow_matching): the loss of discrete flow matching. Before anything imports its name:

flow_matching.loss.MixturePathGeneralizedKL = MixturePathGeneralizedKL
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from fastdiff import dce_loss


class MixturePathGeneralizedKL(_Loss):
    """Generalised KL of a posterior p = softmax(logits) along a mixture path, in nats per unit of time:

        `-rate [p(x_t) - 1{x_t = x_1} + 1{x_t != x_1} log p(x_1)]`,    rate = d alpha_t / (1 - alpha_t)

    Where x_t = x_1 this is rate (1 - p(x_1)), without cancellation. Where not, p(x_t) needs a second call of the row
    loss: such rows are read twice, forward and backward, and their gradients are added.

    Args:
        path: has a `scheduler` of t, which gives alpha_t and d_alpha_t.
        reduction: "mean" over all tokens, "sum" or "none".
    """

    def __init__(self, path: Any, reduction: str = "mean") -> None:
        super().__init__(None, None, reduction)
        self.path = path

    def forward(self, logits: Tensor, x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Float32 (float64 for float64 logits): [], or [B, ...] without a reduction.

        Args:
            logits: [B, ..., K]. x_1, x_t: [B, ...] int64 clean tokens, and those at time t. t: [B] in [0, 1).

        Raises:
            ValueError, TypeError: an unknown reduction, or as `dce_loss`.
        """
        if self.reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {self.reduction!r}")
        schedule, moved = self.path.scheduler(t), x_t != x_1
        rate = schedule.d_alpha_t / (1 - schedule.alpha_t)
        nll = dce_loss(logits, x_1, exclude_mask=False)
        nll_t = dce_loss(logits, x_t, mask=moved, exclude_mask=False)
        divergence = torch.where(moved, nll - torch.exp(-nll_t), -torch.expm1(-nll))
        loss = (rate.view(-1, *(1,) * (x_1.dim() - 1)) * divergence).to(nll.dtype)
        return loss if self.reduction == "none" else loss.mean() if self.reduction == "mean" else loss.sum()
