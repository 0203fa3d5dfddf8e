"""DiffuCoder (apple/ml-diffucoder): the log-probabilities that coupled-GRPO's losses are made of, without logits.

undo = apply_to_diffucoder()
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checks import check_values
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import patch


def apply_to_diffucoder() -> Callable[[], None]:
    """Replaces `_get_per_token_logps`, and returns what puts the published method back.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("DiffuCoder", {"open_r1.coupled_grpo": (DiffuGRPOTrainer,)})


class DiffuGRPOTrainer:
    """For `open_r1.coupled_grpo.DiffuGRPOTrainer`."""

    def _get_per_token_logps(self: Any, model: Any, input_ids: Tensor, logits_to_keep: int, mask_seeds: Any) -> Tensor:
        """log p of each answer token, [B, I, R] in nats: half where the answer is masked, half where the token is.

        The second half comes from a mask of the answer or from the others' mask, over the share that each masks. Masks
        are those of the published method, drawn by the trainer's `forward_process`. Only masked rows are multiplied by
        the last layer. The logits at i predict token i + 1.

        Args:
            model: (xt) -> an object with `.logits` [b, L, V]; its last layer as in `LossHead`.
            input_ids: [I, B, L] int64, the sequences once for each iteration; answers are the last R tokens.
            logits_to_keep: R. mask_seeds: I seeds.

        Returns:
            float32 (float64 for float64 weights).

        Raises:
            ValueError: answers of no tokens or without a prompt, not one seed for each iteration, or (on the CPU) a
                token that the model makes impossible, of which no ratio can be made.
            ValueError, TypeError, RuntimeError: as `LossHead`.
        """
        count, _, length = input_ids.shape
        if not 0 < logits_to_keep < length:
            raise ValueError(f"logits_to_keep: expected answers of 1 to {length - 1} tokens, got {logits_to_keep}")
        if len(mask_seeds) != count:
            raise ValueError(f"mask_seeds: expected one for each of {count} iterations, got {len(mask_seeds)}")
        answer = torch.arange(length, device=input_ids.device) >= length - logits_to_keep
        mask_id, seen, masks, weights = self.processing_class.mask_token_id, [], [], []
        for tokens, seed in zip(input_ids, mask_seeds, strict=True):
            xt, weight, some = self.forward_process(tokens, ~answer, mask_id, seed=seed, accumulate=count > 1)
            seen.extend(xt)
            masks.append(torch.stack([answer.expand_as(some), some, answer & ~some]))
            weights.append(weight)
        mask, weight = torch.stack(masks), torch.tensor(weights, dtype=torch.float64, device=answer.device)
        x0 = input_ids.unsqueeze(1).expand(mask.shape)
        x0, scored = (F.pad(tokens[..., 1:], (0, 1)).flatten(0, 2) for tokens in (x0, mask))
        with (
            torch.autocast("cuda", torch.bfloat16, enabled=x0.is_cuda),
            LossHead(model).token_logps(x0, mask=scored, exclude_mask=False) as logps_of,
        ):
            logps = logps_of(model(torch.cat(seen)).logits)
        check_values("input_ids", logps, logps.isinf(), "finite log-probabilities")
        both = (logps.view(mask.shape) * weight[..., None, None]).sum(1) / 2
        return both[..., -logits_to_keep - 1 : -1].transpose(0, 1).to(logps.dtype)
