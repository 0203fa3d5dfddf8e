"""d1 (dllm-reasoning/d1): the log-probabilities that diffu-GRPO's losses are made of, without logits.

undo = apply_to_d1()
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import token_logps
from fastdiff.checks import check_values
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import patch


def apply_to_d1() -> Callable[[], None]:
    """Replaces `_get_per_token_logps`, and returns what puts the published method back.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("d1", {"diffu_grpo_trainer": (DiffuGRPOTrainer,)})


class DiffuGRPOTrainer:
    """For `diffu_grpo_trainer.DiffuGRPOTrainer`."""

    def _get_per_token_logps(self: Any, model: Any, input_ids: Tensor, logits_to_keep: int, mask_seeds: Any) -> Tensor:
        """log p of each answer token where the whole answer is masked, and some of the prompt: [I, B, R], in nats.

        Masks are those of the published method, drawn by the trainer's `forward_process`. Only rows of answers are
        multiplied by the last layer. With cfg_scale > 0 logits are made, for they are mixed.

        Args:
            model: (xt) -> an object with `.logits` [b, L, V]; its last layer as in `LossHead`.
            input_ids: [I, B, L] int64, the sequences once for each iteration; answers are the last R tokens.
            logits_to_keep: R. mask_seeds: I seeds.

        Returns:
            float32 (float64 for float64 weights).

        Raises:
            ValueError: answers of no tokens, not one seed for each iteration, or (on the CPU) a token that the model
                makes impossible, of which no ratio can be made.
            ValueError, TypeError, RuntimeError: as `LossHead`.
        """
        count, batch, length = input_ids.shape
        if not 0 < logits_to_keep <= length:
            raise ValueError(f"logits_to_keep: expected answers of 1 to {length} tokens, got {logits_to_keep}")
        if len(mask_seeds) != count:
            raise ValueError(f"mask_seeds: expected one for each of {count} iterations, got {len(mask_seeds)}")
        mask_id, cfg_scale, x0 = self.args.mask_id, self.args.cfg_scale, input_ids.flatten(0, 1)
        prompt = torch.arange(length, device=x0.device) < length - logits_to_keep
        seeded = zip(input_ids, mask_seeds, strict=True)
        xt = torch.cat([self.forward_process(tokens, prompt, mask_id, seed=seed)[0] for tokens, seed in seeded])
        options: dict[str, Any] = dict(mask=(~prompt).expand(x0.shape), exclude_mask=False)
        if cfg_scale > 0:
            logps = token_logps(self.get_logits(model, xt, prompt, cfg_scale, mask_id), x0, **options)
        else:
            with LossHead(model).token_logps(x0, **options) as logps_of:
                logps = logps_of(model(xt).logits)
        logps = logps[:, -logits_to_keep:].unflatten(0, (count, batch))
        check_values("input_ids", logps, logps.isinf(), "finite log-probabilities")
        return logps
