"""Tokens drawn from a model's logits, or from hidden states without logits, where a sequence is masked."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checks import check_bool, check_integer, check_rows, check_tokens, vocabulary_index
from fastdiff.losses.linear_losses import last_layer
from fastdiff.ops.chunks import TILE_BYTES, Head
from fastdiff.ops.parallel import shard_of
from fastdiff.ops.row_sample import Drawn, SampleRows, row_sample
from fastdiff.ops.sharded_sample import IDS_BYTES, sharded_sample
from fastdiff.philox import resolve_seed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
    group: "ProcessGroup | None" = None,
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
        group: the ranks over which V is cut, in equal parts in the order of ranks; logits may also be a DTensor sharded
            along V. All else is the same on all ranks, and so is what comes back: the tokens of one rank. Without a
            seed it is the first rank's.
        backend: None for the best that can run, else "cpu", "triton" or "reference".

    Returns:
        int64 [B, L], xt where nothing is drawn; with return_stats also a `TokenStats`.

    Raises:
        ValueError, TypeError: an argument does not fit; a row has NaN, inf, or no finite number (on a GPU its token
            stays x_t instead); on every rank of a group, if one refuses its arguments or they differ.
        BackendUnavailable: the backend named cannot run here.
    """
    check_rows("logits", logits)
    logits, shard = shard_of("logits", logits, -1, group)
    head = Head(logits, None, None, 0.0, -1, logits.dtype, shard)
    where, names = (xt, mask, mask_index, exclude_mask, exclude), _names(temperature, seed, step, sample_ids, generator)
    law = (temperature, top_k, top_p, return_stats)
    rows = shard.checked(logits.device, _rows, head.logits_like() if shard.group else logits, where, names, law)
    if not shard.group:
        return _result(row_sample(rows, backend), return_stats)
    return _result(_in_parts(rows, head, lambda at: logits[at], seed is None, backend), return_stats)


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
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """`sample_tokens` of hidden @ lm_head.T + bias; logits are made for masked positions only, a few at a time.

    Args:
        hidden: [B, L, D]; lm_head: [V, D], as `nn.Linear.weight`; bias: [V]. All of one type.
        group: the ranks over whose ids lm_head (and bias) are cut, as in `sample_tokens`; lm_head may also be a DTensor
            sharded along V.
        The others: as in `sample_tokens`, whose tokens these are.
    """
    head = last_layer(hidden, lm_head, bias, 0.0, None, group)
    where, names = (xt, mask, mask_index, exclude_mask, exclude), _names(temperature, seed, step, sample_ids, generator)
    law = (temperature, top_k, top_p, return_stats)
    rows = head.shard.checked(head.hidden.device, _rows, head.logits_like(), where, names, law)

    def logits_at(at: tuple[Tensor, ...]) -> Tensor:
        assert head.lm_head is not None
        return F.linear(head.hidden[at], head.lm_head, head.bias)

    return _result(_in_parts(rows, head, logits_at, seed is None, backend), return_stats)


def _in_parts(
    rows: SampleRows,
    head: Head,
    logits_at: Callable[[tuple[Tensor, ...]], Tensor],
    any_seed: bool,
    backend: str | None,
) -> Drawn:
    """`row_sample` of logits that are made for some rows at a time, new ones each time; over ranks if head is."""
    live, shard, row_bytes = rows.live.nonzero(), head.shard, head.num_states * head.dtype.itemsize
    if shard.group:
        _agree(rows, live, head, any_seed)
        row_bytes = shard.size * (head.dtype.itemsize + IDS_BYTES)  # the same on all ranks
    shape = rows.xt.shape
    whole = Drawn(rows.xt.clone(), rows.xt.clone(), torch.zeros(3, *shape, dtype=torch.float32, device=live.device))
    for part in live.split(max(1, TILE_BYTES[live.device.type] // row_bytes)) if len(live) else ():
        at = part.unbind(1)
        some = rows.at(logits_at(at).detach(), *at)
        drawn = sharded_sample(some, shard, backend) if shard.group else row_sample(some, backend)
        whole.tokens[at] = drawn.tokens
        if rows.with_stats:
            whole.argmax[at], whole.stats[:, at[0], at[1]] = drawn.argmax, drawn.stats
    return whole


def _agree(rows: SampleRows, live: Tensor, head: Head, any_seed: bool) -> None:
    """Raises on all ranks if one has other arguments; the seed, if it is not given, becomes the first rank's."""
    options = hash((rows.temperature, rows.top_k, rows.top_p, rows.with_stats, any_seed))
    names = [rows.step, rows.seed * (not any_seed), torch.full_like(rows.seed, options)]
    names += [rows.sample_ids.flatten(), rows.seed.new_empty(0) if rows.exclude is None else rows.exclude]
    told = [torch.full_like(rows.seed, rows.xt.numel()), torch.full_like(rows.seed, len(live))]
    told += [_digest(rows.xt, live), _digest(*names)]
    head.shard.check_alike(
        head.num_states,
        torch.stack(told),
        "xt: expected the same tokens, places to draw, names of draws and options on every rank of the group, got "
        "different ones",
    )
    rows.seed = head.shard.gather(rows.seed)[0]


def _digest(*numbers: Tensor) -> Tensor:
    """A number that tells int64 tensors apart, by their entries and the order of these."""
    entries = torch.cat([x.flatten() for x in numbers])
    place = torch.arange(1, len(entries) + 1, device=entries.device) * 0x9E3779B97F4A7C1
    return ((entries + place) * (place | 1)).sum()


def _names(
    temperature: float,
    seed: int | Tensor | None,
    step: int | Tensor,
    sample_ids: Tensor | None,
    generator: torch.Generator | None,
) -> Names:
    """At temperature 0 nothing is drawn, so that no generator is asked for a seed."""
    return (0, step, sample_ids, None) if temperature == 0 and seed is None else (seed, step, sample_ids, generator)


def _rows(
    z: Tensor,
    where: tuple[Tensor, Tensor | None, int, bool, Iterable[int]],
    names: Names,
    law: tuple[float, int | None, float | None, bool],
) -> SampleRows:
    rows = token_rows(z, *where, names)
    _set_law(rows, *law)
    return rows


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
