"""dLLM-RL (Gen-Verse/dLLM-RL): the log-probabilities of its policy steps, without logits, in train/rl_*.py:

logp_new_tok = masked_logps(model, labels, p_mask_lm, input_ids=input_ids)
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checks import check_bool, check_tokens, check_values
from fastdiff.integrations.loss_head import LossHead


def masked_logps(
    model: nn.Module,
    labels: Tensor,
    p_mask: Tensor,
    *,
    input_ids: Tensor,
    shift: bool = False,
    start_pos: int | None = None,
    **inputs: Any,
) -> Tensor:
    """log p of the masked tokens, in nats, 0 elsewhere: [B, T], float32 (float64 for float64 weights), with gradient.

    Args:
        model: (input_ids, **inputs) -> an object with `.logits`; its last layer as in `LossHead`.
        labels: [B, T] int64, the clean tokens; what they are where nothing is masked plays no part.
        p_mask: [B, T] bool, the masked tokens.
        input_ids, inputs: what the model is called with.
        shift: the logits at i predict token i + 1 (Dream); the result is [B, T - 1], of the tokens from the second on.
        start_pos: SDAR and TraDo: input_ids are a prompt of so many tokens, an answer to read, and its noised copy,
            whose logits count. None means a logit for each label.

    Raises:
        ValueError: a sequence with nothing masked, or (on the CPU) a token that the model makes impossible, of which no
            ratio can be made.
        ValueError, TypeError, RuntimeError: as `LossHead`.
    """
    check_tokens("labels", labels, None)
    check_bool("p_mask", p_mask, labels.shape, labels.device)
    if shift:
        labels, p_mask = labels[:, 1:], p_mask[:, 1:]
    check_values("p_mask", p_mask, ~p_mask.any(1, keepdim=True), "a masked token in each sequence")
    at = torch.arange(labels.shape[1], device=labels.device)  # the logits of each label
    if start_pos is not None:
        at = at + (at >= start_pos) * (len(at) - start_pos)
    x0, mask = (torch.zeros_like(input_ids, dtype=t.dtype).index_copy(1, at, t) for t in (labels, p_mask))
    with LossHead(model).token_logps(x0, mask=mask, exclude_mask=False) as logps_of:
        logps = logps_of(model(input_ids=input_ids, **inputs).logits)[:, at]
    check_values("labels", logps, logps.isinf(), "finite log-probabilities")
    return logps
