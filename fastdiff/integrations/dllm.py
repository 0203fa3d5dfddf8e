"""dllm (ZHZisZZ/dllm): the loss of MDLMTrainer and BD3LMTrainer, and of those that inherit it (DreamTrainer).

undo = apply_to_dllm()
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import dce_loss, mask_tokens
from fastdiff.checks import check_choice, check_values
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import patch
from fastdiff.noise.blocks import two_streams_mask


def apply_to_dllm() -> Callable[[], None]:
    """Replaces `compute_loss` of both trainers and `prediction_step`, and returns what puts the published ones back.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("dllm", {"dllm.core.trainers": (MDLMTrainer, BD3LMTrainer)})


class MDLMTrainer:
    """For `dllm.core.trainers.MDLMTrainer`."""

    def compute_loss(
        self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Cross-entropy of masked tokens, weighted by time, in nats over the trainer's norm.

        Masks are those of the published method under the same torch seed. Logits are made where outputs are asked for,
        and neither copied nor shifted: where those at i predict token i + 1, tokens, masks and weights move instead,
        and nothing predicts the first token.

        Args:
            model: (input_ids, attention_mask) -> an object with `.logits` [B, L, V]; its last layer as in `LossHead`.
            inputs: input_ids and labels [B, L] int64, labels -100 where a token is never masked; maybe an
                attention_mask.
            return_outputs: also return the model's outputs, with their logits shifted.

        Raises:
            ValueError, TypeError: padding is not on the right, an unknown norm, or (on the CPU) a label that is neither
                the token nor -100.
            ValueError, TypeError, RuntimeError: as `LossHead`.
        """
        return _compute_loss(self, model, inputs, return_outputs, _mdlm_arguments)

    @torch.no_grad()
    def prediction_step(
        self: Any, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(loss, logits, labels) of a batch in evaluation; logits are made unless only the loss is asked for."""
        if prediction_loss_only:
            return self.compute_loss(model, inputs), None, None
        loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs.logits, inputs["labels"]


class BD3LMTrainer:
    """For `dllm.core.trainers.BD3LMTrainer`."""

    def compute_loss(
        self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """As `MDLMTrainer.compute_loss`, from the noised and the clean tokens side by side.

        Args:
            model: (input_ids, attention_mask, position_ids) -> an object with `.logits` [B, 2 L, V]; its attention is
                "sdpa" or "flex_attention".
            inputs, return_outputs: as there.

        Raises:
            ValueError, TypeError: as there; another kind of attention.
        """
        return _compute_loss(self, model, inputs, return_outputs, _bd3lm_arguments)


def _mdlm_arguments(trainer: Any, model: Any, xt: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    return dict(input_ids=xt, attention_mask=inputs.get("attention_mask"))


def _bd3lm_arguments(trainer: Any, model: Any, xt: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    kind, (batch, length) = trainer.accelerator.unwrap_model(model).config._attn_implementation, xt.shape
    check_choice("model's _attn_implementation", kind, ("sdpa", "flex_attention"))
    sees = two_streams_mask(length, trainer.block_size)
    at = torch.arange(2 * length, device=xt.device)
    if kind == "sdpa":
        attention_mask: Any = sees(None, None, at.unsqueeze(1), at).expand(1, 1, -1, -1)
    else:
        from torch.nn.attention.flex_attention import create_block_mask

        attention_mask = create_block_mask(sees, None, None, 2 * length, 2 * length, device=xt.device)
    both, position_ids = torch.cat([xt, inputs["input_ids"]], 1), (at % length).expand(batch, -1)
    return dict(input_ids=both, attention_mask=attention_mask, position_ids=position_ids)


def _compute_loss(
    trainer: Any, model: Any, inputs: dict[str, Any], return_outputs: bool, arguments: Callable[..., dict[str, Any]]
) -> Tensor | tuple[Tensor, Any]:
    tokenizer = trainer.processing_class
    check_choice("padding_side", tokenizer.padding_side, ("right",))
    inputs = trainer._preprocess_inputs(inputs)
    x0, labels = inputs["input_ids"], inputs["labels"]
    maskable, counts = labels != -100, (labels != -100).sum(1)
    check_values("labels", labels, maskable & (labels != x0), "input_ids or -100")
    made: dict[str, Any] = dict(dtype=torch.float32, device=x0.device)
    t = trainer.time_epsilon + (1 - trainer.time_epsilon) * torch.rand(len(x0), **made)
    p_mask, uniforms = 1 - trainer.scheduler(t), torch.rand(x0.shape, **made)
    xt, mask = mask_tokens(x0, p_mask, mask_index=tokenizer.mask_token_id, maskable=maskable, uniforms=uniforms)
    norms = dict(token=counts.sum().clamp_min(1), sequence=counts.clamp_min(1).unsqueeze(1) * len(x0), batch=len(x0))
    check_choice("loss_norm_type", trainer.loss_norm_type, tuple(norms))
    weight = trainer._compute_loss_weights(t=t, inputs=inputs, masked_mask=mask)
    asked, shift = arguments(trainer, model, xt, inputs), int(trainer.right_shift_logits)

    def at_logits(tokens: Tensor) -> Tensor:
        """[B, L] moved to the logits that predict it, 0 where they predict nothing."""
        tokens = tokens[:, shift:]
        return F.pad(tokens, (0, asked["input_ids"].shape[1] - tokens.shape[1]))

    options: dict[str, Any] = dict(x0=at_logits(x0), mask=at_logits(mask), exclude_mask=False, reduction="sum")
    options |= dict(weight=at_logits(weight.double() / norms[trainer.loss_norm_type]), return_stats=True)
    if return_outputs:
        outputs = model(**asked)
        loss, stats = dce_loss(outputs.logits, **options)
    else:
        with LossHead(model).dce_loss(**options) as loss_of:
            loss, stats = loss_of(model(**asked).logits)
    split = "train" if model.training else "eval"
    trainer.meter.update(split=split, value=stats.nll * at_logits(weight), weight=at_logits(maskable).float())
    return (loss, trainer._postprocess_outputs(outputs)) if return_outputs else loss
