"""Dream: the SFT loss of its released trainer (DreamLM/Dream-Coder), and CART weights. In the place of what stands from
`shift_logits = ...` to `loss = torch.sum(loss) / valid_token_this_rank` in instruct/src/trainer/fsdp_sft_trainer.py:

    loss = sft_loss(logits, labels, loss_mask_nonflatten, t, self.config.diffusion)

and in dllm, whose DreamTrainer has the same weights (its loss: `fastdiff.integrations.dllm`):

    undo = apply_to_dream()
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import dce_loss
from fastdiff.integrations.patching import patch


def apply_to_dream() -> Callable[[], None]:
    """Replaces the weights of dllm's DreamTrainer, and returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("dllm", {"dllm.pipelines.dream.trainer": (cart_weight,)})


def cart_weight(masked_mask: Tensor, t: Tensor, p: float = 0.3) -> Tensor:
    """Context-adaptive weights: for a masked token the sum over visible ones, at distance k, of p (1 - p)^(k - 1) / 2.

    Args:
        masked_mask: [B, L] bool. t: not used. p: of the geometric distribution, in (0, 1].

    Returns:
        float32 [B, L], 0 where a token is visible. Padding counts as visible, as published.

    Raises:
        ValueError: p is outside (0, 1].
    """
    return _cart(masked_mask, p).float()


def sft_loss(logits: Tensor, labels: Tensor, loss_mask: Tensor, t: Tensor, diffusion: Any) -> Tensor:
    """Weighted cross-entropy of the masked tokens over their number, in nats, float32 (float64 for float64 logits) [].

    It is 0 if there are none.

    Logits at i predict token i + 1 and are not copied for it; nothing predicts the first token.

    Args:
        logits: [B, L, V]. labels: [B, L] int64 clean tokens, -100 where there is none to predict.
        loss_mask: [B, L] bool, the masked tokens. t: [B], the times at which they were masked.
        diffusion: the trainer's configuration. time_reweighting: "original", 1 / t; "linear", 1 - t; "cart", with
            cart_p; anything else, 1. token_reweighting: losses l become alpha (1 - exp(-l))^gamma l.

    Raises:
        ValueError, TypeError: as `dce_loss` and `cart_weight`.
    """
    if diffusion.time_reweighting == "cart":
        weight = _cart(loss_mask, diffusion.cart_p)
    else:
        weights = {"original": 1 / t, "linear": 1 - t}
        weight = weights.get(diffusion.time_reweighting, torch.ones_like(t)).unsqueeze(1).expand(labels.shape)
    weight = weight.masked_fill(~loss_mask, 0)  # 1 / t may be infinite where nothing is masked
    x0, mask, weight = (F.pad(tokens[:, 1:], (0, 1)) for tokens in (labels, loss_mask, weight))
    if not diffusion.token_reweighting:
        return dce_loss(logits, x0, mask=mask, weight=weight, exclude_mask=False, reduction="mean")
    nll = dce_loss(logits, x0, mask=mask, exclude_mask=False)
    focal = diffusion.alpha * (-torch.expm1(-nll)) ** diffusion.gamma * nll
    return ((focal * weight).sum() / mask.sum().clamp_min(1)).to(nll.dtype)


def _cart(masked: Tensor, p: float) -> Tensor:
    if not 0 < p <= 1:
        raise ValueError(f"p: expected a number in (0, 1], got {p}")
    decay = (1 - p) ** torch.arange(masked.shape[1] - 1, dtype=torch.float64, device=masked.device)
    decay = decay[decay > 2**-60]
    kernel = p / 2 * torch.cat([decay.flip(0), decay.new_zeros(1), decay])
    return F.conv1d((~masked).double().unsqueeze(1), kernel.view(1, 1, -1), padding=len(decay)).squeeze(1) * masked
