"""Block diffusion (Arriola et al., ICLR 2025): a block of tokens is noised given the clean blocks before it.

One pass serves all blocks: the noised sequence and the clean one go through the network side by side, and a mask of
attention keeps each noised block to itself and to the clean blocks before it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_integer, check_tokens


def num_blocks(length: int, block_length: int) -> int:
    """Into how many blocks a length is cut.

    Raises:
        TypeError, ValueError: a block_length that is no divisor of the length.
    """
    block_length = check_integer("block_length", block_length, 1)
    if length < 1 or length % block_length:
        raise ValueError(f"block_length: expected a divisor of the length, {length}, got {block_length}")
    return length // block_length


def two_streams(xt: Tensor, x0: Tensor, block_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """[xt, x0] side by side, for a network that is given positions and a mask of attention.

    What it gives for the first half is of each block of xt given the clean blocks before; a loss takes those alone.

    Args:
        xt, x0: [B, L] int64 or int32, noised and clean tokens.
        block_length: a divisor of L.

    Returns:
        tokens [B, 2 L]; positions [2 L] int64, 0..L-1 twice; sees [2 L, 2 L] bool, which tokens (columns) each token
        attends to, as `two_streams_mask`.

    Raises:
        TypeError, ValueError: tokens that do not fit together; a block_length that does not divide L.
    """
    check_tokens("x0", x0, None)
    check_tokens("xt", xt, x0.shape, x0.device)
    if x0.dim() != 2:
        raise ValueError(f"x0: expected shape [B, L], got {tuple(x0.shape)}")
    length = x0.shape[1]
    at = torch.arange(2 * length, device=x0.device)
    sees = two_streams_mask(length, block_length)(None, None, at.unsqueeze(1), at)
    return torch.cat([xt, x0], 1), at % length, sees


def two_streams_mask(length: int, block_length: int) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """The mask of attention of `two_streams` as a mask_mod: create_block_mask(mask_mod, None, None, 2 L, 2 L).

    Noised tokens see their own noised block and the clean blocks before it; clean ones see their own and earlier blocks
    of clean ones.

    Args:
        length: L, of each half.
        block_length: a divisor of it.
    """
    num_blocks(length, block_length)

    def sees(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        query_block, key_block = query % length // block_length, key % length // block_length
        own = (query_block == key_block) & ((query < length) == (key < length))
        return own | ((key >= length) & (key_block < query_block))

    return sees


def block_causal(length: int, block_length: int, device: torch.device | None = None) -> Tensor:
    """Which tokens (columns) each token of one sequence sees: all of its own block and of those before, bool [L, L].

    Args:
        length: L; the last block may be a shorter one.
    """
    block = torch.arange(length, device=device) // check_integer("block_length", block_length, 1)
    return block.unsqueeze(1) >= block
