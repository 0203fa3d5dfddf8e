"""NVIDIA NeMo Automodel: the losses of its dLLM recipes, from hidden states.

undo = apply_to_nemo()
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import linear_dce_loss
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import around, patch, setting

LOSSES, STRATEGIES = "nemo_automodel.components.loss.dllm_loss", "nemo_automodel.recipes.dllm.strategy"


def apply_to_nemo() -> Callable[[], None]:
    """Replaces how the strategies MDLM, Hybrid and IDLM train, and DFlash's loss, and returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    strategies = tuple(around(STRATEGIES, name, forward_backward=make) for name, make in SEAMS.items())
    return patch("NeMo Automodel", {STRATEGIES: strategies, LOSSES: (DFlashDecayLoss,)})


class DLLMLossOutput(NamedTuple):
    """What the recipe takes from a loss: total_loss for backward, dllm_loss for the log; the others are of DFlash."""

    total_loss: Tensor
    dllm_loss: Tensor
    draft_correct_per_pos: Tensor | None = None
    draft_count_per_pos: Tensor | None = None


class Scored(NamedTuple):
    """What a loss asks of each hidden state, [B, L] or [B, 2 L]: the loss is the sum of weight times cross-entropy.

    first: L, whose part of the loss is logged. causal: whether the rest is of the model's causal_logits; None if
    nobody asks. balanced: the rest weighs as much as the first L, by a number that has no gradient.
    """

    x0: Tensor
    mask: Tensor
    weight: Tensor
    first: int
    causal: bool | None = None
    balanced: bool = False


def without_logits(published: Any, loss: str, scored: Callable[..., Scored]) -> Callable[..., None]:
    """A strategy's forward and backward in which the model gives the loss of what is scored where it gave logits."""

    def forward_backward(
        self: Any,
        recipe: Any,
        idx: int,
        batch: dict[str, Any],
        *,
        loss_buffer: list[Tensor],
        num_diffusion_tokens: int,
        num_ar_tokens: int | None = None,
        num_batches: int,
        is_train: bool = True,
    ) -> None:
        step = partial(
            published,
            self,
            recipe,
            idx,
            batch,
            loss_buffer=loss_buffer,
            num_diffusion_tokens=num_diffusion_tokens,
            num_ar_tokens=num_ar_tokens,
            num_batches=num_batches,
            is_train=is_train,
        )
        rows = None
        known = "_noise_mask" in batch and num_diffusion_tokens is not None
        if known and type(recipe.dllm_loss_fn).__name__ == loss:
            device = recipe.dist_env.device
            here = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            rows = scored(recipe, here, max(num_diffusion_tokens, 1), num_ar_tokens or 1)
        if rows is None:
            step()
        else:
            with _loss_fn(recipe, rows) as ours, setting(recipe, "dllm_loss_fn", ours):
                step()

    return forward_backward


@contextmanager
def _loss_fn(recipe: Any, rows: Scored) -> Iterator[Any]:
    """In the place of the recipe's: the loss, given what the model gives in the place of its logits."""
    x0, mask, weight, first, causal, balanced = rows
    halves = first < x0.shape[1] and not balanced
    reduction = "none" if balanced else "sum"
    options = dict(mask=mask, weight=weight, exclude_mask=False, reduction=reduction, return_stats=halves)
    with _head(recipe).dce_loss(x0, **options) as loss_of:

        def loss_fn(logits: Tensor, *_: Any, causal_logits: Tensor | None = None, **__: Any) -> DLLMLossOutput:
            if causal not in (None, causal_logits is not None):
                raise ValueError(f"causal_logits: expected {'some' if causal else 'None'} of this dlm_paradigm")
            if balanced:
                noisy, clean = (half.sum() for half in loss_of(logits).split(first, 1))
                return DLLMLossOutput(noisy + (noisy / clean.clamp_min(1e-6)).detach() * clean, noisy.detach())
            if not halves:
                total = loss_of(logits)
                return DLLMLossOutput(total, total.detach().clone())
            total, stats = loss_of(logits)
            return DLLMLossOutput(total, (weight * stats.nll)[:, :first].sum())

        yield loss_fn


