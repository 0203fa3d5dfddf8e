"""Dream: the SFT loss of its released trainer (DreamLM/Dream-Coder), and CART weights. In the place of what stands from
`output = self.fsdp_model(` to `loss = torch.sum(loss) / valid_token_this_rank` in
instruct/src/trainer/fsdp_sft_trainer.py:

    more = dict(attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    loss = sft_loss(self.fsdp_model, masked_input_ids, labels, loss_mask_nonflatten, t, self.config.diffusion, **more)

and in dllm, whose DreamTrainer has the same weights (its loss: `fastdiff.integrations.dllm`):

    undo = apply_to_dream()
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checks import check_bool
from fastdiff.integrations.loss_head import LossHead
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


def sft_loss(
    model: Any, masked_input_ids: Tensor, labels: Tensor, loss_mask: Tensor, t: Tensor, diffusion: Any, **inputs: Any
) -> Tensor:
    """Weighted cross-entropy of the masked tokens over their number, in nats, float32 (float64 for float64 weights) [].

    It is 0 if there are none.

    Hidden states at i predict token i + 1; nothing predicts the first token. Those that predict no masked token meet no
    last layer.

    Args:
        model: (input_ids, and the other inputs) -> an object with `.logits` [B, L, V]; its last layer as in `LossHead`.
        masked_input_ids: [B, L] int64. labels: [B, L] int64 clean tokens, -100 where there is none to predict.
        loss_mask: [B, L] bool, the masked tokens. t: [B], the times at which they were masked.
        diffusion: the trainer's configuration. time_reweighting: "original", 1 / t; "linear", 1 - t; "cart", with
            cart_p; anything else, 1. token_reweighting: losses l become alpha (1 - exp(-l))^gamma l.

    Raises:
        ValueError, TypeError, RuntimeError: as `LossHead`, its `dce_loss` and `cart_weight`.
    """
    check_bool("loss_mask", loss_mask, labels.shape, labels.device)
    if diffusion.time_reweighting == "cart":
        weight = _cart(loss_mask, diffusion.cart_p)
    else:
        weights = {"original": 1 / t, "linear": 1 - t}
        weight = weights.get(diffusion.time_reweighting, torch.ones_like(t)).unsqueeze(1).expand(labels.shape)
    weight = weight.masked_fill(~loss_mask, 0)  # 1 / t may be infinite where nothing is masked
    x0, mask, weight = (F.pad(tokens[:, 1:], (0, 1)) for tokens in (labels, loss_mask, weight))
    options = dict(reduction="none") if diffusion.token_reweighting else dict(reduction="mean", weight=weight)
    with LossHead(model).dce_loss(x0, mask=mask, exclude_mask=False, **options) as loss_of:
        loss = loss_of(model(input_ids=masked_input_ids, **inputs).logits)
    if not diffusion.token_reweighting:
        return loss
    focal = diffusion.alpha * (-torch.expm1(-loss)) ** diffusion.gamma * loss
    return ((focal * weight).sum() / mask.sum().clamp_min(1)).to(loss.dtype)


def _cart(masked: Tensor, p: float) -> Tensor:
    if not 0 < p <= 1:
        raise ValueError(f"p: expected a number in (0, 1], got {p}")
    decay = (1 - p) ** torch.arange(masked.shape[1] - 1, dtype=torch.float64, device=masked.device)
    decay = decay[decay > 2**-60]
    kernel = p / 2 * torch.cat([decay.flip(0), decay.new_zeros(1), decay])
    return F.conv1d((~masked).double().unsqueeze(1), kernel.view(1, 1, -1), padding=len(decay)).squeeze(1) * masked
