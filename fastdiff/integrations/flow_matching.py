"""flow_matching (facebookresearch/flow_matching): the loss of discrete flow matching.

undo = apply_to_flow_matching()
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from fastdiff import dce_loss
from fastdiff.integrations.patching import patch
from fastdiff.losses.row_losses import dce_rows
from fastdiff.ops.row_loss import row_loss_grad


def apply_to_flow_matching() -> Callable[[], None]:
    """Replaces what `MixturePathGeneralizedKL` computes, not the class, and returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("flow_matching", {"flow_matching.loss": (MixturePathGeneralizedKL,)})


class MixturePathGeneralizedKL(_Loss):
    """Generalised KL of a posterior p = softmax(logits) along a mixture path, in nats per unit of time:

        `-rate [p(x_t) - 1{x_t = x_1} + 1{x_t != x_1} log p(x_1)]`,    rate = d alpha_t / (1 - alpha_t)

    Where x_t = x_1 this is rate (1 - p(x_1)), without cancellation. Where not, p(x_t) needs a second call of the row
    loss: such rows are read twice in the forward pass.

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
        nll, nll_t = _TwoNLL.apply(logits, x_1, x_t, moved)
        divergence = torch.where(moved, nll - torch.exp(-nll_t), -torch.expm1(-nll))
        loss = (rate.view(-1, *(1,) * (x_1.dim() - 1)) * divergence).to(nll.dtype)
        return loss if self.reduction == "none" else loss.mean() if self.reduction == "mean" else loss.sum()


class _TwoNLL(torch.autograd.Function):
    """-log p(x_1), and -log p(x_t) where moved; with one gradient for both, which differ at two ids only."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x_1: Tensor, x_t: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, x_1, x_t, moved)
        return dce_loss(logits, x_1, exclude_mask=False), dce_loss(logits, x_t, mask=moved, exclude_mask=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_t: Tensor) -> tuple[Tensor | None, ...]:
        logits, x_1, x_t, moved = ctx.saved_tensors
        grad_t = grad_t.masked_fill(~moved, 0)
        rows = dce_rows(logits, x_1, None, None, None, -1, False, -100, 0.0, "none", None)
        both = row_loss_grad(rows, grad + grad_t)
        correction = torch.stack([grad_t, -grad_t], -1).to(both.dtype)
        return both.scatter_add_(-1, torch.stack([x_1, x_t], -1), correction), None, None, None