def mdlm(recipe: Any, batch: dict[str, Tensor], num_diffusion_tokens: int, _: int) -> Scored:
    x0 = batch["_clean_input_ids"]
    weight = (1 / batch["_p_mask"].clamp(min=1e-8)).double() / num_diffusion_tokens
    return Scored(x0, batch["_noise_mask"] & batch["loss_mask"].bool(), weight, x0.shape[1])


def hybrid(recipe: Any, batch: dict[str, Tensor], num_diffusion_tokens: int, num_ar_tokens: int) -> Scored:
    """In two paradigms of [xt, x0]; in the second of them x0 predicts the next token."""
    x0, mask, weight, length, *_ = mdlm(recipe, batch, num_diffusion_tokens, num_ar_tokens)
    weight = recipe.dllm_loss_fn.alpha * weight
    paradigm = getattr(recipe.model_parts[0].config, "dlm_paradigm", None)
    if paradigm not in ("block_diff", "sbd_block_diff"):
        return Scored(x0, mask, weight, length, causal=False)
    causal = paradigm == "sbd_block_diff"
    predicted, even = _following(batch["loss_mask"].bool()) & causal, torch.full_like(weight, 1 / num_ar_tokens)
    halves = (x0, _following(x0)), (mask, predicted), (weight, even)
    x0, mask, weight = (torch.cat(two, 1) for two in halves)
    return Scored(x0, mask, weight, length, causal)


def idlm(recipe: Any, batch: dict[str, Tensor], num_diffusion_tokens: int, _: int) -> Scored:
    """Of [xt, x0], where each half predicts the next token."""
    loss_fn = recipe.dllm_loss_fn
    x0, mask = batch["_clean_input_ids"], batch["_noise_mask"].bool()
    if "attention_mask" in batch:
        mask = mask & batch["attention_mask"].bool()
    even = torch.full(x0.shape, 1 / num_diffusion_tokens, dtype=torch.float64, device=x0.device)
    weight = torch.cat([even, even if loss_fn.auto_balance else loss_fn.clean_loss_weight * even], 1)
    x0, mask = (_following(tensor).repeat(1, 2) for tensor in (x0, mask))
    return Scored(x0, mask, weight, even.shape[1], balanced=loss_fn.auto_balance)


SEAMS = {
    "MDLMStrategy": partial(without_logits, loss="MDLMCrossEntropyLoss", scored=mdlm),
    "HybridStrategy": partial(without_logits, loss="HybridDiffusionLLMLoss", scored=hybrid),
    "IDLMStrategy": partial(without_logits, loss="IDLMLoss", scored=idlm),
}


class DFlashDecayLoss:
    def forward_fused(
        self: Any,
        hidden: Tensor,
        lm_head_weight: Tensor,
        target_ids: Tensor,
        block_mask: Tensor,
        num_tokens: int | None = None,
        block_size: int | None = None,
        lm_head_bias: Tensor | None = None,
    ) -> DLLMLossOutput:
        """As published, of hidden [B, T, D]: cross-entropy weighted by decay and block_mask [B, T], and accuracies."""
        weight = block_mask * self._decay_weights(hidden.shape[1], block_size, hidden.device, torch.float64)
        options = dict(mask=block_mask != 0, weight=weight, exclude_mask=False, reduction="sum")
        loss, stats = linear_dce_loss(
            hidden, lm_head_weight, target_ids, bias=lm_head_bias, return_stats=True, **options
        )
        if self.normalize == "mean":
            loss = loss / (weight.sum() + 1e-6)
        elif num_tokens is not None:
            loss = loss / max(num_tokens, 1)
        accuracies = self._draft_acc_per_pos(stats.correct, block_mask, block_size)
        return DLLMLossOutput(loss, loss.detach().clone(), *accuracies)


def _head(recipe: Any) -> LossHead:
    """Of a model that is called as the recipe does."""
    model, dtype = recipe.model_parts[0], getattr(recipe.distributed_config, "autocast_dtype", None)

    def logits(tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, dtype, enabled=dtype is not None):
            out = model(input_ids=tokens)
        return getattr(out, "logits", out)

    return LossHead(model, logits=logits)


def _following(tokens: Tensor) -> Tensor:
    """Of each position the next one's; the last has none (0, False)."""
    return F.pad(tokens[:, 1:], (0, 1))
