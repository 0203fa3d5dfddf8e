"""Dream: the loss of its SFT trainer, and its context-adaptive weights."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastdiff.integrations import dream
from standins import Network, Problem, published


def context_adaptive_reweight(seq_len, distribution="symmetric-geometric", **kwargs):
    """Half a geometric law of the distance, for every pair of positions, [L, L]."""
    p, at = kwargs.get("cart_p", 0.8), torch.arange(seq_len)
    distance = (at[:, None] - at[None, :]).abs()
    return (math.log(p) + (distance - 1) * math.log(1 - p)).exp().mul(0.5).masked_fill(distance == 0, 0)


RELEASED = published("dream", "instruct.src.diffllm.train_utils")["instruct.src.diffllm.train_utils"]
context_adaptive_reweight = RELEASED.context_adaptive_reweight


def cart_weight(masked_mask, t, p=0.3):
    """The visible tokens times that matrix."""
    matrix = context_adaptive_reweight(masked_mask.shape[1], cart_p=p).to(masked_mask.device)
    return (~masked_mask).type_as(matrix).matmul(matrix).masked_fill(~masked_mask, 0)


def sft_loss(model, masked_input_ids, labels, loss_mask, t, diffusion, **inputs):
    """Logits are moved by one in a copy, every row is scored under autocast, and those not masked are set to 0."""
    with torch.autocast(device_type=labels.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=masked_input_ids, **inputs).logits
        shifted = torch.cat([logits[:, :1], logits[:, :-1]], dim=1).contiguous()
        loss = nn.CrossEntropyLoss(reduction="none")(shifted.view(-1, logits.shape[-1]), labels.reshape(-1))
        loss = loss.masked_fill(~loss_mask.reshape(-1), 0)
        if diffusion.token_reweighting:
            loss = diffusion.alpha * (1 - torch.exp(-loss)) ** diffusion.gamma * loss
        if diffusion.time_reweighting == "original":
            weight = 1 / t[:, None].expand(labels.shape)
        elif diffusion.time_reweighting == "linear":
            weight = 1 - t[:, None].expand(labels.shape)
        elif diffusion.time_reweighting == "cart":
            weight = cart_weight(loss_mask, t, diffusion.cart_p)
        else:
            weight = torch.ones_like(t)[:, None].expand(labels.shape)
        return (loss * weight.reshape(-1)).sum() / loss_mask.sum()


def config(**options):
    defaults = dict(token_reweighting=False, alpha=0.25, gamma=2, time_reweighting="original", cart_p=0.1)
    return SimpleNamespace(**defaults | options)


def cases(p: Problem) -> dict[str, tuple[Callable[[Network], Tensor], Callable[[Network], Tensor]]]:
    masked = p.xt == p.mask_index
    masked[:, 0] = False

    def pair(**options):
        arguments = (p.xt, p.x0, masked, p.t, config(**options))

        def published(network: Network) -> Tensor:
            default = torch.get_default_dtype()
            exact = network.hidden.dtype == torch.float64
            torch.set_default_dtype(torch.float64 if exact else torch.float32)  # of the weights
            try:
                return sft_loss(network, *arguments)
            finally:
                torch.set_default_dtype(default)

        def ours(network: Network) -> Tensor:
            with torch.autocast(p.x0.device.type, torch.bfloat16):
                return dream.sft_loss(network, *arguments)

        return published, ours

    return {
        "SFT": pair(),
        "SFT, CART": pair(time_reweighting="cart"),
        "SFT, tokens reweighted": pair(token_reweighting=True, time_reweighting="linear"),
    }
