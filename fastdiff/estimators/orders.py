"""The likelihood along one order: given, from left to right, or the one that a sampler takes by what it is sure of.

A network whose conditionals do not agree gives a sequence another probability in every order. A rule that picks the
next tokens from what the network says of the masks, and never from the tokens that they hide, makes of it one
distribution over sequences, whose likelihood is a sum over steps, without noise. (DUEL, arXiv 2603.01367.)
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_choice, check_integer, check_tokens
from fastdiff.estimators.estimate import NLLEstimate
from fastdiff.estimators.scoring import Model, Scorer
from fastdiff.generation.unmasking import RANKED, draw_tokens, largest

ORDERS = ("left-to-right", *RANKED)


@dataclass(frozen=True, eq=False)
class OrderedNLL(NLLEstimate):
    """Negative log-likelihoods of B sequences along one order, in nats; not the time-free ones, means over all orders.

    Nothing is drawn: `stderr` and `bias` are 0, and an interval is the number itself.

    Attributes:
        order: the rule's name, or "given".
        tokens_per_step, block_length: as asked for.
    """

    order: str
    tokens_per_step: int
    block_length: int | None

    def to_dict(self) -> dict[str, Any]:
        """The order, and lists of B numbers, ready for JSON."""
        asked = dict(order=self.order, tokens_per_step=self.tokens_per_step, block_length=self.block_length)
        noise = ("stderr", "low", "high", "bias")
        return asked | {name: column for name, column in super().to_dict().items() if name not in noise}


def ordered_nll(
    model: Model,
    x0: Tensor,
    *,
    mask_index: int,
    order: str | Tensor,
    tokens_per_step: int = 1,
    block_length: int | None = None,
    target: Tensor | None = None,
    lengths: Tensor | None = None,
    exclude_mask: bool = True,
    batch_size: int | None = None,
    backend: str | None = None,
) -> OrderedNLL:
    """-log p(x0) in nats, the tokens revealed in one order; the mean over all orders is that of `time_free_nll`.

    Each step is one pass: the order picks masked positions, their tokens are scored independently given what is
    revealed so far, and then revealed. It sees what the network says of the masks, not what they hide, so for each
    order, tokens_per_step and block_length p is one distribution: over all sequences of a length it sums to 1 (with
    exclude_mask=False to less, where the network expects masks).

    - ``"left-to-right"``: the first masks.
    - ``"confidence"``, ``"margin"``, ``"entropy"``: where the largest probability, its gap to the second, or the
      negative entropy is largest (in float32), as `sample` picks; of equal ones the first. For margin and entropy p is
      the law of what `sample` draws at temperature 1 in as many steps, if tokens_per_step divides the masks of each
      block. For confidence it is not: `sample` ranks by the tokens it has drawn, and they are the likeliest, which
      decide here, at temperature 0 alone.
    - a tensor: the positions as they are revealed.

    Args:
        model, x0, mask_index, target, lengths, exclude_mask, batch_size, backend: as in `time_free_nll`.
        order: a name above, or int64 [L] or [B, L], a permutation of 0..L-1; what is no target is passed over.
        tokens_per_step: tokens revealed in a pass, fewer in the last of a block.
        block_length: positions of blocks that are filled one after the other, the first of which begins at a
            sequence's first target position; None means one block. Not for a given order.

    Raises:
        TypeError, ValueError: as `time_free_nll`; also for an unknown order, one that is no permutation, and
            tokens_per_step or block_length below 1.
    """
    score = Scorer(
        model,
        x0,
        mask_index,
        target=target,
        lengths=lengths,
        exclude_mask=exclude_mask,
        batch_size=batch_size,
        backend=backend,
    )
    tokens_per_step = check_integer("tokens_per_step", tokens_per_step, 1)
    name = order if isinstance(order, str) else "given"
    place, block = _places(order, x0), _blocks(score.target, block_length, order)
    num_forwards = _steps(score.target, block, tokens_per_step)
    nll, masked = torch.zeros(len(x0), dtype=torch.float64, device=x0.device), score.target.clone()
    with score.evaluating(int(num_forwards.sum())):
        for group in score.groups():
            length = int(score.lengths[group[0]])
            while len(left := group[masked[group].any(1)]):
                for rows in score.batches(len(left)):
                    which = left[rows]
                    at = (which, slice(length))
                    xt, among = x0[at].masked_fill(masked[at], mask_index), _first_block(masked[at], block[at])
                    output = score.output(xt)
                    rank = -place[at] if place is not None else _sureness(score, name, output, xt, among)
                    revealed = largest(rank, among, torch.full_like(which, tokens_per_step))
                    nll[which] += score.losses(output, which, revealed).sum(1)
                    masked[at] &= ~revealed
    zero = torch.zeros_like(nll)
    exact = (nll, zero, score.num_tokens, num_forwards, zero + math.inf, zero)
    return OrderedNLL(*exact, order=name, tokens_per_step=tokens_per_step, block_length=block_length)


def _places(order: str | Tensor, x0: Tensor) -> Tensor | None:
    """When each position of x0 [B, L] comes, [B, L], in an order that does not ask the network."""
    at = torch.arange(x0.shape[1], device=x0.device)
    if not isinstance(order, Tensor):
        check_choice("order", order, ORDERS)
        return at.expand_as(x0) if order == "left-to-right" else None
    check_tokens("order", order, None, x0.device)
    if order.shape not in (x0.shape, at.shape):
        raise ValueError(f"order: expected shape {tuple(at.shape)} or {tuple(x0.shape)}, got {tuple(order.shape)}")
    wrong = (order.sort(-1).values != at).reshape(-1, len(at)).any(1)
    if wrong.any():
        row = order.reshape(-1, len(at))[wrong][0].tolist()
        raise ValueError(f"order: expected a permutation of 0..{len(at) - 1}, got {row}")
    return order.argsort(-1).expand_as(x0)


def _blocks(target: Tensor, block_length: int | None, order: str | Tensor) -> Tensor:
    """The number of the block of each position, [B, L]; those in front of the first target position do not matter."""
    if block_length is None:
        return torch.zeros_like(target, dtype=torch.int64)
    if isinstance(order, Tensor):
        raise ValueError(f"block_length: a given order takes none, got {block_length}")
    from_first = torch.arange(target.shape[1], device=target.device) - target.int().argmax(1, keepdim=True)
    return from_first.clamp(min=0) // check_integer("block_length", block_length, 1)


def _steps(target: Tensor, block: Tensor, tokens_per_step: int) -> Tensor:
    """How many steps [B] it takes."""
    tokens = torch.zeros_like(block).scatter_add(1, block, target.long())  # by block: no more than positions
    return ((tokens + tokens_per_step - 1) // tokens_per_step).sum(1)


def _first_block(masked: Tensor, block: Tensor) -> Tensor:
    """The masks of the first block that has one, bool [b, L]."""
    first = block.masked_fill(~masked, masked.shape[1]).amin(1, keepdim=True)
    return masked & (block == first)


def _sureness(score: Scorer, rule: str, output: Tensor, xt: Tensor, among: Tensor) -> Tensor:
    """By what the network is ranked at the places `among`, [b, L], from its output."""
    options = dict(mask=among, mask_index=score.mask_index, exclude_mask=score.exclude_mask, backend=score.backend)
    _, stats = draw_tokens(output, score.lm_head, score.bias, xt, temperature=0, return_stats=True, **options)
    return getattr(stats, RANKED[rule])
