"""NVIDIA NeMo Automodel: the loss of masked diffusion in its dLLM recipes.

undo = apply_to_nemo()
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from fastdiff import dce_loss
from fastdiff.integrations.patching import patch


def apply_to_nemo() -> Callable[[], None]:
    """Replaces what `MDLMCrossEntropyLoss` computes, not the class, and returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("NeMo Automodel", {"nemo_automodel.components.loss.dllm_loss": (MDLMCrossEntropyLoss,)})


class DLLMLossOutput(NamedTuple):
    """What the recipe takes from a loss: total_loss for backward, dllm_loss for the log; the others are of DFlash."""

    total_loss: Tensor
    dllm_loss: Tensor
    draft_correct_per_pos: Tensor | None = None
    draft_count_per_pos: Tensor | None = None


class MDLMCrossEntropyLoss(nn.Module):
    """Cross-entropy of the masked tokens over their p_mask, in nats, in float32 for any logits.

    Args:
        fp32_upcast: not used; sums are float32 (float64 for float64 logits) in any case.
    """

    def __init__(self, fp32_upcast: bool = True) -> None:
        super().__init__()
        self.fp32_upcast = fp32_upcast

    def forward(
        self,
        logits: Tensor,
        target_ids: Tensor,
        noise_mask: Tensor,
        p_mask: Tensor,
        loss_mask: Tensor,
        loss_mask_ar: Tensor | None = None,
        num_diffusion_tokens: int | None = None,
        num_ar_tokens: int | None = None,
        causal_logits: Tensor | None = None,
        noisy_input_ids: Tensor | None = None,
    ) -> DLLMLossOutput:
        """The loss, summed over this rank's tokens and divided by num_diffusion_tokens (not at all if that is None).

        Args:
            logits: [B, L, V]; may be a DTensor sharded along V, of which each rank reads its own part.
            target_ids: [B, L] int64 clean tokens. noise_mask: [B, L] bool, the masked ones.
            p_mask: [B, L], taken as 1e-8 where it is smaller. loss_mask: [B, L], nonzero where a token is supervised.
            num_diffusion_tokens: of all ranks and accumulated parts.
            loss_mask_ar, num_ar_tokens, causal_logits, noisy_input_ids: of other losses; not used.

        Raises:
            ValueError, TypeError: as `dce_loss`; a DTensor that is not sharded along V alone.
        """
        loss = dce_loss(
            logits,
            target_ids.to(logits.device),
            mask=noise_mask & loss_mask.bool(),
            weight=1 / p_mask.clamp(min=1e-8),
            exclude_mask=False,
            reduction="mean",
            num_items=1 if num_diffusion_tokens is None else max(num_diffusion_tokens, 1),
        )
        return DLLMLossOutput(loss, loss.detach().clone())
