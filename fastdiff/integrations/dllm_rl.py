"""dLLM-RL (Gen-Verse/dLLM-RL): the log-probabilities of its policy steps, without logits, for train/rl_*.py:

    logp_new_tok = masked_logps(model, labels, p_mask_lm, input_ids=input_ids)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checks import check_bool, check_tokens, check_values
from fastdiff.integrations.loss_head import LossHead


def masked_logps(
    model: nn.Module,
    labels: Tensor,
    p_mask: Tensor,
    *,
    shift: bool = False,
    start_pos: int | None = None,
    **inputs: Any,
) -> Tensor:
    """log p of the masked tokens, in nats, 0 elsewhere: [B, T], float32 (float64 for float64 weights), with gradient.

    Args:
        model: (**inputs) -> an object with `.logits`; its last layer as in `LossHead`.
        labels: [B, T] int64, the clean tokens; what they are where nothing is masked plays no part.
        p_mask: [B, T] bool, the masked tokens.
        shift: the logits at i predict token i + 1 (Dream); the result is [B, T - 1], of the tokens from the second on.
        start_pos: SDAR and TraDo: inputs are a prompt of so many tokens, an answer to read, and its noised copy, whose
            logits count. None means one logit a label.
        inputs: what the model is called with.

    Raises:
        ValueError: a sequence with nothing masked, or (on the CPU) a token that the model makes impossible, of which no
            ratio can be made.
        ValueError, TypeError, RuntimeError: as `LossHead`.
    """
    check_tokens("labels", labels, None)
    check_bool("p_mask", p_mask, labels.shape, labels.device)
    check_values("p_mask", p_mask, ~p_mask.any(1, keepdim=True), "a masked token in each sequence")
    shown = labels.shape[1] - (labels.shape[1] if start_pos is None else start_pos)

    def at_logits(tokens: Tensor) -> Tensor:
        if shift:
            tokens = F.pad(tokens[:, 1:], (0, 1))
        return torch.cat([tokens[:, :-shown], torch.zeros_like(tokens[:, -shown:]), tokens[:, -shown:]], 1) if shown else tokens

    with LossHead(model).token_logps(at_logits(labels), mask=at_logits(p_mask), exclude_mask=False) as logps_of:
        logps = logps_of(model(**inputs).logits)
    if shown:
        logps = torch.cat([logps[:, : -2 * shown], logps[:, -shown:]], 1)
    check_values("labels", logps, logps.isinf(), "finite log-probabilities")
    return logps[:, :-1] if shift else logps
