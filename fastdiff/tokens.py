"""Tokens drawn from a model's logits, or from hidden states without logits, where a sequence is masked."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checks import check_bool, check_integer, check_rows, check_tokens, vocabulary_index
from fastdiff.noising import resolve_seed
from fastdiff.ops.linear_loss import TILE_BYTES
from fastdiff.ops.row_sample import Drawn, SampleRows, row_sample

Names = tuple[int | Tensor | None, int | Tensor, Tensor | None, torch.Generator | None]


class TokenStats(NamedTuple):
    """What the model thinks of its tokens, [B, L], from p = softmax(logits) at temperature 1, 0 where none was drawn.

    Without gradient.

    probability of the token drawn; margin, the gap between the largest two; neg_entropy, sum p log p in nats; argmax,
    the id of the largest (x_t where none was drawn).
    """

    probability: Tensor
    margin: Tensor
    neg_entropy: Tensor
    argmax: Tensor


@overload
def sample_tokens(logits: Tensor, xt: Tensor, *, return_stats: Literal[False] = ..., **options: object) -> Tensor: ...
@overload
def sample_tokens(
    logits: Tensor, xt: Tensor, *, return_stats: Literal[True], **options: object
) -> tuple[Tensor, TokenStats]: ...
def sample_tokens(  # type: ignore[misc]  # the overloads only tell apart what comes back
    logits: Tensor,
    xt: Tensor,
    *,
    mask: Tensor | None = None,
    mask_index: int = -1,
    exclude_mask: bool = True,
    exclude: Iterable[int] = (),
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    return_stats: bool = False,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Draws a token at each masked position from softmax(logits / temperature); one read of its row, no other rows.

    By exponential races (`reference.race`) in float32, which keep the tail: exact to 1% for p >= 5e-10. Draws are named
    by seed, step, sequence and position: no token depends on those beside it.

    Args:
        logits: [B, L, V] float32, float64, bfloat16 or float16, with any strides before the last.
        xt: [B, L] int64 tokens.
        mask: [B, L] bool, where to draw; None means where xt is the mask.
        mask_index: the mask's id, in [-V, V); with exclude_mask=False also one for which there are no logits.
        exclude_mask: never draw the mask; False where the vocabulary has none. exclude: other ids never to draw.
        temperature: >= 0; 0, and what is below 1e-6, takes the largest, of equal ones the first.
        top_k, top_p: keep the top_k largest, then the fewest of largest probability that have top_p of it; ties stay.
        return_stats: also how sure the model is, from the same read.
        seed, step, sample_ids, generator: what names the draws, see `mask_tokens`; step is one number for all.
        backend: None for the best that can run, else "cpu", "triton" or "reference".

    Returns:
        int64 [B, L], xt where nothing is drawn; with return_stats also a `TokenStats`.

    Raises:
        ValueError, TypeError: an argument does not fit; a row has NaN, inf, or no finite number (on a GPU its token
            stays x_t instead).
        BackendUnavailable: the backend named cannot run here.
    """
    check_rows("logits", logits)
    names = _names(temperature, seed, step, sample_ids, generator)
    rows = token_rows(logits, xt, mask, mask_index, exclude_mask, exclude, names)
    _set_law(rows, temperature, top_k, top_p, return_stats)
    return _result(row_sample(rows, backend), return_stats)


