"""Log-probabilities of tokens under a temperature, and the entropies they were drawn with, both with gradient."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from fastdiff.checks import check_rows
from fastdiff.losses.linear_losses import last_layer
from fastdiff.losses.row_losses import dce_rows, logits_loss
from fastdiff.ops.chunks import Head
from fastdiff.ops.linear_loss import linear_loss
from fastdiff.ops.row_loss import ENTROPY

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def linear_token_logps(
    hidden: Tensor, lm_head: Tensor, x0: Tensor, *, return_entropy: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden: Tensor, lm_head: Tensor, x0: Tensor, *, return_entropy: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def linear_token_logps(  # type: ignore[misc]  # the overloads only tell apart what comes back
    hidden: Tensor,
    lm_head: Tensor,
    x0: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    mask_index: int = -1,
    exclude_mask: bool = True,
    ignore_index: int = -100,
    capacity: int | None = None,
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logps` of the logits hidden @ lm_head.T + bias, which are never whole in memory.

    Only the scored rows are multiplied, once forward; backward multiplies them once more, a few at a time, and twice
    for the gradients. Under autocast it multiplies in autocast's type.

    Args:
        hidden: [..., D] float32, float64, bfloat16 or float16.
        lm_head: [V, D] of hidden's type (any, under autocast), as `nn.Linear.weight`.
        bias, softcap, capacity, group: as in `linear_dce_loss`.
        x0, mask, temperature, return_entropy, mask_index, exclude_mask, ignore_index, backend: as in `token_logps`,
            with [...] the shape of hidden without D. The temperature divides the logits after bias and softcap.

    Returns:
        As `token_logps`.

    Raises:
        ValueError, TypeError: as `linear_dce_loss`; temperature is not a finite number > 0.
        BackendUnavailable: the backend named cannot run here.
    """
    head = at_temperature(last_layer(hidden, lm_head, bias, softcap, capacity, group), temperature)
    rest = (x0, None, mask, None, mask_index, exclude_mask, ignore_index)
    rows = head.shard.checked(head.hidden.device, dce_rows, head.logits_like(), *rest)
    return _logps(*linear_loss(head, rows, backend, return_entropy), return_entropy)


@overload
def token_logps(logits: Tensor, x0: Tensor, *, return_entropy: Literal[False] = ..., **options: Any) -> Tensor: ...
@overload
def token_logps(
    logits: Tensor, x0: Tensor, *, return_entropy: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def token_logps(  # type: ignore[misc]  # the overloads only tell apart what comes back
    logits: Tensor,
    x0: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    mask_index: int = -1,
    exclude_mask: bool = True,
    ignore_index: int = -100,
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(x0) of every token where p = softmax(logits / temperature), in nats: what a policy gradient is made of.

    Nothing is kept for backward but the logits, divided by the temperature if that is not 1. With upstream gradients u
    of the log-probability and h of the entropy H, that of a logit divided by the temperature is
    u (1[v = x0] - p_v) - h p_v (log p_v + H).

    Args:
        logits: [..., V] float32, float64, bfloat16 or float16. Never changed.
        x0: [...] int64 tokens. Where x0 = ignore_index nothing is scored.
        mask: [...] bool, the scored positions. None scores every position.
        temperature: > 0, divides the logits.
        return_entropy: return (logps, entropy), the entropy -sum_v p_v log p_v of the row with gradient too.
        mask_index: the mask's id, negative from the end.
        exclude_mask: leave v = mask_index out of the softmax (SEDD, RADD, MDLM, Duo) or keep it (LLaDA, Dream). False
            is for vocabularies without a mask, too: True would leave out their last id.
        group: the ranks over which V is cut, as in `dce_loss`; logits may also be a DTensor sharded along V.

    Returns:
        [...] float32 (float64 for float64 inputs), <= 0, and 0 where a token is not scored; or two of these.

    Raises:
        ValueError, TypeError: as `dce_loss`; temperature is not a finite number > 0.
        BackendUnavailable: the backend named cannot run here.
    """
    check_rows("logits", logits)
    rest = (x0, None, mask, None, mask_index, exclude_mask, ignore_index)
    found = logits_loss("logits", _over(logits, temperature), dce_rows, rest, group, backend, return_entropy)
    return _logps(*found, return_entropy)


def at_temperature(head: Head, temperature: float) -> Head:
    """A last layer whose logits are divided by a temperature."""
    hidden, bias = _over(head.hidden, temperature), None if head.bias is None else _over(head.bias, temperature)
    return dataclasses.replace(head, hidden=hidden, bias=bias, softcap=head.softcap / temperature)


def _over(x: Tensor, temperature: float) -> Tensor:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
    return x if temperature == 1 else x / temperature


def _logps(nll: Tensor, stats: Tensor, return_entropy: bool) -> Tensor | tuple[Tensor, Tensor]:
    logps = 0 - nll  # 0, not -0, where nothing is scored
    return (logps, stats[ENTROPY]) if return_entropy else logps
