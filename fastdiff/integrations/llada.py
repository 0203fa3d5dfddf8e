"""LLaDA (ML-GSAI/LLaDA): the losses of GUIDELINES.md, for a training loop, from a model that makes no logits for them:

    loss = pretraining_loss(model, noisy_batch, input_ids, masked_indices, p_mask)

and `get_log_likelihood` and `generate`:

    undo = apply_to_llada()

Softmax runs over all V = 126464 ids, the mask included.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import conditional_nll, sample_tokens
from fastdiff.checks import check_choice
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import patch

MASK, EOS, EOT = 126336, 126081, 126348


def apply_to_llada() -> Callable[[], None]:
    """Replaces `generate` and `get_log_likelihood`, and returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("LLaDA", {"generate": (generate,), "get_log_likelihood": (get_log_likelihood,)})


def pretraining_loss(
    model: Any, noisy_batch: Tensor, input_ids: Tensor, masked_indices: Tensor, p_mask: Tensor
) -> Tensor:
    """Cross-entropy of the masked tokens over p_mask, divided by B L: nats, float32 (float64 for float64 weights) [].

    Args:
        model: (input_ids) -> an object with `.logits` [B, L, V]; its last layer as in `LossHead`.
        noisy_batch, masked_indices, p_mask: [B, L] int64, bool and float, from `forward_process`.
        input_ids: [B, L] int64, the clean tokens.

    Raises:
        ValueError, TypeError, RuntimeError: as `LossHead` and its `dce_loss`.
    """
    weight = 1 / p_mask.double()
    return _loss(model, noisy_batch, input_ids, masked_indices, weight, input_ids.numel())


def sft_loss(
    model: Any,
    noisy_batch: Tensor,
    input_ids: Tensor,
    masked_indices: Tensor,
    p_mask: Tensor,
    answer_lengths: Tensor,
) -> Tensor:
    """Cross-entropy of the masked tokens over p_mask and the length of their answer, divided by B.

    Args:
        model, noisy_batch, input_ids, masked_indices, p_mask: as in `pretraining_loss`.
        answer_lengths: [B, L] int64, the same along a sequence.

    Raises:
        ValueError, TypeError, RuntimeError: as `pretraining_loss`.
    """
    weight = 1 / (p_mask.double() * answer_lengths)
    return _loss(model, noisy_batch, input_ids, masked_indices, weight, len(input_ids))


def _loss(model: Any, xt: Tensor, x0: Tensor, mask: Tensor, weight: Tensor, num_items: int) -> Tensor:
    options = dict(mask=mask, weight=weight, exclude_mask=False, reduction="mean", num_items=num_items)
    with LossHead(model).dce_loss(x0, **options) as loss_of:
        return loss_of(model(input_ids=xt).logits)


def get_log_likelihood(
    model: Any,
    prompt: Tensor,
    answer: Tensor,
    mc_num: int = 128,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    mask_id: int = MASK,
) -> float:
    """log p(answer | prompt) in nats, by `conditional_nll` with at most mc_num network passes.

    Args:
        model: xt [b, L] -> an object with `.logits` [b, L, V]; has `.device`.
        prompt, answer: [P] and [A] int64.
        mc_num: at least 3, unless all 2^A - 1 subsets of the answer fit: then they are enumerated, as for one token.
        batch_size: rows in a forward pass (twice that with guidance).
        cfg_scale: guidance w: logits un + (w + 1) (cond - un), un with the prompt masked.

    Raises:
        ValueError, TypeError: as `conditional_nll`, where mc_num is num_samples and mask_id is mask_index.
    """

    def network(xt: Tensor) -> Tensor:
        return _logits(model, xt, torch.arange(xt.shape[1], device=xt.device) < len(prompt), cfg_scale, mask_id)

    given, sought = (tokens.to(model.device).unsqueeze(0) for tokens in (prompt, answer))
    options = dict(num_samples=mc_num, batch_size=batch_size, exclude_mask=False, seed=None)
    return -conditional_nll(network, given, sought, mask_index=mask_id, **options).nll.item()


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = MASK,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
) -> Tensor:
    """prompt [B, P] int64 and gen_length tokens after it, [B, P + gen_length], drawn in blocks from left to right.

    Each step draws a token at every mask up to the end of its block, and keeps those of largest probability.

    Args:
        model: (xt [B, L], attention_mask=[B, L]) -> an object with `.logits`; has `.device`.
        attention_mask: [B, P], of the prompt.
        steps: in all, shared evenly by the blocks. block_length: a divisor of gen_length.
        temperature, cfg_scale: as in `sample_tokens` and `get_log_likelihood`.
        remasking: "low_confidence", or "random" for tokens kept at random.
        logits_eos_inf: never draw EOS. confidence_eos_eot_inf: keep EOS and EoT after all others.

    Raises:
        ValueError, TypeError: steps or blocks do not divide, another remasking, or as `sample_tokens`.
    """
    check_choice("remasking", remasking, ("low_confidence", "random"))
    if block_length < 1 or gen_length % block_length:
        raise ValueError(f"block_length: expected a divisor of gen_length = {gen_length}, got {block_length}")
    steps, rest = divmod(steps, max(1, gen_length // block_length))
    if rest:
        raise ValueError(f"steps: expected a multiple of {gen_length // block_length} blocks, got a rest of {rest}")
    x = F.pad(prompt.to(model.device), (0, gen_length), value=mask_id)
    given = x != mask_id
    options = {} if attention_mask is None else dict(attention_mask=F.pad(attention_mask, (0, gen_length), value=1))
    for end in range(prompt.shape[1] + block_length, x.shape[1] + 1, block_length):
        masks = (x[:, end - block_length : end] == mask_id).sum(1)
        for i in range(steps):
            size = masks // steps + (i < masks % steps)
            if not size.any():
                break
            where = x == mask_id
            where[:, end:] = False
            logits = _logits(model, x, given, cfg_scale, mask_id, **options)
            if logits_eos_inf:
                logits[..., EOS] = -torch.inf
            law = dict(mask_index=mask_id, exclude_mask=False, temperature=temperature)
            x0, stats = sample_tokens(logits, x, mask=where, return_stats=True, **law)
            surest = stats.probability
            if remasking == "random":
                surest = torch.rand_like(surest)
            elif confidence_eos_eot_inf:
                surest = _without_ends(logits, x0, surest)
            order = surest.masked_fill(~where, -torch.inf).argsort(dim=1, descending=True, stable=True)
            x = torch.where(order.argsort(1) < size.unsqueeze(1), x0, x)
    return x


def _logits(model: Any, xt: Tensor, given: Tensor, cfg_scale: float, mask_id: int, **options: Tensor) -> Tensor:
    if cfg_scale <= 0:
        return model(xt, **options).logits
    both = torch.cat([xt, xt.masked_fill(given, mask_id)])
    cond, un = model(both, **{name: torch.cat([t, t]) for name, t in options.items()}).logits.chunk(2)
    return torch.lerp(un, cond, cfg_scale + 1)


def _without_ends(logits: Tensor, x0: Tensor, probability: Tensor) -> Tensor:
    """The probability of x0 among tokens that are neither EOS nor EoT; 0 of these two."""
    ends = (logits[..., [EOS, EOT]].float() - logits.gather(-1, x0.unsqueeze(-1)).float()).exp().sum(-1)
    others = torch.maximum(1 - ends * probability, probability)
    return torch.where((x0 == EOS) | (x0 == EOT), 0, probability / others)
