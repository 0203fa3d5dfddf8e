"""Block models sampled from left to right: a block at a time, given the clean ones before it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_integer, check_tokens
from fastdiff.evaluating import Model
from fastdiff.generation.block_cache import Cache
from fastdiff.generation.unmasking import Canvas, Move, Network, Plan, Sampler, draw_tokens, unmask

Plans = list[tuple[slice, Plan]]  # of the blocks that have something to draw, from left to right


class BlockNetwork(Network):
    """A block model that is asked about a block of sequences: its cache, or a model of all tokens up to its end."""

    def __init__(self, model: Model, cache: Cache | None) -> None:
        lm_head = getattr(cache, "lm_head", None)
        of_cache: Any = cache if lm_head is None else (cache, lm_head)
        super().__init__(model if cache is None else of_cache, 0.0)
        self.cache = cache

    def go_to(self, before: Tensor) -> None:
        """Next is the block after the clean tokens `before` [B, n]."""
        self.before = before
        if self.cache is not None and self.cache.tokens.shape[1] < before.shape[1]:
            self.cache.append(before[:, self.cache.tokens.shape[1] :])

    def tokens(self, xt: Tensor, free: Tensor, rows: Tensor, **options: Any) -> Any:
        if self.cache is not None:
            z = self(xt, rows)
        else:
            z = self(torch.cat([self.before[rows], xt], 1))[:, self.before.shape[1] :]
        return draw_tokens(z, self.lm_head, self.bias, xt, sample_ids=rows, **options)


def checked_block_length(block_length: int | None, cache: Cache | None, given: Tensor) -> int:
    """The length of a block model's blocks.

    Args:
        given: [B, L], what is given, -1 elsewhere.

    Raises:
        TypeError, ValueError: no length, or a cache of another one, of another number of sequences, for shorter ones,
            or of other tokens than those that they begin with.
    """
    if cache is None:
        if block_length is None:
            raise ValueError("block_length: expected that of the block model, got None")
        return check_integer("block_length", block_length, 1)
    if block_length not in (None, cache.block_length):
        raise ValueError(f"block_length: expected the block model's, {cache.block_length}, or None, got {block_length}")
    check_tokens("cache.tokens", cache.tokens, None)
    b, held = cache.tokens.shape
    most = getattr(cache, "max_length", None)
    if most is not None and given.shape[1] > most:
        raise ValueError(f"length: expected at most {most} tokens, for which the cache is, got {given.shape[1]}")
    if b != len(given):
        raise ValueError(f"cache: expected one of num_samples = {len(given)} sequences, got one of {b}")
    if held % cache.block_length:
        raise ValueError(f"cache: expected whole blocks of {cache.block_length} tokens, got {held} tokens")
    if not torch.equal(cache.tokens, given[:, :held].to(cache.tokens)):
        raise ValueError(f"cache: expected the tokens that the sequences begin with, got {held} others")
    return cache.block_length


def plans_of_blocks(
    length: int, start: int, block_length: int, steps: int | None, moves: Callable[[int], list[Move]]
) -> Plans:
    """A plan for each block that has positions from `start` on: as many steps as these, or an even share of `steps`.

    Raises:
        ValueError: steps that the blocks cannot share evenly.
    """
    blocks = range(start // block_length * block_length, length if start < length else 0, block_length)
    if steps is not None and blocks and steps % len(blocks):
        raise ValueError(f"steps: expected a multiple of the {len(blocks)} blocks to fill, got {steps}")
    plans: Plans = []
    for begin in blocks:
        end, first = min(begin + block_length, length), sum(plan.steps for _, plan in plans)
        own = end - max(begin, start) if steps is None else steps // len(blocks)
        plans.append((slice(begin, end), Plan(own, None, moves(own), first)))
    return plans


def unmask_blocks(
    canvas: Canvas,
    network: BlockNetwork,
    plans: Plans,
    sampler: Sampler,
    options: dict[str, Any],
    end_token: int | None,
) -> Iterator[None]:
    """Fills the canvas block after block, each by its plan. After an end token all is filled with it."""
    for block, plan in plans:
        part = Canvas(canvas.xt[:, block], canvas.free[:, block], canvas.mask_index, 0, canvas.seed)
        if not part.moving().any():
            continue
        network.go_to(canvas.xt[:, : block.start])
        for _ in unmask(part, network, plan, sampler, options):
            if end_token is not None:
                _end(canvas, end_token)
            yield


def _end(canvas: Canvas, end_token: int) -> None:
    """Fills sequences up after the first end token that was drawn, once no mask is left in front of it."""
    unknown = canvas.moving().cummax(1).values
    ends = (canvas.xt == end_token) & canvas.free & ~unknown
    canvas.xt[ends.cummax(1).values & canvas.free] = end_token
