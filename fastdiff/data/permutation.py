"""A keyed permutation of any size that is computed and not stored: an order of things too many to shuffle."""

import math

import torch
from torch import Tensor

from fastdiff.checks import check_integer
from fastdiff.philox import Names, Purpose, philox4x32

_ROUNDS = 16  # even of sizes 4 and 5 every permutation is then as likely as another
_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # SplitMix64's


def permute(index: Tensor, size: int, *, seed: int, epoch: Names = 0) -> Tensor:
    """Where a permutation of 0..size-1 takes each index: another permutation for each seed and epoch.

    A Feistel network: an index is a pair (x, y) of numbers below about the root of the size, and each is shifted by a
    random function of the other in turn, with keys from Philox. An index that comes out beyond the last goes in again.

    Args:
        index: int64 of any shape, in [0, size).
        size: below 2^62.
        seed: of 64 bits.
        epoch: an int, or int64 that broadcasts with index, in [0, 2^56).

    Returns:
        int64 in [0, size), of the shape that index and epoch have together.

    Raises:
        ValueError: a size or an index out of range.
    """
    size = check_integer("size", size, 1)
    if size >= 2**62:
        raise ValueError(f"size: expected a number below 2^62, got {size}")
    if index.numel() and not 0 <= index.min() <= index.max() < size:
        raise ValueError(f"index: expected values in [0, {size}), got {index.min().item()} to {index.max().item()}")
    epoch = torch.as_tensor(epoch, dtype=torch.int64, device=index.device)
    keys = _keys(seed, epoch)
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)
    found = _shifted(index, rows, columns, keys)
    while (outside := found >= size).any():
        found = torch.where(outside, _shifted(found, rows, columns, keys), found)
    return found


def _keys(seed: int, epoch: Tensor) -> Tensor:
    """64 random bits for each round: [..., _ROUNDS]."""
    low, high = (epoch & _MASK32).unsqueeze(-1), (epoch >> 32).unsqueeze(-1) | (int(Purpose.ORDER) << 24)
    rounds = torch.arange(_ROUNDS, device=epoch.device)
    words = philox4x32((seed & _MASK32, (seed >> 32) & _MASK32), (rounds, 0, low, high))
    return (words[0] << 32) | words[1]


def _shifted(index: Tensor, rows: int, columns: int, keys: Tensor) -> Tensor:
    x, y = index % columns, index // columns
    for k in range(0, _ROUNDS, 2):
        x = (x + (_bits(y + keys[..., k]) * columns >> 32)) % columns
        y = (y + (_bits(x + keys[..., k + 1]) * rows >> 32)) % rows
    return y * columns + x


def _bits(x: Tensor) -> Tensor:
    """The upper half of SplitMix64's output function of x; its products wrap modulo 2^64."""
    x = (x ^ _right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _right(x, 27)) * _MULTIPLIERS[1]
    return _right(x ^ _right(x, 31), 32)


def _right(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)
