"""The mean embedding under a model's own conditionals, from hidden states without logits."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.checks import check_bool, check_integer, check_rows, vocabulary_index
from fastdiff.losses.linear_losses import last_layer
from fastdiff.losses.logps import at_temperature
from fastdiff.ops.linear_soft import linear_soft
from fastdiff.ops.parallel import shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_soft_embeddings(
    hidden: Tensor,
    lm_head: Tensor,
    embedding: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    mask_index: int = -1,
    exclude_mask: bool = True,
    capacity: int | None = None,
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """Mean embeddings sum_v p_v E_v, p = softmax(logits / temperature) of logits that are never whole in memory.

    They tell a model what it expects where a token is masked, as an input of its next pass. Only the rows of the mask
    are multiplied; backward makes their logits once more. Under autocast it multiplies in autocast's type.

    Args:
        hidden: [..., D] float32, float64, bfloat16 or float16.
        lm_head: [V, D] of hidden's type (any, under autocast), as `nn.Linear.weight`.
        embedding: E, [V, D'] of lm_head's type, as `nn.Embedding.weight`; None is lm_head, for tied weights.
        bias, softcap, capacity: as in `linear_dce_loss`. If there are more rows than capacity, all is NaN.
        mask: [...] bool, the rows that are asked for. None is all.
        temperature: > 0, divides the logits after bias and softcap.
        mask_index: the mask's id, negative from the end. exclude_mask: give it no probability; False is for
            vocabularies without a mask, too.
        group: the ranks over whose ids lm_head, bias and embedding are cut, in equal parts in the order of ranks; each
            may also be a DTensor sharded along V. All else is the same on all ranks, and so is what comes back.

    Returns:
        [..., D'] of the embedding's type, 0 where the mask is False. With gradients of hidden, lm_head, bias and
        embedding.

    Raises:
        ValueError, TypeError: as `linear_dce_loss`; embedding or mask does not fit; temperature is not a finite number
            > 0.
        BackendUnavailable: the backend named cannot run here.
    """
    own = lm_head if embedding is None else embedding
    check_rows("embedding", own, "D'")
    if own.dim() != 2 or own.shape[0] != lm_head.shape[0]:
        raise ValueError(f"embedding: expected shape [V={lm_head.shape[0]}, D'], got {tuple(own.shape)}")
    head = at_temperature(last_layer(hidden, lm_head, bias, softcap, capacity, group), temperature)
    own = shard_of("embedding", own, 0, group)[0]
    if own.device != head.hidden.device:
        raise ValueError(f"embedding: expected a tensor on {head.hidden.device}, got {own.device}")
    if own.dtype != lm_head.dtype:
        raise TypeError(f"embedding: expected {lm_head.dtype} as lm_head is, got {own.dtype}")
    z = head.logits_like()
    mask, excluded = head.shard.checked(z.device, _where, z, mask, mask_index, exclude_mask)
    return linear_soft(head, own, mask, excluded, backend).to(own.dtype)


def _where(z: Tensor, mask: Tensor | None, mask_index: int, exclude_mask: bool) -> tuple[Tensor, int]:
    """The rows, and the id without probability or -1."""
    shape = z.shape[:-1]
    if mask is not None:
        check_bool("mask", mask, shape, z.device)
    check_integer("mask_index", mask_index)
    excluded = vocabulary_index("mask_index", mask_index, z.shape[-1]) if exclude_mask else -1
    return torch.ones(shape, dtype=torch.bool, device=z.device) if mask is None else mask, excluded