def linear_sample_tokens(
    hidden: Tensor,
    lm_head: Tensor,
    xt: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    mask_index: int = -1,
    exclude_mask: bool = True,
    exclude: Iterable[int] = (),
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    return_stats: bool = False,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """`sample_tokens` of hidden @ lm_head.T + bias; logits are made for masked positions only, a few at a time.

    Args:
        hidden: [B, L, D]; lm_head: [V, D], as `nn.Linear.weight`; bias: [V]. All of one type.
        The others: as in `sample_tokens`, whose tokens these are.
    """
    check_rows("hidden", hidden, "D")
    check_rows("lm_head", lm_head, "D")
    if lm_head.dim() != 2 or lm_head.shape[1] != hidden.shape[-1]:
        raise ValueError(f"lm_head: expected shape [V, D={hidden.shape[-1]}], got {tuple(lm_head.shape)}")
    z = hidden.new_empty(()).expand(*hidden.shape[:-1], len(lm_head))
    names = _names(temperature, seed, step, sample_ids, generator)
    rows = token_rows(z, xt, mask, mask_index, exclude_mask, exclude, names)
    _set_law(rows, temperature, top_k, top_p, return_stats)
    whole = Drawn(
        rows.xt.clone(), rows.xt.clone(), torch.zeros(3, *rows.xt.shape, dtype=torch.float32, device=xt.device)
    )
    length = max(1, TILE_BYTES[hidden.device.type] // (len(lm_head) * hidden.element_size()))
    for part in rows.live.nonzero().split(length):
        at = part.unbind(1)
        drawn = row_sample(rows.at(F.linear(hidden[at], lm_head, bias), *at), backend)
        whole.tokens[at] = drawn.tokens
        if return_stats:
            whole.argmax[at], whole.stats[:, at[0], at[1]] = drawn.argmax, drawn.stats
    return _result(whole, return_stats)


def _names(
    temperature: float,
    seed: int | Tensor | None,
    step: int | Tensor,
    sample_ids: Tensor | None,
    generator: torch.Generator | None,
) -> Names:
    """At temperature 0 nothing is drawn, so that no generator is asked for a seed."""
    return (0, step, sample_ids, None) if temperature == 0 and seed is None else (seed, step, sample_ids, generator)


def token_rows(
    z: Tensor,
    xt: Tensor,
    mask: Tensor | None,
    mask_index: int | None,
    exclude_mask: bool,
    exclude: Iterable[int],
    names: Names,
) -> SampleRows:
    """Where to draw, from which ids, and the names of the draws, checked. Without a mask_index: everywhere."""
    num_states, (seed, step, sample_ids, generator) = z.shape[-1], names
    if z.dim() != 3:
        raise ValueError(f"logits: expected shape [B, L, V], got {tuple(z.shape)}")
    check_tokens("xt", xt, z.shape[:-1], z.device)
    xt = xt.long().contiguous()
    excluded = {vocabulary_index("exclude", i, num_states) for i in exclude}
    if mask_index is not None and (exclude_mask or check_integer("mask_index", mask_index) < 0):
        mask_index = vocabulary_index("mask_index", mask_index, num_states)
        excluded |= {mask_index} if exclude_mask else set()
    if len(excluded) == num_states:
        raise ValueError(f"exclude: expected to leave one of {num_states} ids, got all")
    live = torch.ones_like(xt, dtype=torch.bool) if mask_index is None else xt == mask_index
    if mask is not None:
        check_bool("mask", mask, xt.shape, xt.device)
        live = mask.contiguous()
    if sample_ids is None:
        sample_ids = torch.arange(len(xt), device=z.device)
    check_tokens("sample_ids", sample_ids, xt.shape[:1], z.device)
    return SampleRows(
        z=z,
        xt=xt,
        live=live,
        law=None,
        exclude=torch.stack([_filled(i, z.device) for i in sorted(excluded)]) if excluded else None,
        seed=resolve_seed(seed, generator, z.device),
        step=_one_step(step, z.device),
        sample_ids=sample_ids.long().unsqueeze(1).expand(xt.shape).contiguous(),
        positions=torch.arange(xt.shape[1], device=z.device).expand(xt.shape).contiguous(),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        with_stats=False,
    )


def _one_step(step: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(step, Tensor) and step.numel() != 1:
        raise ValueError(f"step: expected one number, got shape {tuple(step.shape)}")
    if isinstance(step, Tensor):
        return step.to(device, torch.int64).reshape(())
    return _filled(check_integer("step", step), device)


def _filled(number: int, device: torch.device) -> Tensor:
    """A number on a device, which a copy from the host would wait for."""
    return torch.full((), number, dtype=torch.int64, device=device)


def check_temperature(temperature: float) -> float:
    """A temperature that float32 can divide by, or 0. Beyond 1e-6 and 1e30 the law is at its limit."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    return min(float(temperature), 1e30) if temperature >= 1e-6 else 0.0


def _set_law(rows: SampleRows, temperature: float, top_k: int | None, top_p: float | None, with_stats: bool) -> None:
    if top_k is not None and check_integer("top_k", top_k) < 1:
        raise ValueError(f"top_k: expected at least 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1] or None, got {top_p}")
    rows.temperature, rows.with_stats = check_temperature(temperature), with_stats
    rows.top_k, rows.top_p = 0 if top_k is None else int(top_k), 1.0 if top_p is None else float(top_p)


def _result(drawn: Drawn, return_stats: bool) -> Tensor | tuple[Tensor, TokenStats]:
    if not return_stats:
        return drawn.tokens
    probability, margin, neg_entropy = drawn.stats.unbind(0)
    return drawn.tokens, TokenStats(probability, margin, neg_entropy, drawn.argmax)
