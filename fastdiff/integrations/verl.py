"""DARE (yjyddq/DARE, a verl): the log-probabilities that its actors' losses are made of, without logits.

undo = apply_to_verl()

It holds for the actors d1, coupled_grpo, vrpo and bgpo, of LLaDA and of Dream, which inherit them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checks import check_values
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import patch
from fastdiff.integrations.transformers import logits_are_shifted

Found = tuple[Tensor | None, Tensor, Tensor]


def apply_to_verl() -> Callable[[], None]:
    """Replaces `_forward_micro_batch` of the actors, and returns what puts the published methods back.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("DARE", {f"verl.workers.actor.llada_dp_actor_{name}": (actor,) for name, actor in ACTORS.items()})


def _actor(log_probs: Callable[[Tensor, Tensor, int], Tensor]) -> type:
    """For the class of that name of one module; log_probs: what it makes of log-probabilities."""

    class DLLMDataParallelPPOActor:
        def _forward_micro_batch(
            self: Any,
            micro_batch: Any,
            temperature: float,
            n_l: int,
            mc_num: int,
            calculate_entropy: bool = False,
            call_fn_name: str = "",
        ) -> Found:
            return _found(self, micro_batch, log_probs, calculate_entropy)

    return DLLMDataParallelPPOActor


class DLLMDataParallelPPOActor:
    """For that of `llada_dp_actor_vrpo`, which takes no temperature."""

    def _forward_micro_batch(
        self: Any, micro_batch: Any, n_l: int, mc_num: int, calculate_entropy: bool = False, call_fn_name: str = ""
    ) -> Found:
        return _found(self, micro_batch, _mean_of_a_token, calculate_entropy)


def _found(
    actor: Any, micro_batch: Any, log_probs: Callable[[Tensor, Tensor, int], Tensor], with_entropy: bool
) -> Found:
    """What an actor's `_forward_micro_batch` gives, from passes that are there already.

    Args:
        actor: has actor_module, (tokens [1, n], cu_seqlens, max_seqlen) -> an object with `.logits`, its last layer as
            in `LossHead`.
        micro_batch: input_ids and attention_mask [B, L], responses [B, R], perturbed_seq, mask_indices and p_mask
            [B, M, L]: M passes of each sequence.

    Returns:
        -p log p of what follows, or None; log-probabilities, as log_probs makes them; and sum log p / p_mask of the
        passes over R, [B, M, R].

    Raises:
        ValueError: sequence parallelism; a sequence of no masked token; or (on the CPU) a token that the model makes
            impossible, of which no ratio can be made.
        ValueError, TypeError, RuntimeError: as `LossHead`.
    """
    if getattr(actor, "use_ulysses_sp", False):
        raise ValueError("ulysses_sequence_parallel_size: expected 1, for the last layer must see whole sequences")
    passes, size = micro_batch["mask_indices"].shape[1], micro_batch["responses"].shape[-1]
    logps = torch.stack([_logps(actor, micro_batch, i) for i in range(passes)], 1)
    weighted = logps / micro_batch["p_mask"].where(micro_batch["mask_indices"], 1)
    log_prob = log_probs(logps, weighted, size)
    loss_per_sample = (weighted.sum(-1, keepdim=True) / size).expand(-1, -1, size).contiguous()
    return -log_prob.exp() * log_prob if with_entropy else None, log_prob, loss_per_sample


def _logps(actor: Any, micro_batch: Any, i: int) -> Tensor:
    """log p of the tokens that are masked in pass i, 0 elsewhere: [B, L]. Sequences go in one after the other."""
    seen, masked = micro_batch["attention_mask"] == 1, micro_batch["mask_indices"][:, i]
    check_values("mask_indices", masked, ~(masked & seen).any(1, keepdim=True), "a masked token in each sequence")
    lengths, shift = seen.sum(1), int(logits_are_shifted(actor.actor_module.config))

    def at_logits(tokens: Tensor) -> Tensor:
        """[1, n] of [B, L]: where the logits at j predict token j + 1, nothing predicts the first."""
        return F.pad(tokens[seen][shift:], (0, shift)).unsqueeze(0)

    options: dict[str, Any] = dict(mask=at_logits(masked), exclude_mask=False)
    packed = dict(cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(), max_seqlen=int(lengths.max()))
    with (
        torch.autocast("cuda", torch.bfloat16, enabled=seen.is_cuda),
        LossHead(actor.actor_module).token_logps(at_logits(micro_batch["input_ids"]), **options) as logps_of,
    ):
        logps = logps_of(actor.actor_module(micro_batch["perturbed_seq"][:, i][seen].unsqueeze(0), **packed).logits)
    check_values("input_ids", logps, logps.isinf(), "finite log-probabilities")
    packed_logps = F.pad(logps[0], (shift, 0))[: int(lengths.sum())]
    return logps.new_zeros(seen.shape).masked_scatter(seen, packed_logps)


def _of_answers(logps: Tensor, weighted: Tensor, size: int) -> Tensor:
    return logps[..., -size:]


def _coupled(logps: Tensor, weighted: Tensor, size: int) -> Tensor:
    """All masked, and a mask and its complement together."""
    return (logps[:, 0] + weighted[:, 1:3].sum(1)) / 2


def _of_sequences(logps: Tensor, weighted: Tensor, size: int) -> Tensor:
    return weighted.sum(-1).mean(1, keepdim=True).expand(-1, size)


def _mean_of_a_token(logps: Tensor, weighted: Tensor, size: int) -> Tensor:
    return _of_sequences(logps, weighted, size) / size


ACTORS = {
    "d1": _actor(_of_answers),
    "coupled_grpo": _actor(_coupled),
    "vrpo": DLLMDataParallelPPOActor,
    "bgpo": _actor(_of_sequences),
}
